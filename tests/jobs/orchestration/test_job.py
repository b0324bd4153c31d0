"""The main job as a user runs it: one command, a checked output, nothing left lying about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.planning.plan import FORMAT
from loaders.storage import patience
from tests import reference
from tests.making import (  # fmt: skip
    LLAMA,
    Raw,
    llama_tensors,
    read_safetensors,
    snapshot,
    values_of,
    weights,
    write_checkpoint,
    write_safetensors,
)


def test_what_is_let_pass_is_said(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"].data[0, 0] = np.uint16(0x7FC0)
    source = write_checkpoint(tmp_path / "source", tensors)
    arguments = (f"model.path={source}", "verify.allow_nonfinite=true")
    document = weightmill("run", *arguments, f"output.path={tmp_path / 'a'}", "format=json").document
    assert any("1 weights are NaN or infinite in the source, and 63 more" in said for said in document["warnings"])
    assert "let pass" in weightmill("run", *arguments, f"output.path={tmp_path / 'b'}").out


@pytest.mark.parametrize(
    "arguments",
    [("tracking=mlflow", "tracking.uri=http://127.0.0.1:9"), ("cluster=ray", "cluster.address=127.0.0.1:9")],
)
def test_a_service_that_does_not_answer_is_said_at_once(
    arguments: tuple[str, ...], source: Path, tmp_path: Path, weightmill: Any
) -> None:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", *arguments)
    assert ran.status == 1
    assert "nobody answers" in ran.err
    assert not (tmp_path / "out").exists()


REPORT = "weightmill.json"


@pytest.mark.quick
def test_the_output_is_right_by_an_independent_decoder(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "unit_mb=0.05")
    assert ran.status == 0, ran.err
    originals, written = read_safetensors(source), read_safetensors(tmp_path / "out")
    for name, raw in originals.items():
        if "_proj" in name:
            error = reference.relative_error(values_of(raw), reference.decode_bnb4(written, name))
            assert 0.05 < error < 0.12, name
        else:
            assert np.array_equal(written[name].data, raw.data), name


def test_index_config_and_aux_files_are_as_an_engine_wants_them(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "unit_mb=0.05").status == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written = read_safetensors(out)
    assert set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == sum(raw.data.nbytes for raw in written.values())
    for name, file in index["weight_map"].items():
        assert name.encode() in (out / file).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == json.loads(
        (source / "config.json").read_text()
    )
    for name in ("tokenizer.json", "chat_template.jinja", "extra/modeling.py"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    "settings",
    ["quant=nf4", "quant=nf4 quant.double_quant=true", "quant=fp4 quant.group_size=128", "quant=ternary", "quant=none",
     "quant=none quant.dtype=float16"],
)  # fmt: skip
def test_the_plan_is_what_the_run_writes(settings: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    given = (f"model.path={source}", f"output.path={out}", *settings.split(), "unit_mb=0.05")
    planned = weightmill("plan", *given, "format=json").document
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "source"]
    assert weightmill("run", *given).status == 0
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    slack = planned["output"]["slack_bytes"]
    wanted = {file["name"]: file["bytes"] for file in planned["output"]["files"]}
    assert set(sizes) == set(wanted)
    if slack == 0:
        assert sizes == wanted
    assert 0 <= sum(wanted.values()) - sum(sizes.values()) <= slack


def test_weights_that_are_not_finite_stop_the_job_unless_they_may_pass(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    bad = tensors["model.layers.1.mlp.up_proj.weight"]
    bad.data[3, 5], bad.data[4, 0] = 0x7FC0, 0x7F80
    source = write_checkpoint(tmp_path / "m", tensors)
    given = (f"model.path={source}", f"output.path={tmp_path / 'out'}")
    ran = weightmill("run", *given)
    assert ran.status == 1
    assert "model.layers.1.mlp.up_proj.weight: the source holds 2 NaN or infinite weights" in ran.err
    assert not (tmp_path / "out").exists()
    assert weightmill("run", *given, "verify.allow_nonfinite=true").status == 0


def test_kept_tensors_that_are_not_finite_are_found_as_well(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"].data[7] = 0x7FC0
    ran = weightmill(
        "run", f"model.path={write_checkpoint(tmp_path / 'm', tensors)}", f"output.path={tmp_path / 'out'}"
    )
    assert ran.status == 1
    assert "model.norm.weight" in ran.err


@pytest.mark.quick
def test_a_limit_of_the_users_is_a_gate(source: Path, tmp_path: Path, weightmill: Any) -> None:
    given = (f"model.path={source}", f"output.path={tmp_path / 'out'}")
    ran = weightmill("run", *given, "verify.max_relative_error=0.01")
    assert ran.status == 1
    assert "at most 0.01 allowed (the worst of 14 in unit-00001)" in ran.err
    assert not (tmp_path / "out").exists()
    assert weightmill("run", *given, "verify.max_relative_error=0.5").status == 0


def test_values_beyond_a_narrower_dtype_are_refused(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors("F32")
    tensors["model.norm.weight"].data[3] = 1e6
    source = write_checkpoint(tmp_path / "m", tensors)
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={tmp_path / 'o'}", "quant=none", "quant.dtype=float16"
    )
    assert ran.status == 1
    assert "model.norm.weight: 1 finite weights come back as NaN or infinities" in ran.err


def test_tied_weights_stay_tied(tmp_path: Path, weightmill: Any) -> None:
    source = write_checkpoint(tmp_path / "m", llama_tensors(tied=True))
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}").status == 0
    assert "lm_head.weight" not in read_safetensors(tmp_path / "out")


def test_every_dtype_passes_through(tmp_path: Path, weightmill: Any) -> None:
    tensors = {
        **llama_tensors(),
        "ids": Raw("I64", np.arange(12).reshape(1, 12)),
        "flag": Raw("BOOL", np.array([1, 0, 1], np.uint8)),
        "eight": Raw("F8_E4M3", np.arange(256, dtype=np.uint8).reshape(16, 16)),
        "four": Raw("U8", np.arange(10, dtype=np.uint8)),
        "scalar": Raw("F32", np.float32(3).reshape(())),
        "nothing": Raw("BF16", np.empty((0, 4), np.uint16)),
        "stacked": weights(np.random.default_rng(0).standard_normal((3, 8, 8)), "BF16"),
    }
    source = write_checkpoint(tmp_path / "m", tensors, config={**LLAMA, "dtype": "bfloat16"})
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}").status == 0
    written = read_safetensors(tmp_path / "out")
    for name in ("ids", "flag", "eight", "four", "scalar", "nothing", "stacked"):
        assert written[name].dtype == tensors[name].dtype
        assert written[name].data.tobytes() == tensors[name].data.tobytes()
        assert written[name].data.shape == tensors[name].data.shape


def test_the_bytes_do_not_depend_on_threads_units_at_once_or_strategy(
    source: Path, tmp_path: Path, weightmill: Any
) -> None:
    found = []
    for number, extra in enumerate(
        [
            ("cluster=local", "cluster.threads=1", "cluster.units_at_once=1", "strategy=lazy"),
            ("cluster=local", "cluster.threads=5", "cluster.units_at_once=3", "strategy=read"),
        ]
    ):
        out = tmp_path / f"out{number}"
        ran = weightmill("run", f"model.path={source}", f"output.path={out}", "unit_mb=0.05", *extra)
        assert ran.status == 0, ran.err
        report = json.loads((out / REPORT).read_text())
        del report["run"]
        found.append((snapshot(out, ignore=[REPORT]), report))
    assert found[0] == found[1]


@pytest.mark.quick
def test_the_report_says_what_was_done(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "unit_mb=0.05", "format=json")
    report = json.loads((out / REPORT).read_text())
    printed = ran.document
    del report["run"]["xxh3"], printed["run"]["xxh3"]  # which only the file has
    assert {key: printed[key] for key in report} == report
    assert report["format"] == FORMAT
    import xxhash

    for file in report["files"]:
        data = (out / file["name"]).read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (file["bytes"], file["xxh3"])
    written = read_safetensors(out)
    for row in report["tensors"]:
        for name, part in row["stored"].items():
            assert xxhash.xxh3_64_hexdigest(written[name].data.tobytes()) == part["xxh3"]
    total = report["totals"]
    assert total["source_bytes"] == sum(raw.data.nbytes for raw in llama_tensors().values())
    assert total["output_bytes"] == sum(raw.data.nbytes for raw in written.values())
    assert total["changed"]["tensors"] == 14


def test_people_see_the_plan_the_result_and_where_it_is(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert "quantize" in ran.err
    assert "transformers makes every nn.Linear a Linear4bit" in ran.err
    for said in ("times smaller", "bits per weight", "worst tensors", "GB/s", f"output: {tmp_path / 'out'}"):
        assert said in ran.out


def test_a_sweep_runs_every_job_and_names_what_varies(source: Path, weightmill: Any) -> None:
    ran = weightmill("run", "-m", f"model.path={source}", "quant=nf4,fp4", "quant.group_size=64,128")
    assert ran.status == 0, ran.err
    names = sorted(p.name for p in (Path.cwd() / "outputs").iterdir() if p.is_dir() and p.name[0] != ".")
    assert names == [f"source-{q}-g{g}" for q in ("fp4", "nf4") for g in (128, 64)]


def test_a_rule_that_matches_nothing_stops_the_job_before_it_starts(
    source: Path, tmp_path: Path, weightmill: Any
) -> None:
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={tmp_path / 'o'}", "rules=[{name: ghost, action: drop}]"
    )
    assert ran.status == 2
    assert "rules[0]: it matches no tensor" in ran.err


def test_a_preset_without_a_network_says_what_to_do(weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    monkeypatch.setattr(patience, "UNREACHED_S", 0.0)
    ran = weightmill("plan", "model=llama70b")
    assert ran.status == 1
    assert "hf://meta-llama/Llama-3.1-70B: no connection to the Hub at http://no-such-host.invalid" in ran.err
    assert "check the network and HF_ENDPOINT, or fetch the model elsewhere and give its folder" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_the_source_is_never_changed(source: Path, tmp_path: Path, weightmill: Any) -> None:
    before = snapshot(source)
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}").status == 0
    assert snapshot(source) == before


def test_a_damaged_source_fails_without_a_traceback_and_publishes_nothing(tmp_path: Path, weightmill: Any) -> None:
    source = write_checkpoint(tmp_path / "m")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert ran.err.startswith("weightmill: failed: model.safetensors:")
    assert len(ran.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "m"]


def test_an_int_tensor_cannot_be_quantized_by_a_rule(tmp_path: Path, weightmill: Any) -> None:
    source = tmp_path / "m"
    source.mkdir()
    write_safetensors(source / "model.safetensors", {"ids": Raw("I64", np.arange(64).reshape(8, 8))})
    ran = weightmill("plan", f"model.path={source}", "rules=[{name: ids, action: quantize}]")
    assert ran.status == 2
    assert "cannot quantize ids: its dtype is I64; nf4 takes BF16, F16, F32, F64" in ran.err
