"""The gate before the work: the engine's class is asked about models that no table knows, and lint's faults count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.orchestration import engine_check
from loaders.lint.base import fault, warning
from loaders.lint.engines import Answer, Question
from tests.making import LLAMA, llama_tensors, make_source, write_checkpoint

FAULT = fault("its class", "two names are wrong", "fails", "report this")
WARNING = warning("its class", "a name is strange", "leaves it out", "load it once")


class Said:
    """Stands for the process that asks: it answers at once, and keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    def __call__(self, question: Question) -> Said:
        self.asked.append(question)
        return self

    def wait(self, seconds: float | None = None) -> Answer:
        return self.answers[0]

    def stop(self) -> None:
        pass


def asking(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> Said:
    said = Said(Answer(by="somebody", **answer))
    monkeypatch.setattr(engine_check, "Asking", said)
    return said


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A checkpoint of a model type that no table knows."""
    return make_source(tmp_path / "unknown", model_type="nobodys", architectures=["NobodysModel"])


@pytest.mark.quick
def test_a_fault_stops_the_job_before_anything_is_written(
    unknown: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = asking(monkeypatch, findings=(FAULT, WARNING))
    out = tmp_path / "outputs" / "out"
    ran = weightmill("run", f"model.path={unknown}", f"output.path={out}", "tracking=none")
    assert ran.status == 2
    assert "two names are wrong; its class: fails; report this" in ran.err
    assert "lint=warn goes on" in ran.err
    assert not out.parent.exists()
    [question] = said.asked
    assert question.engine == "bitsandbytes"
    assert question.config["quantization_config"]["quant_method"] == "bitsandbytes"
    actions = {tensor.name: tensor.action for tensor in question.tensors}
    assert actions["model.layers.0.mlp.up_proj.weight"] == "quantize"
    assert actions["model.embed_tokens.weight"] == "keep"


@pytest.mark.quick
def test_lint_warn_lets_it_pass_and_the_report_has_it(
    unknown: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(monkeypatch, findings=(FAULT,))
    ran = weightmill("run", f"model.path={unknown}", f"output.path={tmp_path / 'out'}", "lint=warn", "tracking=none")
    assert ran.status == 0, ran.err
    assert "two names are wrong" in ran.err
    report = json.loads((tmp_path / "out" / "weightmill.json").read_text())
    assert "two names are wrong" in [finding["what"] for finding in report["lint"]]


@pytest.mark.quick
def test_a_known_type_is_not_asked_about(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = asking(monkeypatch, findings=(FAULT,))
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "tracking=none").status == 0
    assert weightmill("plan", f"model.path={source}", "check=engine").status == 0
    assert said.asked == []


@pytest.mark.quick
@pytest.mark.parametrize("variant", ["other names", "a layer lacks one"])
def test_a_known_type_is_asked_about_if_no_table_knows_all_of_it(
    variant: str, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = llama_tensors()
    if variant == "other names":
        tensors["model.layers.1.mlp.extra_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
        said_of_it = "no table here names model.layers.#.mlp.extra_proj.weight"
    else:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        said_of_it = "model.layers.1 lacks mlp.up_proj.weight of model.layers.0"
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"]}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    said = asking(monkeypatch, findings=(FAULT,))
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "tracking=none").status == 2
    assert len(said.asked) == 1
    notes = weightmill("plan", f"model.path={source}", "format=json").document["notes"]
    assert any(said_of_it in note for note in notes)


@pytest.mark.quick
def test_nothing_is_asked_of_a_copy(
    unknown: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = asking(monkeypatch, findings=(FAULT,))
    arguments = (f"model.path={unknown}", f"output.path={tmp_path / 'out'}", "quant=none", "tracking=none")
    assert weightmill("run", *arguments).status == 0
    assert said.asked == []


@pytest.mark.quick
def test_a_plan_asks_only_if_it_should(unknown: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = asking(monkeypatch, findings=(FAULT,))
    ran = weightmill("plan", f"model.path={unknown}", "format=json")
    assert ran.status == 0
    assert said.asked == []
    [note] = [note for note in ran.document["notes"] if "check=engine" in note]
    assert "bitsandbytes was not asked" in note
    assert "100% of the weights in matrices" in note
    ran = weightmill("plan", f"model.path={unknown}", "format=json", "check=engine")
    assert ran.status == 1
    assert [finding["what"] for finding in ran.document["findings"]] == ["two names are wrong"]
    assert weightmill("plan", f"model.path={unknown}", "check=engine", "lint=warn").status == 0


@pytest.mark.quick
def test_where_nobody_answers_the_share_is_said(
    unknown: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(monkeypatch, unanswered="transformers is not installed")
    arguments = (f"model.path={unknown}", "tracking=none")
    ran = weightmill("run", *arguments, f"output.path={tmp_path / 'all'}")
    assert ran.status == 0, ran.err
    assert "transformers is not installed; 100% of the weights" in ran.err
    rules = "rules=[{action: keep, name: mlp}]"
    ran = weightmill("run", *arguments, f"output.path={tmp_path / 'few'}", rules)
    assert ran.status == 0, ran.err
    assert "warning: only 33% of the weights" in ran.err


@pytest.mark.quick
def test_a_sweep_refuses_what_the_engine_would_fail_on(
    unknown: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = asking(monkeypatch, findings=(FAULT,))
    ran = weightmill(
        "run", "-m", f"model.path={unknown}", "quant=nf4,fp8_dynamic", f"output.root={tmp_path / 'outputs'}"
    )
    assert ran.status == 2
    assert "two names are wrong" in ran.err
    assert [question.engine for question in said.asked] == ["bitsandbytes", "compressed-tensors"]


@pytest.mark.quick
def test_a_fault_that_the_output_would_inherit_stops_the_job_before_its_work(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    arguments = (f"model.path={source}", f"output.path={tmp_path / 'out'}", "tracking=none")
    ran = weightmill("run", *arguments)
    assert ran.status == 2
    assert "there is no lm_head.weight" in ran.err
    assert weightmill("run", *arguments, "lint=warn").status == 0
    assert "done already" in weightmill("run", *arguments, "lint=warn").out
    ran = weightmill("run", *arguments)  # it was let pass before, and is not now
    assert ran.status == 1
    assert "is there, and does not pass: " in ran.err
    assert "lm_head.weight" in ran.err
    assert "(lint=warn lets it pass)" in ran.err


@pytest.mark.engine
def test_transformers_own_class_is_asked(tmp_path: Path, weightmill: Any) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    source = make_source(tmp_path / "source", **config)
    name = "model.layers.0.self_attn.q_proj.weight"
    rules = f"rules=[{{action: drop, name: {name}}}]"
    ran = weightmill("plan", f"model.path={source}", "quant=nf4", "check=engine", rules, "format=json")
    assert ran.status == 1, ran.err
    assert any("dropped, and parameters of the class: model.layers.#.self_attn.q_proj" in f["what"]
               for f in ran.document["findings"])  # fmt: skip


@pytest.mark.quick
def test_what_an_engine_said_is_said_and_who_was_not_asked(
    unknown: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(monkeypatch)
    arguments = ("plan", f"model.path={unknown}", "check=engine", "format=json")
    [note] = [each for each in weightmill(*arguments, "quant=fp8_dynamic").document["notes"] if "somebody" in each]
    assert note.startswith("somebody would load this output: no fault found (vLLM was not asked); 100%")
    ran = weightmill(*arguments, "quant=nf4")
    [note] = [each for each in ran.document["notes"] if "somebody" in each]
    assert note.startswith("somebody would load this output: no fault found; 100%")
    assert not any("that the engine loads" in each for each in ran.document["warnings"])
    # No code of hqq's can be asked.
    assert any("that the engine loads" in each for each in weightmill(*arguments, "quant=hqq4").document["warnings"])
