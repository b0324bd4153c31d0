"""Plans of real published layouts, held against the engines' own code: what is right, refused, wrong.

    python -m tests.judge                         every layout of tests/headers, every quant below
    python -m tests.judge gpt2 qwen3-8b           these layouts
    python -m tests.judge quants=nf4,mlx_int4     these quants
    python -m tests.judge --write                 and write the table in docs/tested.md
    python -m tests.judge --whole                 with all experts of large mixtures, of which else eight are judged

A plan is judged by what `weightmill run` asks before it writes (loaders/lint/engines). No weight is read: a layout is a
JSON document (see tests/header_checkpoints.py), and a new one is judged as soon as it lies in tests/headers. Types in
a GGUF are judged by llama.cpp's own dry run, if llama_cpp is installed; its names always. The exit status is 1 if
anything is wrong. On two cores all of it takes some minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tests import llama_dry_run
from tests.header_checkpoints import HEADERS, entries, make, tensors_of, with_few_experts
from tests.making import tokenizer

ENGINES = {
    "bitsandbytes": ("nf4",),
    "compressed-tensors": ("fp8_dynamic", "w4a16", "nvfp4a16"),
    "MLX": ("mlx_int4",),
    "GGUF": ("gguf_q4_k_m",),
}
QUANTS = tuple(quant for quants in ENGINES.values() for quant in quants)
GOAL = 0.95  # of the weights that an engine's published recipe quantizes
NONE = "no model_type"
LONGEST = 300  # characters of a reason; more end at a word
FEW_EXPERTS = 8  # as many as Mixtral has, for which llama.cpp has rules of its own


@dataclass(frozen=True)
class Verdict:
    """What one plan is worth. `share` is of the weights that the engine's recipe quantizes, `stays` says why so few."""

    verdict: Literal["right", "wrong", "refused", "not judged"]
    why: tuple[str, ...] = ()
    share: float = 1.0
    stays: str = ""


Verdicts = dict[str, dict[str, Verdict]]  # by layout and quant


# --- judging


def judge(name: str, quants: Sequence[str], root: Path, *, is_whole: bool = False) -> dict[str, Verdict]:
    """Judge one layout."""
    from loaders.checkpoints.checkpoint import open_checkpoint

    folder = root / name
    make(layout(name, is_whole=is_whole), folder)
    # Headers have no tokenizer, without which nothing is planned for llama.cpp.
    found = tokenizer(96)
    if str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("gemma4"):
        found["model"]["byte_fallback"] = True  # by which llama.cpp's converter knows Gemma 4's
    (folder / "tokenizer.json").write_text(json.dumps(found))
    opened = cache(open_checkpoint)
    try:
        return {quant: _judged(folder, quant, opened) for quant in quants}
    finally:
        shutil.rmtree(folder)


def layout(name: str, *, is_whole: bool) -> dict[str, Any]:
    entry = json.loads((HEADERS / f"{name}.json").read_text())
    return entry if is_whole else with_few_experts(entry, FEW_EXPERTS)


def _judged(folder: Path, quant: str, opened: Any) -> Verdict:
    from loaders.errors import WeightmillError

    try:
        planned = _plan(folder, quant, opened)
    except WeightmillError as error:
        problems = getattr(error, "problems", (str(error),))
        return Verdict("refused", (reason(problems[0], folder),))
    except Exception as error:  # a crash of ours is a verdict, too
        return Verdict("wrong", (f"crash: {type(error).__name__}: {str(error)[:200]}",))
    found = asked(planned)
    if found.verdict == "right" and quant in llama_dry_run.FILE_TYPES and llama_dry_run.is_there():
        return _by_types(planned, quant, _plan(folder, "gguf_bf16", opened), folder, found)
    return found


def _plan(folder: Path, quant: str, opened: Any) -> Any:
    from jobs.cli.compose import compose, take_apart
    from jobs.orchestration.preflight import plan_job
    from jobs.spec.job import JobSpec
    from jobs.spec.keys import KEYS
    from loaders.errors import settings_called

    given = [f"model.path={folder}", f"quant={quant}", f"output.path={folder}-{quant}", "tracking=none"]
    with settings_called(KEYS):
        return plan_job(compose("run", JobSpec, take_apart("run", JobSpec, given)), opened)


def asked(planned: Any) -> Verdict:
    """Ask the engine's code, in this process."""
    from jobs.orchestration.engine_check import question_about, whom_to_ask
    from loaders.lint.engines.__main__ import answer_of

    engine, _ = whom_to_ask(planned, always=True)
    if engine is None:
        return Verdict("not judged", ("no engine is asked about this",))
    answer = answer_of(question_about(planned, engine))
    if answer.unanswered:
        return Verdict("not judged", (reason(re.sub(r"(?<=\w) \d+(?:\.\d+)+", "", answer.unanswered), Path("/")),))
    faults = tuple(finding.what for finding in answer.faults)
    decisions = planned.target.decisions
    stays = next((d.rule.why for d in decisions if d.tensor.name == answer.left), "") if answer.share < GOAL else ""
    return Verdict("wrong" if faults else "right", faults, answer.share, stays)


def _by_types(planned: Any, quant: str, floats: Any, folder: Path, found: Verdict) -> Verdict:
    """Hold the planned types of a GGUF against those that llama.cpp chooses for the same model."""
    wanted = llama_dry_run.types_of(floats.target, quant, folder)
    made = {slot.name: slot.dtype.name for file in planned.target.finals for slot in file.slots}
    other = [name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name)]
    if not other:
        return found
    first = sorted(other)[0]
    return Verdict("wrong", (f"{len(other)} types, {first} first: {made.get(first)}, llama.cpp {wanted.get(first)}",))


def reason(text: str, folder: Path) -> str:
    """Return why a plan is refused or not judged, in few words that are the same for other models."""
    text = text.replace(str(folder), "it")
    # What is quoted is a model's own; an apostrophe within a word quotes nothing.
    first = re.sub(r"(?<!\w)'[^']*'(?!\w)", "…", text).split(";")[0]
    first = re.sub(r"\b[a-z_]\w*(?:\.\w+)*\.\d+\.[\w.]+", "a weight", first)
    first = re.sub(r"(?:its|their) \d+(?: and \d+)* columns", "the columns", first)
    first = re.sub(r"\d+ tensors \(.* first\):", "some tensors:", first)
    first = first if len(first) <= LONGEST else first[:LONGEST].rpartition(" ")[0] + " …"
    return re.sub(r"^(?:quant|model\.path|output\.layout): ", "", first)


def judge_all(
    names: Sequence[str], quants: Sequence[str], *, is_whole: bool
) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """Judge layouts, the largest first, a process for each core."""
    names = sorted(names, key=lambda name: -len(tensors_of(layout(name, is_whole=is_whole))))
    with tempfile.TemporaryDirectory(prefix="judge-") as root:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            running = {pool.submit(judge, name, quants, Path(root), is_whole=is_whole): name for name in names}
            for done in as_completed(running):
                yield running[done], done.result()


# --- the table in docs/tested.md


def type_of(name: str) -> str:
    return json.loads((HEADERS / f"{name}.json").read_text())["config"].get("model_type") or NONE


class Notes:
    """Reasons under the table, each with a number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers) + 1)

    def lines(self) -> str:
        return "; ".join(f"({number}) {text}" for text, number in self.numbers.items()) + "."


def table(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    """Return the table of model types by engines; types of which the same is true share a row."""
    notes = Notes()
    by_type: dict[str, list[str]] = {}
    for name in verdicts:
        by_type.setdefault(type_of(name), []).append(name)
    rows: dict[tuple[str, ...], list[str]] = {}
    for model_type, names in sorted(by_type.items()):
        of_type = {name: verdicts[name] for name in names}
        cells = tuple(cell(of_type, quants, notes) for quants in ENGINES.values())
        rows.setdefault(cells, []).append(f"`{model_type}`" if model_type != NONE else model_type)
    lines = [f"| model type | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 1) + "|"]
    lines += [f"| {' '.join(types)} | {' | '.join(cells)} |" for cells, types in rows.items()]
    return "\n".join([*lines, "", notes.lines()])


def cell(found: Mapping[str, Mapping[str, Verdict]], quants: Sequence[str], notes: Notes) -> str:
    """Return what is true of a type's layouts in an engine's quants: what most have, and which differ.

    `found` has verdicts by layout and quant. A layout is named where others of its type are not as it is.
    """
    by_said: dict[str, list[tuple[str, str]]] = {}
    for name, verdicts in found.items():
        for quant in quants:
            by_said.setdefault(_said(verdicts[quant], notes), []).append((name, quant))
    if len(by_said) == 1:
        return next(iter(by_said))
    (most, having), *others = sorted(by_said.items(), key=lambda item: -len(item[1]))
    # What most have needs its quants only where no layout has it in the others.
    parts = [most + _in_quants({quant for _, quant in having}, quants)]
    for said, those in others:
        names, of = sorted({name for name, _ in those}), _in_quants({quant for _, quant in those}, quants)
        parts.append(said + of + (f" for {', '.join(names)}" if len(names) < len(found) else ""))
    return "; ".join(parts)


def _in_quants(having: Collection[str], quants: Sequence[str]) -> str:
    return f" in {', '.join(f'`{quant}`' for quant in quants if quant in having)}" if len(having) < len(quants) else ""


def _said(verdict: Verdict, notes: Notes) -> str:
    if verdict.verdict in ("refused", "not judged"):
        return f"{verdict.verdict} ({notes.number(verdict.why[0])})"
    note = f" ({notes.number(reason(verdict.why[0], Path('/')))})" if verdict.verdict == "wrong" else ""
    if verdict.share >= GOAL:
        return verdict.verdict + note
    why = f" ({notes.number(f'what stays most: {verdict.stays}')})" if verdict.stays else ""
    return f"{verdict.verdict}{note}, {verdict.share:.0%} of the recipe{why}"


# --- all


def lines_of(name: str, found: Mapping[str, Verdict]) -> list[str]:
    """Return what there is to say of a layout."""
    said = " ".join(
        f"{quant}:{v.verdict}" + (f"({v.share:.0%})" if v.verdict in ("right", "wrong") and v.share < GOAL else "")
        for quant, v in found.items()
    )
    whys = {why: [q for q, v in found.items() if why in v.why] for v in found.values() for why in v.why}
    return [f"{name:28} {said}", *(f"    {','.join(quants)}: {why}" for why, quants in whys.items())]


def main(arguments: Sequence[str]) -> int:
    names = [each for each in arguments if not each.startswith("-") and "=" not in each] or sorted(entries())
    chosen = [each.removeprefix("quants=").split(",") for each in arguments if each.startswith("quants=")]
    quants = chosen[0] if chosen else QUANTS
    is_written = "--write" in arguments
    verdicts: Verdicts = {}
    for name, found in judge_all(names, quants, is_whole="--whole" in arguments):
        verdicts[name] = found
        print("\n".join(lines_of(name, found)), flush=True)
    for quant in quants:
        counts = [found[quant].verdict for found in verdicts.values()]
        print(quant, {each: counts.count(each) for each in ("right", "wrong", "refused", "not judged")})
    print(f"types in GGUF {'were' if llama_dry_run.is_there() else 'were not'} judged by llama.cpp's dry run")
    if is_written:
        from tests.readme import write_table

        write_table("engines", table({name: verdicts[name] for name in sorted(verdicts)}))
    return int(any(v.verdict == "wrong" for found in verdicts.values() for v in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
