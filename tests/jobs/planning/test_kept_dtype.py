"""The dtype of what is kept (output.dtype), the size of files (output.max_shard_size), and warnings about both ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.cli.progress import Meter
from jobs.execution import run_tasks
from jobs.spec.job import JobSpec, OutputSpec, bytes_of
from loaders.errors import BadSpec
from loaders.places import DEMO
from tests.making import llama_tensors, read_safetensors, write_checkpoint

DTYPE = {"BF16": "bfloat16", "F32": "float32"}


@pytest.fixture
def gguf(tmp_path: Path, weightmill: Any) -> Path:
    out = tmp_path / "q8"
    assert weightmill("run", "quant=gguf_q8_0", f"output.path={out}").status == 0
    return out


def dtypes_of(folder: Path) -> dict[str, str]:
    return {name: raw.dtype for name, raw in read_safetensors(folder).items()}


@pytest.mark.quick
@pytest.mark.parametrize(("given", "found"), [((), "BF16"), (("output.dtype=source",), "F32"),
                                              (("output.dtype=float32",), "F32")])  # fmt: skip
def test_what_is_kept_of_a_gguf_is_bfloat16_unless_it_is_asked_for_otherwise(
    weightmill: Any, tmp_path: Path, gguf: Path, given: tuple[str, ...], found: str
) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={gguf}", f"output.path={out}", "quant=nf4", *given)
    assert ran.status == 0, ran.err
    dtypes = dtypes_of(out)
    assert {dtypes["model.embed_tokens.weight"], dtypes["model.norm.weight"]} == {found}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == DTYPE[found]
    assert weightmill("verify", f"output.path={out}").status == 0


def test_a_gguf_that_is_not_quantized_again_is_decoded_to_bfloat16(weightmill: Any, tmp_path: Path, gguf: Path) -> None:
    ran = weightmill("run", f"model.path={gguf}", f"output.path={tmp_path / 'out'}", "quant=none")
    assert ran.status == 0, ran.err
    assert set(dtypes_of(tmp_path / "out").values()) == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "not copied; output=gguf copies it as it is" in ran.out
    assert "copied as it is " not in ran.out
    plain = tmp_path / "plain"
    assert weightmill("run", f"output.path={plain}", "quant=none", "quant.dtype=float32", "output=gguf").status == 0
    ran = weightmill("run", f"model.path={plain}", f"output.path={tmp_path / 'back'}", "quant=none")
    assert ran.status == 0, ran.err
    assert set(dtypes_of(tmp_path / "back").values()) == {"F32"}  # no blocks: nothing is decoded, nothing lost


@pytest.mark.parametrize("backend", ["cuda", "cpu", "mps", "mlx"])
def test_recommended_sizes_are_those_of_plans(weightmill: Any, tmp_path: Path, gguf: Path, backend: str) -> None:
    given = (f"model.path={gguf}", "format=json")
    found = weightmill("recommend", *given, f"backend={backend}", "backend.memory_gb=8").document
    for each in found["candidates"]:
        if each["weight_bytes"] is not None:
            plan = weightmill("plan", *given, f"quant={each['preset']}", f"output.path={tmp_path / 'o'}").document
            assert plan["output"]["tensor_bytes"] == each["weight_bytes"], each["preset"]


def test_floats_of_another_source_are_cast_as_asked(weightmill: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = "rules=[{name: embed_tokens, action: cast, cast_to: float16}]"
    ran = weightmill("run", f"output.path={out}", "quant=nf4", "output.dtype=float32", rules)
    assert ran.status == 0, ran.err
    dtypes = dtypes_of(out)
    assert dtypes["model.norm.weight"] == "F32"
    assert dtypes["model.embed_tokens.weight"] == "F16"  # one's own cast goes before
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    plain = tmp_path / "plain"
    assert weightmill("run", f"output.path={plain}", "quant=none", "output.dtype=float32").status == 0
    assert set(dtypes_of(plain).values()) == {"F32"}


def test_a_dtype_that_cannot_be_is_refused(weightmill: Any, tmp_path: Path, gguf: Path) -> None:
    nf4 = tmp_path / "nf4"
    assert weightmill("run", f"output.path={nf4}", "quant=nf4").status == 0
    for given, said in (
        (("quant=gguf_q8_0",), "output.dtype: a GGUF's tensors have llama.cpp's types"),
        (("quant=none", "quant.dtype=float16"), "output.dtype: quant.dtype casts all weights already"),
        (("quant=none", f"model.path={nf4}"), "output.dtype: a quantized source is copied as it is stored"),
    ):
        ran = weightmill("plan", f"output.path={tmp_path / 'out'}", "output.dtype=bfloat16", *given)
        assert ran.status == 2
        assert said in ran.err
    assert weightmill("plan", f"output.path={tmp_path / 'out'}", f"model.path={gguf}", "quant=gguf_q4_0").status == 0


def test_files_hold_no_more_than_was_asked_for(weightmill: Any, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    ran = weightmill("run", f"output.path={out}", "quant=nf4", "output.max_shard_size=300KB")
    assert ran.status == 0, ran.err
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: len(raw.data.tobytes()) for name, raw in read_safetensors(out).items()}
    assert set(index) == set(tensors)
    for file in files:
        mine = {name: tensors[name] for name, where in index.items() if where == file.name}
        modules = {name.partition(".weight")[0] for name in mine}
        assert sum(mine.values()) <= 300_000 or len(modules) == 1  # a tensor with its scales is never cut
    assert weightmill("verify", f"output.path={out}").status == 0
    assert weightmill("run", f"output.path={whole}", "quant=nf4").status == 0
    one, other = read_safetensors(out), read_safetensors(whole)
    assert {n: r.data.tobytes() for n, r in one.items()} == {n: r.data.tobytes() for n, r in other.items()}
    for quant in ("gguf_q8_0", "hqq4"):
        refused = weightmill("plan", f"output.path={tmp_path / 'o'}", f"quant={quant}", "output.max_shard_size=300KB")
        assert refused.status == 2
        assert "output.max_shard_size: layout" in refused.err


def test_a_file_that_is_larger_than_asked_is_warned_of(weightmill: Any, tmp_path: Path) -> None:
    given = (f"output.path={tmp_path / 'out'}", "quant=nf4")
    said = weightmill("plan", *given, "output.max_shard_size=300KB").out
    assert "1 file is larger than output.max_shard_size, up to 524.29 kB" in said
    assert "(model.embed_tokens.weight)" in said
    assert "larger than output" not in weightmill("plan", *given, "output.max_shard_size=600KB").out


def test_a_result_says_which_relative_error_is_which(weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill("run", f"output.path={tmp_path / 'out'}", "quant=nf4")
    metrics = json.loads((tmp_path / "out" / "weightmill.json").read_text())["totals"]
    assert f"relative error of these {metrics['changed']['relative_error']:.5f}" in ran.out
    assert f"relative error over all weights: {metrics['relative_error']:.5f}" in ran.out


def test_progress_ends_at_its_total(
    weightmill: Any, tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Meter):
        def __init__(self, what: str, total: int, *others: Any, **named: Any) -> None:
            super().__init__(what, total, *others, **named)
            found[what] = [total, 0]
            self._name = what

        def add(self, count: int) -> None:
            found[self._name][1] += count
            super().add(count)

    found: dict[str, list[int]] = {}
    monkeypatch.setattr(run_tasks, "Meter", Counted)
    for quant in ("nf4", "none"):
        ran = weightmill("run", f"model.path={gguf}", f"output.path={tmp_path / quant}", f"quant={quant}")
        assert ran.status == 0, ran.err
        total, done = found["quantizing"]
        assert total == done


@pytest.mark.parametrize(("size", "found"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("512MiB", 512 << 20)])
def test_sizes_are_those_that_they_say(size: str, found: int) -> None:
    assert bytes_of(size) == found


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5 apples", "1e3GB", "9" * 30 + "TB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(BadSpec, match="output.max_shard_size: "):
        compose("run", JobSpec, take_apart("run", JobSpec, [f"output.max_shard_size='{size}'"]))


def test_reports_from_before_keep_what_was_stored() -> None:
    assert OutputSpec.model_fields["dtype"].default == "source"


def test_growth_and_a_second_quantization_are_warned_of(weightmill: Any, tmp_path: Path, gguf: Path) -> None:
    ran = weightmill("plan", f"model.path={gguf}", f"output.path={tmp_path / 'out'}", "quant=int8")
    assert "are quantized already in the source (ggml) and quantized again" in ran.out
    ran = weightmill("plan", f"output.path={tmp_path / 'out'}", "quant=none", "quant.dtype=float32")
    assert "the output is larger than the source" in ran.out
    ran = weightmill("plan", f"output.path={tmp_path / 'out'}", f"model.path={DEMO}", "quant=nf4")
    assert "warning: the output is larger" not in ran.out
    assert "quantized again" not in ran.out


def test_the_size_that_is_warned_of_is_the_plan_s(weightmill: Any, tmp_path: Path, gguf: Path) -> None:
    """hqq's scales are cast as they are written, which the size of an encoding alone does not say."""
    asked = (f"model.path={gguf}", f"output.path={tmp_path / 'out'}", "quant=hqq8", "quant.group_size=8")
    planned = weightmill("plan", *asked, "format=json").document
    [said] = [each for each in planned["warnings"] if "larger than the source" in each]
    assert f"{planned['output']['tensor_bytes'] / 1e6:.2f} MB instead of" in said


def test_matrices_that_mlx_leaves_alone_are_named_with_the_groups_that_fit(weightmill: Any, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", llama_tensors())
    ran = weightmill("plan", f"model.path={model}", "quant=mlx_int4", "quant.group_size=128")
    assert ran.status == 0
    assert "matrices stay plain" in ran.out
    assert "groups of 128 do not divide rows of 64" in ran.out
    assert "quant.group_size=64 fits all" in ran.out
    assert "stay plain" not in weightmill("plan", f"model.path={model}", "quant=mlx_int4", "quant.group_size=64").out


def test_mlx_gets_of_a_gguf_what_the_plain_bfloat16_checkpoint_gives_it(
    weightmill: Any, tmp_path: Path, gguf: Path
) -> None:
    plain = tmp_path / "plain"
    assert weightmill("run", f"model.path={gguf}", f"output.path={plain}", "quant=none").status == 0
    found = []
    for source in (gguf, plain):
        out = tmp_path / f"{source.name}-mlx"
        assert weightmill("run", f"model.path={source}", f"output.path={out}", "quant=mlx_int4").status == 0
        found.append(read_safetensors(out))
    assert {name: (raw.dtype, raw.data.tobytes()) for name, raw in found[0].items()} == {
        name: (raw.dtype, raw.data.tobytes()) for name, raw in found[1].items()
    }
    assert {raw.dtype for name, raw in found[0].items() if name.endswith("scales")} == {"BF16"}


def test_a_sweep_warns_before_the_work_of_what_its_plans_do(weightmill: Any, tmp_path: Path, gguf: Path) -> None:
    asked = ("-m", f"model.path={gguf}", f"output.root={tmp_path / 'outs'}")
    ran = weightmill("run", *asked, "quant=nf4,fp4")
    assert ran.status == 0, ran.err
    said = [line for line in ran.err.splitlines() if "quantized again" in line]
    assert len(said) == 1  # the same of both
    assert said[0].startswith("warning: ")
    ran = weightmill("run", *asked, "quant=mlx_int4,mlx_int8", "quant.group_size=32")
    assert ran.status == 0, ran.err
    [larger] = [line for line in ran.err.splitlines() if "larger than the source" in line]
    assert larger.startswith("warning: ")
    assert "mlx_int8" in larger.split("the output is", 1)[0]
    assert "mlx_int4" not in larger.split("the output is", 1)[0]
