"""Jobs that write and read packed checkpoints: exact plans, round trips, what interrupts them, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from tests.failing import fail_at
from tests.journals import find_journals
from tests.making import LLAMA, Raw, llama_tensors, read_safetensors, snapshot, weights, write_checkpoint
from tests.processes import start

REPORT = "weightmill.json"
PARTS = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def moe(folder: Path, model_type: str = "qwen3_moe", dtype: str = "BF16", experts: int = 3) -> Path:
    """A mixture in both layers, every expert another."""
    tensors, rng = llama_tensors(dtype), np.random.default_rng(5)
    module = "mlp" if model_type != "mixtral" else "block_sparse_moe"
    for layer in range(2):
        for name in [n for n in tensors if n.startswith(f"model.layers.{layer}.mlp.")]:
            del tensors[name]
        name = f"model.layers.{layer}.{module}"
        tensors[f"{name}.gate.weight"] = weights(rng.standard_normal((experts, 64)) * 0.1, dtype)
        for expert in range(experts):
            for part, shape in zip(
                PARTS.get(model_type, PARTS["qwen3_moe"]), ((128, 64), (128, 64), (64, 128)), strict=True
            ):
                values = rng.standard_normal(shape).astype(np.float32) * 0.05
                tensors[f"{name}.experts.{expert}.{part}.weight"] = weights(values, dtype)
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    config = {**LLAMA, "model_type": model_type, "dtype": names[dtype], "num_experts": experts}
    return write_checkpoint(folder, tensors, config={**config, "num_local_experts": experts}, shards=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return moe(tmp_path / "model")


def run(weightmill: Any, model: Path, out: Path, *settings: str) -> Any:
    """A job that has to succeed."""
    ran = weightmill("run", f"model.path={model}", f"output.path={out}", "unit_mb=0.02", *settings, "format=json")
    assert ran.status == 0, ran.err
    return ran.document


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every stored tensor as the headers give it."""
    found = {}
    for spec in open_checkpoint(folder).weights:
        data = (folder / spec.file).read_bytes()[spec.offset : spec.offset + spec.size]
        found[spec.name] = (spec.dtype.name, spec.shape, data)
    return found


def equal(one: dict[str, Raw], other: dict[str, Raw]) -> bool:
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and np.array_equal(one[n].data, other[n].data) for n in one
    )


@pytest.mark.parametrize("kind", ["dense", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_plain_weights_come_back_byte_for_byte(kind: str, tmp_path: Path, weightmill: Any) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2) if kind == "dense" else moe(tmp_path / "model", kind)
    run(weightmill, model, tmp_path / "packed", "quant=none", "output=packed")
    run(weightmill, tmp_path / "packed", tmp_path / "back", "quant=none")
    assert equal(read_safetensors(model), read_safetensors(tmp_path / "back"))
    assert (tmp_path / "packed" / "packed_experts" / "layer_01.bin").exists() == (kind != "dense")


@pytest.mark.parametrize("quant", ["none", "mlx_int8"])
def test_the_plan_knows_every_file_to_the_byte(quant: str, model: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    arguments = [f"model.path={model}", f"output.path={out}", f"quant={quant}", "output=packed", "unit_mb=0.02"]
    planned = weightmill("plan", *arguments, "format=json").document
    report = run(weightmill, model, out, f"quant={quant}", "output=packed")
    files = {file["name"]: file["bytes"] for file in planned["output"]["files"]}
    assert set(files) == {"model_weights.bin", "packed_experts/layer_00.bin", "packed_experts/layer_01.bin"}
    assert files == {name: (out / name).stat().st_size for name in files}
    assert files == {file["name"]: file["bytes"] for file in report["files"]}
    assert len(report["files"][0]["pieces"]) > 2
    assert sorted(snapshot(out, ["extra"])) == sorted(
        [*files, "model_weights.json", "packed_experts/layout.json", "config.json", "tokenizer.json",
         "chat_template.jinja", "extra/modeling.py", "README.md", "report.html", REPORT]
    )  # fmt: skip
    assert find_journals(tmp_path) == []
    assert weightmill("verify", f"output.path={out}").status == 0


def test_words_are_mlx_s_and_lie_where_the_engine_looks(model: Path, tmp_path: Path, weightmill: Any) -> None:
    run(weightmill, model, tmp_path / "mlx", "quant=mlx_int4")
    run(weightmill, model, tmp_path / "packed", "quant=mlx_int4", "output=packed")
    theirs = read_safetensors(tmp_path / "mlx")
    manifest = json.loads((tmp_path / "packed" / "model_weights.json").read_text())
    data = (tmp_path / "packed" / "model_weights.bin").read_bytes()
    assert manifest["num_tensors"] == len(manifest["tensors"])
    assert list(manifest["tensors"]) == sorted(manifest["tensors"])
    for name, entry in manifest["tensors"].items():
        assert entry["offset"] % 64 == 0
        assert data[entry["offset"] :][: entry["size"]] == theirs[name].data.tobytes()
        assert (entry["dtype"], tuple(entry["shape"])) == (theirs[name].dtype, theirs[name].data.shape)
        is_router = name.endswith("mlp.gate.weight")  # of 8 bits in this model
        assert entry.get("bits") == ((8 if is_router else 4) if entry["dtype"] == "U32" else None)
    layout = json.loads((tmp_path / "packed" / "packed_experts" / "layout.json").read_text())
    assert {key: layout[key] for key in ("num_layers", "num_experts", "moe_layers")} == {
        "num_layers": 2, "num_experts": 3, "moe_layers": [0, 1],
    }  # fmt: skip
    parts = [f"{p}.{s}" for p in PARTS["qwen3_moe"] for s in ("weight", "scales", "biases")]
    assert [component["name"] for component in layout["components"]] == parts
    assert set(layout["components"][0]) == {"name", "offset", "size", "dtype", "shape"}
    for layer in range(2):
        expected = b"".join(
            theirs[f"model.layers.{layer}.mlp.switch_mlp.{part}"].data[expert].tobytes()
            for expert in range(3) for part in parts
        )  # fmt: skip
        assert (tmp_path / "packed" / "packed_experts" / f"layer_{layer:02d}.bin").read_bytes() == expected
    assert not set(manifest["tensors"]) & {f"model.layers.{n}.mlp.switch_mlp.{p}" for n in range(2) for p in parts}


@pytest.mark.quick
def test_a_packed_checkpoint_decodes_as_mlx_s_does(model: Path, tmp_path: Path, weightmill: Any) -> None:
    quant = "mlx_int4"  # with routers of 8 bits
    run(weightmill, model, tmp_path / "mlx", f"quant={quant}")
    run(weightmill, model, tmp_path / "packed", f"quant={quant}", "output=packed")
    for name in ("mlx", "packed"):
        run(weightmill, tmp_path / name, tmp_path / f"{name}-back", "quant=none", "quant.dtype=bfloat16")
    assert equal(read_safetensors(tmp_path / "mlx-back"), read_safetensors(tmp_path / "packed-back"))
    config = json.loads((tmp_path / "packed-back" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config)
    run(weightmill, tmp_path / "packed", tmp_path / "nf4", "quant=nf4")
    run(weightmill, tmp_path / "packed", tmp_path / "again", "quant=mlx_int8", "output=packed")
    assert weightmill("verify", f"output.path={tmp_path / 'nf4'}").status == 0


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_words_of_mlx_and_of_packed_are_copied_as_they_are(kind: str, tmp_path: Path, weightmill: Any) -> None:
    model = write_checkpoint(tmp_path / "model") if kind == "dense" else moe(tmp_path / "model", kind)
    run(weightmill, model, tmp_path / "direct", "quant=mlx_int4", "output=packed")
    run(weightmill, model, tmp_path / "mlx", "quant=mlx_int4")
    run(weightmill, tmp_path / "mlx", tmp_path / "copied", "quant=none", "output=packed")
    run(weightmill, tmp_path / "copied", tmp_path / "again", "quant=none", "output=packed")
    direct = tensors_of(tmp_path / "direct")
    assert direct == tensors_of(tmp_path / "copied") == tensors_of(tmp_path / "again")
    for name in ("copied", "again"):
        assert weightmill("verify", f"output.path={tmp_path / name}").status == 0
    layouts = [path.read_bytes() for path in sorted(tmp_path.glob("*/packed_experts/layout.json"))]
    assert len(layouts) == (0 if kind == "dense" else 3)
    assert len(set(layouts)) <= 1


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_scales_are_bfloat16_whatever_the_source_is(dtype: str, tmp_path: Path, weightmill: Any) -> None:
    model = moe(tmp_path / "model", dtype=dtype)
    run(weightmill, model, tmp_path / "out", "quant=mlx_int4", "output=packed")
    found = {(name.rpartition(".")[2], kind) for name, (kind, _, _) in tensors_of(tmp_path / "out").items()}
    norms = {"weight": "BF16" if dtype == "F16" else "F32"}
    assert found == {("weight", "U32"), ("scales", "BF16"), ("biases", "BF16"), *norms.items()}
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0
    plain = weightmill("plan", f"model.path={model}", "quant=none", "output=packed", f"output.path={tmp_path / 'p'}")
    assert ("not F16, which stay here" in " ".join(plain.out.split())) == (dtype == "F16")


def test_a_language_model_s_prefix_goes_and_towers_stay_behind(tmp_path: Path, weightmill: Any) -> None:
    tensors = {f"language_model.{name}": raw for name, raw in llama_tensors().items()}
    tensors["vision_tower.patch_embedding.weight"] = weights(np.ones((4, 4), np.float32), "BF16")
    tensors["language_model.model.layers.0.linear_attn.A_log"] = weights(np.ones(8, np.float32), "BF16")
    model = write_checkpoint(tmp_path / "model", tensors, config={**LLAMA, "model_type": "unheard_of"})
    report = run(weightmill, model, tmp_path / "out", "quant=mlx_int4", "output=packed")
    found = tensors_of(tmp_path / "out")
    assert {name.partition(".")[0] for name in found} == {"model", "lm_head"}
    assert found["model.layers.0.linear_attn.A_log"][0] == "F32"
    assert any("no towers for images: 1 tensor is left out" in warning for warning in report["warnings"])


def test_other_verbs_know_it(model: Path, tmp_path: Path, weightmill: Any) -> None:
    report = run(weightmill, model, tmp_path / "out", "quant=mlx_int4", "output=packed")
    assert report["lint"] == []
    assert weightmill("lint", f"output.path={tmp_path / 'out'}", "format=json").document["findings"] == []
    seen = weightmill("inspect", f"model.path={tmp_path / 'out'}", "format=json").document
    assert (seen["container"], seen["quantization"]) == ("packed", "mlx")
    assert {row["stored_as"] for row in seen["tensors"]} == {"mlx", "BF16"}
    compared = weightmill("diff", model, tmp_path / "out", "format=json").document
    assert compared["only_in_a"] == compared["only_in_b"] == []
    assert 0 < max(row["relative_error"] for row in compared["tensors"]) < 0.12
    run(weightmill, model, tmp_path / "plain", "quant=none", "output=packed")
    assert weightmill("diff", model, tmp_path / "plain", "format=json").document["different"] == 0
    found = weightmill("lint", f"output.path={tmp_path / 'plain'}", "format=json").document["findings"]
    assert [row["what"] for row in found] == ["nothing is quantized"]


@pytest.mark.parametrize("file", ["model_weights.bin", "packed_experts/layer_01.bin", "model_weights.json"])
def test_one_flipped_bit_fails_verification(file: str, model: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    run(weightmill, model, out, "quant=mlx_int4", "output=packed")
    data = bytearray((out / file).read_bytes())
    data[data.index(b"true") if b"true" in data else len(data) // 2] ^= 1
    (out / file).write_bytes(data)
    assert weightmill("verify", f"output.path={out}").status != 0


def lost_part(tensors: dict[str, Raw]) -> None:
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


def lost_expert(tensors: dict[str, Raw]) -> None:
    for part in PARTS["qwen3_moe"]:
        del tensors[f"model.layers.1.mlp.experts.2.{part}.weight"]


REFUSALS: dict[str, tuple[Any, list[str], str]] = {
    "a foreign quant": (None, ["quant=nf4"], "packed holds MLX's affine codes or plain weights, not bnb4"),
    "small floats": (None, ["quant=mlx_mxfp4"], "packed holds MLX's affine codes or plain weights, not mlx_float"),
    "other groups": (None, ["quant=mlx_int4", "quant.group_size=32"], "has groups of 64 compiled in, .*groups of 32"),
    "split": (None, ["quant=none", "output.split=true"], "only gguf can be one file or several"),
    "another container": (None, ["quant=none", "output.container=safetensors"], "layout packed takes packed"),
    "packed files elsewhere": (None, ["quant=nf4", "output=hf", "output.container=packed"], "packed is not read there"),
    "experts of two kinds": (
        None, ["quant=mlx_int4", "rules=[{name: experts.2.up, action: keep}]"],
        "one shape, dtype and scheme in all experts of all layers; expert 2 of layer 0 has",
    ),
    "a part that is missing": (lost_part, ["quant=none"], "expert 2 of layer 1 has down_proj.weight BF16"),
    "an expert that is missing": (lost_expert, ["quant=none"], "layer 1 would have 2, layer 0 3; keep or drop all"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_what_cannot_be_packed_is_refused_in_the_plan(name: str, model: Path, tmp_path: Path, weightmill: Any) -> None:
    change, settings, message = REFUSALS[name]
    if change is not None:
        tensors = read_safetensors(model)
        change(tensors)
        config = json.loads((model / "config.json").read_text())
        model = write_checkpoint(tmp_path / "changed", tensors, config=config)
    ran = weightmill("plan", f"model.path={model}", f"output.path={tmp_path / 'out'}", "output=packed", *settings)
    assert ran.status == 2
    assert re.search(message, " ".join(ran.err.split())), ran.err


def test_quantized_experts_are_copied_to_packed_alone(model: Path, tmp_path: Path, weightmill: Any) -> None:
    run(weightmill, model, tmp_path / "packed", "quant=mlx_int4", "output=packed")
    ran = weightmill("plan", f"model.path={tmp_path / 'packed'}", f"output.path={tmp_path / 'b'}", "quant=none")
    assert ran.status == 2
    assert "give quant.dtype=bfloat16, a quant, or output=packed" in " ".join(ran.err.split())


def test_a_job_goes_on_where_it_was(
    model: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["quant=mlx_int4", "output=packed"]
    run(weightmill, model, tmp_path / "undisturbed", *settings)

    arguments = [f"model.path={model}", f"output.path={tmp_path / 'out'}", "unit_mb=0.02", *settings]
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *arguments, "cluster.units_at_once=1")
    assert run(weightmill, model, tmp_path / "out", *settings)["run"]["units_resumed"] == 3
    assert snapshot(tmp_path / "out", [REPORT]) == snapshot(tmp_path / "undisturbed", [REPORT])


@pytest.mark.parametrize("output", ["quant=gguf_q8_0", "quant=hqq4", "output=packed"])
def test_killed_in_the_middle_the_output_is_the_same_and_nothing_is_twice_on_the_disk(
    output: str, tmp_path: Path, weightmill: Any
) -> None:
    from tests.making import make_source

    model, out = make_source(tmp_path / "model"), tmp_path / "out"
    settings = [output] if output.startswith("quant") else ["quant=mlx_int4", output]
    whole = run(weightmill, model, tmp_path / "undisturbed", *settings)["files"][0]
    slow = (
        "import time, jobs.output.journal as j; f = j.Journal.add\n"
        "def a(self, record): f(self, record); time.sleep(0.2)\n"
        "j.Journal.add = a\n"
        "import sys; from jobs.run import main; sys.exit(main())"
    )
    given = ("tracking=none", "cluster=local", f"model.path={model}", f"output.path={out}", "unit_mb=0.02")
    process = start("-c", slow, *given, *settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len([r for j in find_journals(tmp_path) for r in (j / "records").glob("*.json")]) >= 2:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    [journal] = find_journals(tmp_path)
    assert list((journal / "pieces").iterdir()) == []
    assert (journal / "files" / whole["name"]).stat().st_size == whole["bytes"]
    assert run(weightmill, model, out, *settings)["run"]["units_resumed"] >= 2
    assert snapshot(out, [REPORT]) == snapshot(tmp_path / "undisturbed", [REPORT])
    assert find_journals(tmp_path) == []
