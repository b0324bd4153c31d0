"""What readers of outputs stumbled over once: each is a promise now."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli.main import completions
from loaders.storage.json_files import read_json
from tests.making import llama_tensors, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent


def test_rules_may_lie_in_a_file_or_span_lines(source: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "# mine\n- {action: keep, name: 'layers\\.0\\.'}\n- {action: drop, role: norm}\n"
    (tmp_path / "mine.yaml").write_text(rules)
    planned = weightmill("plan", f"model.path={source}", f"rules={tmp_path / 'mine.yaml'}", "format=json").document
    actions = {row["name"]: row["action"] for row in planned["tensors"]}
    assert actions["model.layers.0.mlp.up_proj.weight"] == "keep"
    assert actions["model.norm.weight"] == "drop"
    lines = "rules=[\n  {action: keep,\n   name: 'layers\\.0\\.'}]"
    assert weightmill("plan", f"model.path={source}", lines).status == 0
    (tmp_path / "mine.yaml").write_text("action: keep")
    ran = weightmill("plan", f"model.path={source}", f"rules={tmp_path / 'mine.yaml'}")
    assert ran.status == 2
    assert "expected a list of rules" in ran.err


def test_overwriting_never_removes_what_weightmill_did_not_write(source: Path, tmp_path: Path, weightmill: Any) -> None:
    arguments = (f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert weightmill("run", *arguments).status == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    ran = weightmill("run", *arguments, "output.overwrite=true")
    assert ran.status == 2
    assert "notes.txt" in ran.err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert "notes.txt: weightmill did not write it" in weightmill("verify", f"output.path={tmp_path / 'out'}").out
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out' / 'inner'}")
    assert ran.status == 2
    assert "lies within another output" in ran.err


def test_cleaning_one_output_leaves_others_alone(tmp_path: Path, weightmill: Any) -> None:
    kept, gone = (tmp_path / f".{name}.0123456789ab.weightmill" for name in ("llama-3.1", "llama-3"))
    kept.mkdir()
    gone.mkdir()
    assert weightmill("clean", f"output.path={tmp_path / 'llama-3'}").status == 0
    assert kept.exists()
    assert not gone.exists()


def test_what_is_let_pass_is_said(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"].data[0, 0] = np.uint16(0x7FC0)
    source = write_checkpoint(tmp_path / "source", tensors)
    arguments = (f"model.path={source}", "verify.allow_nonfinite=true")
    document = weightmill("run", *arguments, f"output.path={tmp_path / 'a'}", "format=json").document
    assert any("1 weights are NaN or infinite in the source, and 63 more" in said for said in document["warnings"])
    assert "let pass" in weightmill("run", *arguments, f"output.path={tmp_path / 'b'}").out


def test_a_recorded_error_that_was_edited_is_found(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}").status == 0
    report = read_json(tmp_path / "out" / "weightmill.json")
    report["tensors"][3]["relative_error"] = 0.0123
    (tmp_path / "out" / "weightmill.json").write_text(json.dumps(report))
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert "relative_error in weightmill.json is not what its sums give" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quant=none", "rules=[{action: quantize, name: mlp}]"), "quant=none has no codes"),
        (("rules=[{action: cast, name: mlp}]",), "cast_to is missing"),
        (("quant=nf4", "quant.table=fp4"), "give quant=fp4"),
        (("tracking=mlflow", "tracking.uri=foo:bar"), "tracking.uri: expected a store"),
    ],
)
def test_a_wrong_request_is_refused_in_its_own_words(
    arguments: tuple[str, ...], said: str, source: Path, weightmill: Any
) -> None:
    ran = weightmill("run", f"model.path={source}", *arguments)
    assert ran.status == 2
    assert said in ran.err


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


def test_a_sweep_names_its_jobs_sums_up_and_leaves_no_folder(tmp_path: Path, source: Path, weightmill: Any) -> None:
    ran = weightmill("run", "-m", f"model.path={source}", f"output.root={tmp_path / 'o'}", "quant=nf4,ternary")
    assert ran.status == 0, ran.err
    assert "2 jobs:" in ran.out
    assert not (tmp_path / "o" / ".sweeps").exists()


def test_diff_names_the_side_that_is_missing(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("diff", source, tmp_path / "none")
    assert ran.status == 2
    assert "b: expected a folder" in ran.err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("weightmill  ru", ["run"]),
        ("weightmill run quant=nf4 quant.do", ["quant.double_quant="]),
        ("weightmill run quant.double_quant=t", ["quant.double_quant=true"]),
        ("weightmill run format=", ["format=text", "format=json"]),
        ("weightmill completion ", ["bash", "zsh"]),
        ("weightmill run quant=nf4,in", ["quant=nf4,int8"]),
    ],
)
def test_completion(line: str, wanted: list[str]) -> None:
    assert completions(line) == wanted


def test_completion_in_bash() -> None:
    """The script itself: the word under the cursor, not the line, decides what is cut at an equals sign."""
    from jobs.cli.main import SCRIPT, SHELLS

    script = SCRIPT.format(load=SHELLS["bash"]) + (
        f'weightmill() {{ "{sys.executable}" -m jobs.cli.main "$@"; }}\n'
        'for COMP_LINE in "weightmill run quant=nf4 quant.do" "weightmill run quant=in"; do\n'
        "COMP_POINT=${#COMP_LINE}; _weightmill; echo ${COMPREPLY[@]}; done\n"
    )
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["quant.double_quant=", "int8"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f'"{sys.executable}" -m jobs.cli.main run --help | head -n 1'
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in ran.stderr
