"""Asking an engine's own code about an output before it is written, in a process of its own beside the job.

Models need it of which not all is in a table here, which a test holds against the engine. See `unfamiliar`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loaders.lint.engines.base import Answer, PlannedTensor, Question
from loaders.lint.engines.tables import unfamiliar
from loaders.places import ROOT
from loaders.quantization.scheme import Scheme
from loaders.rules.rule import Decision
from loaders.specs import Slot

__all__ = ["Answer", "Asking", "PlannedTensor", "Question", "engine_of", "question_of", "share_quantized", "unfamiliar"]

SECONDS = 300.0  # how long an engine may take to answer
AT_ONCE = 2  # processes that answer at the same time
BY_LAYOUT = {"mlx": "mlx", "gguf": "ggml", "diffusers": "diffusers"}
BY_FILES = ("mlx", "ggml")  # the engines that go by what lies in the files; the others go by the weights
HF_ENGINES = ("bitsandbytes", "bitnet", "compressed-tensors")
NOT_OF_A_SHARE = ("embedding", "head")  # roles that every engine may keep


def engine_of(layout: str, scheme: Scheme) -> str | None:
    """Return the engine to ask about an output; None if there is none, or nothing is quantized."""
    if scheme.engine == "plain":
        return None
    return BY_LAYOUT.get(layout) or (scheme.engine if layout == "hf" and scheme.engine in HF_ENGINES else None)


def question_of(
    engine: str,
    config: Mapping[str, Any],
    decisions: Sequence[Decision],
    stored: Sequence[Slot],
    architecture: str | None = None,
) -> Question:
    """Return the question about a planned output; `stored` are the tensors of its files."""
    tensors = tuple(PlannedTensor(d.tensor.name, d.tensor.shape, d.action) for d in decisions)
    slots = stored if engine in BY_FILES else ()
    return Question(engine, config, tensors, {s.name: (s.dtype.name, s.shape) for s in slots}, architecture)


def share_quantized(decisions: Sequence[Decision]) -> float:
    """Return the share of the weights in matrices, without embeddings and heads, that is quantized."""
    matrices = [d for d in decisions if len(d.tensor.shape) > 1 and d.tensor.role not in NOT_OF_A_SHARE]
    total = sum(d.tensor.spec.numel for d in matrices)
    return sum(d.tensor.spec.numel for d in matrices if d.action == "quantize") / total if total else 1.0


class Asking:
    """A question that a process of its own is answering. Few run at once, since each takes some hundred MB."""

    _room: ClassVar[threading.BoundedSemaphore] = threading.BoundedSemaphore(AT_ONCE)

    def __init__(self, question: Question, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False
        self._said = Answer(unanswered="stopped")
        self._thread = threading.Thread(target=self._talk, args=(question,), daemon=True)
        self._thread.start()

    def _talk(self, question: Question) -> None:
        with self._room:
            if self._is_stopped:
                return
            self._process = _process()
            # It may have been stopped while the process came into being, when there was none to end.
            if self._is_stopped:
                self._process.kill()
            said = self._answer(self._process, question)
            self._said = self._said if self._is_stopped else said

    def _answer(self, process: subprocess.Popen[str], question: Question) -> Answer:
        try:
            out, err = process.communicate(question.to_json(), timeout=self._seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Answer(unanswered=f"the engine's code took more than {self._seconds:.0f} s")
        if process.returncode:
            last = (err.strip().splitlines() or [f"status {process.returncode}"])[-1]
            return Answer(unanswered=f"the engine's code stopped: {last[:200]}")
        return Answer.from_json(out)

    def wait(self, seconds: float | None = None) -> Answer | None:
        """Return the answer; None if there is none yet after so many seconds."""
        self._thread.join(seconds)
        return None if self._thread.is_alive() else self._said

    def stop(self) -> None:
        """End the process, if it still runs."""
        self._is_stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


def _process() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without -P, the current folder would come first, which may have a `loaders` of its own.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "loaders.lint.engines"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
