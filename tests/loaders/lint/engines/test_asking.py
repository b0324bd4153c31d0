"""Engines asked in a process of their own, and what answers without torch."""

from __future__ import annotations

import pytest

from loaders.lint.base import fault
from loaders.lint.engines import Answer, Asking, PlannedTensor, Question
from loaders.lint.engines.base import Unanswerable, patterns
from loaders.lint.engines.gguf import check as check_gguf

QUESTION = Question("bitsandbytes", {"model_type": "nobody"}, (PlannedTensor("a.weight", (2, 3), "quantize"),),
                    {"a.weight": ("U8", (3, 1))}, "llama")  # fmt: skip


@pytest.mark.quick
def test_questions_and_answers_travel_as_json() -> None:
    assert Question.from_json(QUESTION.to_json()) == QUESTION
    answer = Answer("asked", (fault("it", "what", "then", "do"),), "", (4, 3))
    assert Answer.from_json(answer.to_json()) == answer
    assert answer.share == 0.75


@pytest.mark.quick
def test_many_names_are_few_patterns() -> None:
    names = [f"layers.{layer}.{part}.weight" for part in "abcdef" for layer in range(3)]
    assert patterns(names) == (
        "layers.#.a.weight (3), layers.#.b.weight (3), layers.#.c.weight (3), layers.#.d.weight (3) and 2 more"
    )


@pytest.mark.engine
def test_who_cannot_answer_says_why() -> None:
    pytest.importorskip("transformers")
    answer = Asking(QUESTION).wait()
    assert answer is not None
    assert "no class of its own for model_type 'nobody'" in answer.unanswered
    assert answer.findings == ()


def test_an_endless_answer_is_not_waited_for() -> None:
    pytest.importorskip("transformers")
    endless = Question("bitsandbytes", {"model_type": "llama", "num_hidden_layers": 10**9}, ())
    answer = Asking(endless, seconds=1).wait()
    assert answer is not None
    assert answer.unanswered == "the engine's code took more than 1 s"


def test_what_is_stopped_does_not_answer() -> None:
    asking = Asking(QUESTION)
    asking.stop()
    answer = asking.wait(60)
    assert answer is not None
    assert answer.unanswered


@pytest.mark.quick
def test_llama_cpp_has_these_tensors_and_no_others() -> None:
    pytest.importorskip("gguf")
    known = [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_q.weight",
        "blk.31.attn_q.bias",
        "rope_freqs.weight",
    ]
    stored = dict.fromkeys(known, ("F32", (4,)))
    assert check_gguf(Question("ggml", {}, (), stored, "llama"), "gguf").findings == ()
    stored |= {"blk.0.ssm_in.weight": ("F32", (4,)), "blk.x.attn_q.weight": ("F32", (4,))}
    [found] = check_gguf(Question("ggml", {}, (), stored, "llama"), "gguf").findings
    assert found.level == "fault"
    assert found.what.endswith("blk.#.ssm_in.weight, blk.x.attn_q.weight")
    with pytest.raises(Unanswerable, match="no architecture 'nobody'"):
        check_gguf(Question("ggml", {}, (), {}, "nobody"), "gguf")
