"""Lint's findings and the warnings of a plan are one list: what a plan warns of is said of the output, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.lint import lint_at
from tests.making import write_checkpoint


def warnings_of(weightmill: Any, *arguments: str) -> list[str]:
    planned = weightmill("plan", *arguments, "format=json")
    assert planned.status == 0, planned.err
    found: list[str] = planned.document["warnings"]
    return found


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("mxfp4a16", "FP4 in a float32 model: transformers decompresses to bfloat16"),
        ("nvfp4a16", "FP4 in a float32 model: transformers decompresses to bfloat16"),
        ("w4a16_asym", "layers have zero points (W4A16_ASYM): transformers 5 stops at them"),
    ],
)
def test_what_a_plan_warns_of_lint_finds(quant: str, said: str, weightmill: Any) -> None:
    assert weightmill("run", "quant=none", "quant.dtype=float32", "output.path=wide").status == 0
    given = ["model.path=wide", f"quant={quant}", "output.path=out"]
    assert any(warning.startswith(said) for warning in warnings_of(weightmill, *given))
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    [finding] = lint_at("out")
    assert finding.warning.startswith(said)
    linted = weightmill("lint", "out")
    assert linted.status == 0
    assert "no findings" not in linted.out
    assert finding.remedy in linted.out
    assert finding.remedy in ran.out
    # Said once, though the plan's warning is in the report as well.
    assert linted.out.count(f"warning: {said[:12]}") == 1
    # It is the files that say so, not the report.
    Path("out/weightmill.json").unlink()
    assert [each.what for each in lint_at("out")] == [finding.what]


def test_what_only_the_plan_knew_is_shown_beside_the_findings(weightmill: Any, tmp_path: Path) -> None:
    """A warning that the files alone do not show comes from the output's report."""
    source = write_checkpoint(tmp_path / "odd")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "neverheard"}))
    given = [f"model.path={source}", "quant=nf4", "output.path=out"]
    known = [warning for warning in warnings_of(weightmill, *given) if "is not known" in warning]
    assert known
    assert weightmill("run", *given).status == 0
    linted = weightmill("lint", "out")
    assert f"warning: {known[0][:40]}" in linted.out
    assert known[0] in weightmill("lint", "out", "format=json").document["warnings"]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_where_mlx_lm_takes_the_same_theta_nothing_is_wrong(theta: float, weightmill: Any) -> None:
    """mlx-lm's own conversion has rope_theta in rope_parameters alone, and llama's class takes 10000 without it."""
    assert weightmill("run", "quant=mlx_int4", "output.path=out").status == 0
    path = Path("out/config.json")
    config = json.loads(path.read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    path.write_text(json.dumps(config))
    found = [finding.happens for finding in lint_at("out")]
    assert found == ([] if theta == 10000.0 else ["silently uses 10000 where the model has 500000.0"])


def test_what_mlx_lm_itself_makes_of_the_demo_has_no_fault(tmp_path: Path) -> None:
    convert = pytest.importorskip("mlx_lm.convert", reason="the engine is not installed")
    from loaders.places import DEMO

    convert.convert(str(DEMO), str(tmp_path / "theirs"), quantize=True)
    assert lint_at(tmp_path / "theirs") == []


def test_a_source_without_a_tokenizer_is_not_told_to_copy_its_own(source: Path, weightmill: Any) -> None:
    """The source lacks it, too: whatever lacks a file is told where such files are published."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    edited = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**edited, "vocab_size": edited.get("vocab_size", 64)}))
    ran = weightmill("run", f"model.path={source}", "output.path=out", "quant=nf4")
    assert ran.status == 0, ran.err
    for folder in (source, Path("out")):
        found = [finding for finding in lint_at(folder) if "there is no tokenizer" in finding.what]
        assert [finding.remedy for finding in found] == [
            "add the tokenizer's files, from where the model was published"
        ]
    assert "from the source" not in ran.out


@pytest.mark.parametrize("lost", ["config.json", "model_type", "code"])
def test_no_remedy_is_to_copy_from_what_may_lack_it(lost: str, source: Path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    if lost == "config.json":
        path.unlink()
    elif lost == "model_type":
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "model_type"}))
    else:
        path.write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    remedies = [finding.remedy for finding in lint_at(source)]
    assert any("from where the model was published" in remedy for remedy in remedies)
    assert not any("the source" in remedy for remedy in remedies)
