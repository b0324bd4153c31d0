"""Asking an output's engine about the plan before anything is written: would its own class load these names?

Only models are asked about of which not all is in a table here. The engine's code runs in a process of its own, so that
a job imports no torch; see `loaders.lint.engines`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jobs.cli.verb import note, show
from jobs.orchestration.preflight import Planned
from jobs.report import result
from loaders.architectures.diffusers import DiffusersClass, class_of
from loaders.architectures.gguf import architecture_of
from loaders.errors import BadSpec
from loaders.layouts.diffusers import is_of_diffusers, parts_of
from loaders.lint import lint_source
from loaders.lint.engines import Answer, Asking, Question, engine_of, question_of, share_quantized, unfamiliar
from loaders.lint.engines.base import FEW
from loaders.rules.rule import Decision
from loaders.storage.json_files import json_object
from loaders.words import counted, model_type_said

SILENT_S = 2.0  # how long a job waits for the answer before it says so


def whom_to_ask(planned: Planned, *, always: bool = False) -> tuple[str | None, str | None]:
    """Return the engine to ask about a plan, and what no table here knows of its model.

    The engine is None if there is none, or a table knows all of the model (but `always`).
    """
    checkpoint, made = planned.plan.checkpoint, planned.target
    why = why_ask(planned)
    if planned.done is not None or not (made.config or checkpoint.config) or not (always or why is not None):
        return None, why
    return engine_of(made.target.layout.name, made.target.scheme), why


def why_ask(planned: Planned) -> str | None:
    """Return what no table here knows of a plan's model; None if all of it is known."""
    family, made = planned.plan.checkpoint.family, planned.target
    if is_of_diffusers(planned.plan.checkpoint):
        return next((f"{part}: not known here" for part in _parts(planned, is_known=False)), None)
    # A GGUF that stays one has llama.cpp's own names; layers that config.json does not count are no part of the model.
    names = [d.tensor.name for d in made.decisions if d.action != "drop" or d.rule.label]
    return unfamiliar(family, () if made.target.container.name == "gguf" else names)


def question_about(planned: Planned, engine: str) -> Question:
    """Return the question about a plan."""
    made = planned.target
    if is_of_diffusers(planned.plan.checkpoint):
        configs = _parts(planned, is_known=False) or _parts(planned, is_known=True)
        return question_of(engine, configs, [d for prefix in configs for d in _of_part(made.decisions, prefix)], ())
    config = planned.plan.checkpoint.config if made.config is None else made.config
    slots = [slot for file in made.finals for slot in file.slots]
    architecture = architecture_of(config).name if engine == "ggml" else None
    return question_of(engine, config, made.decisions, slots, architecture)


def _parts(planned: Planned, *, is_known: bool) -> dict[str, Mapping[str, Any]]:
    """Return the planned config.json of each quantized component of diffusers, by its prefix.

    Without `is_known`, only of those that no table here knows.
    """
    made, found = planned.target, dict[str, Mapping[str, Any]]()
    for prefix, part in parts_of(planned.plan.checkpoint).items():
        mine, name = _of_part(made.decisions, prefix), class_of(part.config)
        if not part.config or not any(decision.action == "quantize" for decision in mine):
            continue
        names = [decision.tensor.name.removeprefix(prefix) for decision in mine]
        is_listed = unfamiliar(part.family, names) is None if name is None else DiffusersClass(name).is_known
        if is_known or not is_listed:
            written = made.made.get(f"{prefix}config.json")
            config = made.config if written is None else json_object(written, f"{prefix}config.json")
            found[prefix] = config or part.config
    return found


def _of_part(decisions: Sequence[Decision], prefix: str) -> list[Decision]:
    return [decision for decision in decisions if decision.tensor.name.startswith(prefix)]


@contextmanager
def asking(jobs: Sequence[Planned]) -> Iterator[list[Asked]]:
    """Ask about all jobs at once within the block; what still runs at its end is stopped."""
    asked = [Asked(planned) for planned in jobs]
    try:
        yield asked
    finally:
        for each in asked:
            each.stop()


class Asked:
    """A plan about which its engine is being asked, if it needs to be."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        engine, _ = whom_to_ask(planned)
        self._asking = None if engine is None else Asking(question_about(planned, engine))

    def answer(self) -> Answer | None:
        """Wait for the answer; None if nothing was asked."""
        if self._asking is None:
            return None
        said = self._asking.wait(SILENT_S)
        if said is None:
            note("waiting for the engine's own code, which says whether it would load this output")
            said = self._asking.wait()
        return said

    def settled(self) -> Planned:
        """Return the plan with what was found. What is no fault, or is to be let pass, is shown.

        Raises:
            BadSpec: the engine would fail, or compute something else, and lint=warn was not asked for.
        """
        if self.planned.spec.lint == "fail" and self.planned.done is None:
            _check_source(self.planned)
        answer = self.answer()
        if answer is None:
            return self.planned
        if answer.unanswered:
            note(unanswered(self.planned, answer))
        if answer.faults and self.planned.spec.lint == "fail":
            raise BadSpec(problems(answer))
        if answer.findings:
            show(result.findings_text(answer.findings))
        return replace(self.planned, findings=answer.findings)

    def stop(self) -> None:
        if self._asking is not None:
            self._asking.stop()


def _check_source(planned: Planned) -> None:
    """Check that the source has no fault that its output would have, too; lint would find it when all is written.

    Raises:
        BadSpec: it has.
    """
    checkpoint, sources = planned.plan.checkpoint, planned.plan.sources
    # Shapes of packed weights that are copied as they are stored say nothing of the model's sizes.
    is_copied = checkpoint.quantized_by is not None and all(tensor.decode is None for tensor in sources.tensors)
    if planned.target.target.container.name == "gguf" or is_copied:
        return
    found = lint_source(checkpoint, sources)
    faults = [f"model.path: {f.what}; {f.engine}: {f.happens}; {f.remedy}" for f in found if f.is_fatal]
    if faults:
        raise BadSpec([*faults[:-1], f"{faults[-1]} (so would the output be; lint=warn goes on all the same)"])


def asked_for(planned: Planned, *, is_wanted: bool) -> tuple[Answer, list[str]]:
    """Ask about a plan if that is wanted; returns the answer, and what a plan notes about it."""
    (engine, why), about = whom_to_ask(planned), _about(planned.plan.checkpoint.config)
    if engine is None:
        reason = f"{about} is known here" if why is None else "there is none to ask"
        return Answer(), [f"no engine was asked: {reason}"] if is_wanted else []
    if not is_wanted:
        return Answer(), [
            f"{about}: {why}; {engine} was not asked whether it loads this output: add check=engine; run"
            f" always asks; {share(planned)}"
        ]
    with asking([planned]) as [each]:
        answer = each.answer() or Answer()
    if answer.unanswered:
        return answer, [unanswered(planned, answer)]
    return answer, [f"{verdict(planned, answer)}; {share(planned)}"]


def _about(config: Mapping[str, Any]) -> str:
    return class_of(config) or model_type_said(config)


def problems(answer: Answer) -> list[str]:
    """Return the faults as problems of a request, a line each."""
    faults = [f"{f.what}; {f.engine}: {f.happens}; {f.remedy}" for f in answer.faults]
    return [*faults[:-1], f"{faults[-1]} (so says {answer.by}; lint=warn goes on all the same)"]


def verdict(planned: Planned, answer: Answer) -> str:
    """Say what an engine that was asked makes of a plan."""
    # vLLM loads what is written for compressed-tensors, too, and has no class that could be built without a GPU.
    other = " (vLLM was not asked)" if planned.target.target.scheme.engine == "compressed-tensors" else ""
    if answer.faults:
        return f"{answer.by} would not load this output right: {counted(len(answer.faults), 'fault')}{other}"
    return f"{answer.by} would load this output: no fault found{other}"


def unanswered(planned: Planned, answer: Answer) -> str:
    """Say that nobody could be asked, and what can be said without: how much of the model is quantized."""
    return (
        f"the engine's own code could not be asked about this output: {answer.unanswered}; {share(planned)}; check that"
        " the engine loads it"
    )


def share(planned: Planned) -> str:
    """Say how much of a model is quantized, with a warning if it is little."""
    decisions: Sequence[Decision] = planned.target.decisions
    if planned.plan.checkpoint.components:  # what is passed through is not to be quantized
        decisions = [d for prefix in _parts(planned, is_known=True) for d in _of_part(decisions, prefix)]
    found = share_quantized(decisions)
    said = f"{found:.0%} of the weights in matrices other than embeddings and heads are quantized"
    return said if found >= FEW else f"warning: only {said}: see what is kept, and why"
