"""quant=auto: measured once, chosen exactly, written like any other job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.mixed_precision.allocation import patterns
from jobs.mixed_precision.candidate_errors import MeasuringTask
from tests.making import snapshot, tokenizer, write_checkpoint, write_moe

AUTO = ("quant=auto", "quant.engine=mlx", "quant.among=[mlx_int2,mlx_int4,mlx_int8]")


def chosen(out: Path) -> dict[str, Any]:
    return json.loads((out / "weightmill.json").read_text())["job"]["quant"]["chosen"]


def bits_of(out: Path) -> float:
    return json.loads((out / "weightmill.json").read_text())["totals"]["bits_per_weight"]


@pytest.mark.quick
def test_a_mix_keeps_to_its_budget_and_needs_no_second_measuring(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, list[str]]] = []
    honest = MeasuringTask.run

    def counting(self: MeasuringTask, *given: Any) -> Any:
        measured.append((self.unit.id, sorted(self.wanted)))
        return honest(self, *given)

    monkeypatch.setattr(MeasuringTask, "run", counting)
    given = (*AUTO, f"model.path={source}", f"output.root={tmp_path}/r", "unit_mb=0.1")
    planned = weightmill("plan", *given, "quant.target_bits=5")
    assert planned.status == 0
    assert "will measure 16 tensors" in planned.out
    outs = [tmp_path / "five", tmp_path / "six"]
    for out, budget in zip(outs, (5, 6), strict=True):
        ran = weightmill("run", *given, f"quant.target_bits={budget}", f"output.path={out}")
        assert ran.status == 0, ran.err
        assert "no mix loses less" in ran.err
        assert budget - 0.2 < bits_of(out) <= budget
        assert weightmill("verify", f"output.path={out}").status == 0
        assert weightmill("lint", f"output.path={out}").status == 0
    assert chosen(outs[1])["error"] < chosen(outs[0])["error"]
    first = list(measured)
    assert len(first) == len({unit for unit, _ in first}) > 1
    more = (*given, "quant.among=[mlx_int2,mlx_int4,mlx_int8,mlx_int3]", "quant.target_bits=5", "output.path=x")
    assert weightmill("run", *more).status == 0
    assert measured[len(first) :] == [(unit, ["mlx_int3"]) for unit, _ in first]
    assert chosen(Path("x"))["error"] <= chosen(outs[0])["error"]


def test_measuring_goes_on_where_it_was(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    honest = MeasuringTask.run

    def failing(self: MeasuringTask, *given: Any) -> Any:
        ran.append(self.unit.id)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return honest(self, *given)

    given = (*AUTO, f"model.path={source}", f"output.root={tmp_path}/r", "unit_mb=0.02", "quant.target_bits=5")
    with monkeypatch.context() as patch:
        patch.setattr(MeasuringTask, "run", failing)
        assert weightmill("run", *given, "cluster.units_at_once=1", "output.path=a").status == 130
    first, ran[:] = ran[:2], ["x"] * 3
    monkeypatch.setattr(MeasuringTask, "run", failing)
    done = weightmill("run", *given, "output.path=a")
    assert done.status == 0, done.err
    assert "2 of 10 units were measured before" in done.err
    assert not set(first) & set(ran[3:])


def test_it_is_one_job_however_often_it_is_chosen(source: Path, tmp_path: Path, weightmill: Any) -> None:
    given = (*AUTO, f"model.path={source}", "quant.target_bits=5")
    for name in ("a", "b"):
        assert (
            weightmill("run", *given, f"output.root={tmp_path}/{name}", f"output.path={tmp_path}/{name}/o").status == 0
        )
    one, other = (snapshot(tmp_path / name / "o", ignore=["weightmill.json"]) for name in ("a", "b"))
    assert one == other


def test_its_rules_give_the_same_weights(source: Path, tmp_path: Path, weightmill: Any) -> None:
    given = (*AUTO, f"model.path={source}", f"output.root={tmp_path}/r", "quant.target_bits=5.5")
    assert weightmill("run", *given, f"output.path={tmp_path}/auto").status == 0
    said = weightmill("plan", *given, f"output.path={tmp_path}/other").out
    lines = said[said.index("- {action") :].splitlines()
    rules = tmp_path / "rules.yaml"
    rules.write_text("\n".join(line for line in lines if line.startswith("- {action")))
    assert yaml.safe_load(rules.read_text())
    again = weightmill(
        "run", "quant=mlx_int4", f"rules={rules}", f"model.path={source}", f"output.path={tmp_path}/rules"
    )
    assert again.status == 0, again.err
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "rules"))
    assert one == other


def with_tokenizer(folder: Path) -> Path:
    """What a GGUF cannot be without."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(96)))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        "quant.engine=gguf quant.among=[gguf_q4_0,gguf_q8_0] quant.keep=false quant.target_bits=6",
        "quant.among=[w4a16_g32,w8a16_g32] quant.target_bits=8",
        "quant.engine=transformers quant.target_bits=8",
    ],
)
def test_other_engines_have_mixes(tmp_path: Path, weightmill: Any, settings: str) -> None:
    source = with_tokenizer(write_checkpoint(tmp_path / "source"))
    out = tmp_path / "out"
    given = ("quant=auto", *settings.split(), f"model.path={source}", f"output.root={tmp_path}/r", f"output.path={out}")
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    assert len(chosen(out)["tensors"]) == 2
    assert weightmill("verify", f"output.path={out}").status == 0
    if "w4a16" in settings:  # vLLM fuses them
        labels = {name: label for label, names in chosen(out)["tensors"].items() for name in names}
        for layer in (0, 1):
            assert len({labels[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
            assert len({labels[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")}) == 1


def test_experts_of_a_stack_and_fused_layers_are_stored_alike(tmp_path: Path, weightmill: Any) -> None:
    source = write_moe(tmp_path / "moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_experts": 2, "head_dim": 16}))
    out = tmp_path / "out"
    given = (*AUTO, f"model.path={source}", f"output.root={tmp_path}/r", f"output.path={out}", "quant.target_bits=6")
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    by_name = {name: label for label, names in chosen(out)["tensors"].items() for name in names}
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert len({by_name[f"model.layers.0.mlp.experts.{e}.{part}.weight"] for e in (0, 1)}) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("quant.engine=mlx", "give a budget"),
        ("quant.target_bits=4", "engine: missing"),
        ("quant.engine=mlx quant.target_bits=4 quant.target_gb=1", "not both"),
        ("quant.engine=mlx quant.target_bits=1", "cannot be met: the least possible is 2.5"),
        ("quant.engine=mlx quant.target_gb=0.000001", "cannot be met: the least possible is about"),
        ("quant.among=[mlx_int4,nf4] quant.target_bits=4", "nf4 cannot be in an output for mlx, which has mlx_int2"),
        ("quant.among=[w4a16,w8a8] quant.target_bits=4", "it rounds activations too"),
        ("quant.among=[mlx_int4,mlx_int4] quant.target_bits=4", "named twice"),
        ("quant.engine=mlx quant.target_bits=4 quant.calibration=/no/such", "/no/such: not found; give a text file"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(source: Path, weightmill: Any, settings: str, said: str) -> None:
    ran = weightmill("run", "quant=auto", f"model.path={source}", *settings.split())
    assert ran.status == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_users_rules_come_before_the_choice(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    rules = "rules=[{name: down_proj, action: quantize, quant: {bits: 8}}, {role: embedding, action: keep}]"
    ran = weightmill("run", *AUTO, f"model.path={source}", "quant.target_bits=7", rules, f"output.path={out}")
    assert ran.status == 0, ran.err
    names = [name for mine in chosen(out)["tensors"].values() for name in mine]
    assert not [name for name in names if "down_proj" in name or "embed" in name]
    assert bits_of(out) <= 7


def test_a_pattern_matches_its_names_alone() -> None:
    every = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("a", "b")] + ["lm_head.weight"]
    mine = [every[0], every[2], every[22], every[1], "lm_head.weight"]
    found = patterns(mine, every)
    assert [name for name in every if any(re.search(p, name) for p in found)] == sorted(mine, key=every.index)
    assert patterns(every[::2][:12], every) == [r"^model\.layers\.\d+\.a\.weight$"]
