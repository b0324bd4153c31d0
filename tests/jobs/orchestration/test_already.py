"""The same request twice is done already, alone as in a sweep; another one, or another source, is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.places import DEMO
from tests.making import llama_tensors, make_source, snapshot, write_checkpoint

REPORT = "weightmill.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama in one file, with a tokenizer."""
    return make_source(tmp_path / "model")


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.quick
def test_the_same_request_twice_is_done_already(model: Path, weightmill: Any) -> None:
    ran = weightmill("run", model, "format=json")
    assert (ran.status, ran.document["already"]) == (0, False)
    out = Path(ran.document["output"])
    before = times(out)
    ran = weightmill("run", model)
    assert ran.status == 0
    assert "done already: the same request made it from the same source" in ran.out
    assert f"output: {out}" in ran.out
    again = weightmill("run", model, "format=json").document
    assert again["already"] is True
    assert again["run"] == json.loads((out / REPORT).read_text())["run"]
    [job] = weightmill("run", "-m", model, "quant=nf4", "format=json").document["jobs"]
    assert (job["already"], job["output"]) == (True, str(out))
    assert times(out) == before
    planned = weightmill("plan", model)
    assert planned.status == 0
    assert "done already: the output is there" in planned.out
    assert weightmill("plan", model, "format=json").document["already"] is True


@pytest.mark.parametrize("many", [(), ("-m",)])
def test_an_empty_journal_that_a_kill_left_goes(model: Path, weightmill: Any, many: tuple[str, ...]) -> None:
    made = weightmill("run", model, "format=json").document
    out = Path(made["output"])
    empty, other = (out.parent / f".{out.name}.{key}.weightmill" for key in (made["run"]["key"][:12], "0" * 12))
    for journal in (empty, other):
        journal.mkdir()
    assert weightmill("run", *many, model).status == 0
    assert not empty.exists()
    assert other.exists()
    (other / "job.json").touch()
    other.rename(empty)
    assert weightmill("run", *many, model).status == 0
    assert empty.exists()


def test_a_single_run_takes_what_a_sweep_made_and_the_other_way_round(model: Path, weightmill: Any) -> None:
    swept = weightmill("run", "-m", model, "quant=nf4", "quant.group_size=128,256", "format=json")
    assert [job["already"] for job in swept.document["jobs"]] == [False, False]
    assert weightmill("run", model, "quant.group_size=128", "format=json").document["already"] is True
    assert weightmill("run", model, "quant=fp4", "format=json").document["already"] is False
    swept = weightmill("run", "-m", model, "quant=nf4,fp4", "format=json")
    assert [job["already"] for job in swept.document["jobs"]] == [False, True]


def test_where_it_runs_and_is_tracked_is_another_matter(model: Path, weightmill: Any) -> None:
    assert weightmill("run", model).status == 0
    others = ("cluster.threads=1", "strategy=read", "lint=warn", "objective=[error/worst]", "backend=auto")
    assert weightmill("run", model, *others, "format=json").document["already"] is True


OTHERS = {
    "quant.storage_dtype=bfloat16": "quant.storage_dtype was uint8, now bfloat16",
    "quant=fp4": "quant was nf4, now fp4",
    "unit_mb=5": "unit_mb was 1000, now 5",
    "output.card=false": "output.card was true, now false",
    "rules=[{name: lm_head, action: keep}]": "rules were others",
    "model.name=other": "model.name was null, now other",
}


@pytest.mark.parametrize("setting", OTHERS)
def test_another_request_at_the_same_place_is_refused_with_what_differs(
    setting: str, model: Path, tmp_path: Path, weightmill: Any
) -> None:
    given = (model, f"output.path={tmp_path / 'out'}")
    assert weightmill("run", *given).status == 0
    before = snapshot(tmp_path / "out")
    for verb in ("run", "plan"):
        ran = weightmill(verb, *given, setting)
        assert ran.status == 2
        assert f"exists, made by another request: {OTHERS[setting]}; output.overwrite=true replaces it" in ran.err
    assert snapshot(tmp_path / "out") == before
    ran = weightmill("run", *given, setting, "output.overwrite=true", "format=json")
    assert (ran.status, ran.document["already"]) == (0, False)


# --- the source


def retrained(model: Path) -> str:
    """Other weights of the same shapes: a file of the same size."""
    size = (model / "model.safetensors").stat().st_size
    write_checkpoint(model / "new", llama_tensors(seed=7))
    shutil.move(model / "new" / "model.safetensors", model / "model.safetensors")
    shutil.rmtree(model / "new")
    assert (model / "model.safetensors").stat().st_size == size
    return "model.safetensors was written anew since"


def touched(model: Path) -> str:
    os.utime(model / "model.safetensors")
    return "model.safetensors was written anew since"


def other_tokenizer(model: Path) -> str:
    path = model / "tokenizer_config.json"
    text = path.read_text()
    path.write_text(text.replace("{", "{ ", 1))
    return f"tokenizer_config.json had {len(text)} bytes, now {len(text) + 1}"


def other_config(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    return "config.json had "


def one_more_file(model: Path) -> str:
    (model / "extra.txt").write_text("x")
    return "extra.txt is new"


def one_file_less(model: Path) -> str:
    (model / "tokenizer_config.json").unlink()
    return "tokenizer_config.json is gone"


CHANGES = (retrained, touched, other_tokenizer, other_config, one_more_file, one_file_less)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_source_is_not_the_same_request(change: Callable[[Path], str], tmp_path: Path, weightmill: Any) -> None:
    model = write_checkpoint(tmp_path / "model", llama_tensors(seed=1))
    (model / "tokenizer_config.json").write_text("{}")
    assert weightmill("run", model).status == 0
    said = change(model)
    for arguments in ([model], ["-m", model, "quant=nf4,fp4"]):
        ran = weightmill("run", *arguments)
        assert ran.status == 2
        assert f"exists, made from another version of the source: {said}" in ran.err
        assert "output.overwrite=true replaces it" in ran.err
    ran = weightmill("run", "-m", model, "quant=nf4,fp4", "output.overwrite=true", "format=json")
    assert [job["already"] for job in ran.document["jobs"]] == [False, False]
    assert weightmill("verify", ran.document["jobs"][0]["output"]).status == 0


def test_files_without_weights_are_the_same_by_their_hashes(model: Path, weightmill: Any) -> None:
    assert weightmill("run", model).status == 0
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            os.utime(path)
    assert weightmill("run", model, "format=json").document["already"] is True


# --- the output


def gone(out: Path) -> str:
    (out / "model.safetensors").unlink()
    return "model.safetensors is gone"


def cut(out: Path) -> str:
    size = (out / "model.safetensors").stat().st_size
    os.truncate(out / "model.safetensors", size - 1)
    return f"model.safetensors has {size - 1} bytes, {size} were written"


def cut_tokenizer(out: Path) -> str:
    size = (out / "tokenizer.json").stat().st_size
    os.truncate(out / "tokenizer.json", 1)
    return f"tokenizer.json has 1 bytes, {size} were written"


def no_card(out: Path) -> str:
    (out / "README.md").unlink()
    return "README.md is gone"


@pytest.mark.parametrize("harm", [gone, cut, cut_tokenizer, no_card], ids=lambda harm: harm.__name__)
def test_an_output_that_is_not_whole_is_not_done(harm: Callable[[Path], str], model: Path, weightmill: Any) -> None:
    out = Path(weightmill("run", model, "format=json").document["output"])
    said = harm(out)
    ran = weightmill("run", model)
    assert ran.status == 2
    assert f"exists, no longer whole: {said}; output.overwrite=true replaces it" in ran.err
    [job] = weightmill("run", "-m", model, "quant=nf4", "output.overwrite=true", "format=json").document["jobs"]
    assert job["already"] is False
    assert weightmill("verify", out).status == 0


def test_a_card_may_be_edited(model: Path, weightmill: Any) -> None:
    out = Path(weightmill("run", model, "format=json").document["output"])
    with (out / "README.md").open("a") as file:
        file.write("More about it.\n")
    assert weightmill("run", model, "format=json").document["already"] is True


def test_overwriting_is_never_advised_to_who_asked_for_it(model: Path, weightmill: Any) -> None:
    out = Path(weightmill("run", model, "format=json").document["output"])
    ran = weightmill("run", model, "output.overwrite=true", "format=json")
    assert (ran.status, ran.document["already"]) == (0, False)
    (out / "notes.txt").write_text("mine")
    (out.parent / "other").mkdir()
    (out.parent / "other" / "thesis.tex").write_text("mine")
    for place in (out, out.parent / "other"):
        for verb in ("run", "plan"):
            ran = weightmill(verb, model, f"output.path={place}", "output.overwrite=true")
            assert ran.status == 2
            assert "output.overwrite=true replaces it" not in ran.err


def test_a_report_that_is_none_does_not_pass(model: Path, weightmill: Any) -> None:
    out = Path(weightmill("run", model, "format=json").document["output"])
    report = json.loads((out / REPORT).read_text())
    report["run"]["xxh3"] = ""
    for change in ({"job": {}}, {"job": {**report["job"], "verify": []}}, {"quality": {"asked": 1}}):
        (out / REPORT).write_text(json.dumps({**report, **change}))
        for setting in ("verify.max_relative_error=0.5", "verify=logits"):
            ran = weightmill("run", model, setting)
            assert ran.status in (0, 1, 2)
            assert "Traceback" not in ran.err
    (out / REPORT).write_text(json.dumps({**report, "format": 1}))
    ran = weightmill("run", model)
    assert ran.status == 2
    assert "is of format 1, this weightmill reads" in ran.err


# --- what it must pass


def test_limits_are_held_against_the_report(model: Path, weightmill: Any) -> None:
    assert weightmill("run", model).status == 0
    assert weightmill("run", model, "verify.max_relative_error=0.5", "format=json").document["already"] is True
    for arguments in ([model, "quant=nf4"], ["-m", model, "quant=nf4"]):
        ran = weightmill("run", *arguments, "verify.max_relative_error=0.001")
        assert ran.status == 1
        assert "is there, and does not pass: model.layers." in ran.err + ran.out
        assert "at most 0.001 allowed" in ran.err + ran.out


def test_a_mix_is_known_by_its_budget_and_need_not_be_measured_again(model: Path, weightmill: Any) -> None:
    given = (model, "quant=auto", "quant.engine=mlx")
    ran = weightmill("run", *given, "quant.target_bits=6", "format=json")
    assert ran.document["output"].endswith("/outputs/model-auto-mlx-6bits"), ran.err
    shutil.rmtree("outputs/.measured")
    for verb in ("run", "plan"):
        assert weightmill(verb, *given, "quant.target_bits=6", "format=json").document["already"] is True
    assert not Path("outputs/.measured").exists()
    ran = weightmill("run", *given, "quant.target_bits=7", "format=json")
    assert ran.document["output"].endswith("/outputs/model-auto-mlx-7bits"), ran.err


# --- judging


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
def test_what_only_lacks_its_judging_is_only_judged(weightmill: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    logits = ("verify=logits", "verify.tokens=96", "verify.window=32", f"verify.text={text}")
    out = Path(weightmill("run", DEMO, "format=json").document["output"])
    weights = times(out)[out / "model.safetensors"]
    ran = weightmill("run", DEMO, *logits, "format=json")
    assert (ran.status, ran.document["already"]) == (0, True), ran.err
    kl = ran.document["quality"]["kl"]
    assert json.loads((out / REPORT).read_text())["quality"]["kl"] == kl > 0
    before = times(out)
    assert before[out / "model.safetensors"] == weights

    again = weightmill("run", "-m", DEMO, "quant=nf4,fp4", *logits, "output.overwrite=true", "format=json")
    assert again.status == 0, again.err
    assert [job["already"] for job in again.document["jobs"]] == [True, False]
    assert times(out) == before
    ran = weightmill("run", DEMO, *logits, "verify.max_kl=1e-9")
    assert ran.status == 1
    assert "is there, and does not pass: KL of the logits is" in ran.err
    text.write_text("Another text, of which nobody has heard, is to be read. " * 40)
    other = weightmill("run", DEMO, *logits, "format=json").document["quality"]
    assert other["kl"] != kl
    assert weightmill("verify", out).status == 0
