"""verify=logits: the logits of a job's output, compared with those of its original before the output is published.

Whatever can be wrong is found while planning: the text, the tokenizer, the engines, the free space. The original's
logits are kept in a folder next to the outputs, so that jobs of one source evaluate it once; `jobs.clean delete=true`
removes them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli.progress import Meter
from jobs.cli.verb import note
from jobs.output.journal import LOGITS
from jobs.planning.plan import Plan, TargetPlan
from jobs.report.tables import size
from jobs.spec.job import LogitsSpec
from loaders.architectures.family import text_config
from loaders.backends.machine import total_memory
from loaders.checkpoints.checkpoint import READS_FOLDERS, open_checkpoint
from loaders.errors import BadSpec, StorageError, VerifyFailed, setting
from loaders.storage.address import Address
from loaders.storage.base import Destination, Store
from loaders.storage.hashes import digest, text_digest
from loaders.storage.json_files import json_bytes, json_object
from loaders.storage.local import free_bytes

# These modules import torch, which takes seconds.
if TYPE_CHECKING:
    from loaders.models.evaluating import Reference, Windows
    from loaders.models.quality import Quality
    from loaders.models.runners import Engine

KEPT = "quality.json"


@dataclass(frozen=True)
class Judging:
    """A planned evaluation: the settings, the original, the output's engine, and the folder of the logits."""

    spec: LogitsSpec
    reference: Reference
    engine: Engine
    folder: Path
    logits_bytes: int

    @property
    def note(self) -> str:
        """One line about what will be done, for the plan."""
        windows, length = self.reference.windows.ids.shape
        is_there = self.reference.is_in(self.folder)
        return (
            f"judged by its logits: {windows} windows of {length} tokens of {self.reference.windows.text}, in"
            f" {self.engine.described}; the original's ({size(self.logits_bytes)})"
            f" {'are' if is_there else 'go'} in {self.folder}"
        )


def judging_of(spec: LogitsSpec, plan: Plan, target: TargetPlan, output: Address) -> Judging:
    """Plan the evaluation of an output; its original's logits are kept next to it.

    Raises:
        BadSpec: the text, the tokenizer or the model does not allow an evaluation; an engine is missing, or cannot
            compute with one of the output's tensors on this machine; or the source or the output is not local.
        StorageError: the original's logits do not fit on the disk.
    """
    try:
        return _planned(spec, plan, target, output)
    except BadSpec as error:
        cannot = f"{setting('evaluate')}: "
        said = [f"{p}; or verify=strict, which runs nothing" if p.startswith(cannot) else p for p in error.problems]
        raise BadSpec(said) from None


def _planned(spec: LogitsSpec, plan: Plan, target: TargetPlan, output: Address) -> Judging:
    from importlib import util

    from loaders.models import runners

    if missing := [name for name in ("torch", "transformers", "accelerate") if util.find_spec(name) is None]:
        raise BadSpec(
            f"verify=logits: the original runs in transformers, and {', '.join(missing)} is not installed here:"
            " pip install 'weightmill[models]'"
        )
    from loaders.models.evaluating import Reference

    plan.checkpoint.folder(f"verify=logits: {READS_FOLDERS}")
    if not output.is_local:
        raise BadSpec(f"verify=logits: {READS_FOLDERS}; write {output} into a folder first")
    engine = runners.engine_of(target.target.layout.name, target.config)
    for each, what in ((runners.ORIGINAL, "the original"), (engine, "the output")):
        runners.check_engine(each, spec.device, what)
    quantized = [(d.tensor.spec, d.scheme) for d in target.decisions if d.action == "quantize" and d.scheme is not None]
    runners.check_tensors(engine, spec.device, quantized)
    _check_memory(spec, plan)
    windows = _windows(plan.checkpoint.address, plan.checkpoint.container, spec.text, _changed(spec.text), spec.tokens,
                       spec.window)  # fmt: skip
    reference = Reference(plan.checkpoint, windows, spec.device, spec.dtype)
    words = text_config(plan.checkpoint.config, "vocab_size") or windows.vocabulary
    folder, need = output.parent.path / LOGITS, 4 * windows.tokens * int(words)
    if not reference.is_in(folder) and need > free_bytes(folder):
        raise StorageError(
            f"verify.tokens: the original's logits take {size(need)} in {folder}, {size(free_bytes(folder))} are free"
            " there; take fewer tokens, or make room"
        )
    return Judging(spec, reference, engine, folder, need)


def asked(verify: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the numbers of an evaluation, from its settings: the text by its digest, and no limits."""
    gates = ("allow_nonfinite", "max_relative_error")
    found = {key: value for key, value in verify.items() if key not in gates and not key.startswith(("max_", "min_"))}
    text = found.get("text")
    if isinstance(text, str):
        with suppress(OSError):  # which evaluating it says
            found["text"] = digest(Path(text).read_bytes())
    return found


def _changed(text: str | None) -> int:
    return Path(text).stat().st_mtime_ns if text is not None and Path(text).is_file() else 0


@lru_cache(maxsize=8)
def _windows(where: Address, container: str, text: str | None, changed: int, tokens: int, window: int) -> Windows:
    """Read the windows of a text, once for all jobs of a sweep. `changed`, its mtime, is part of the cache's key."""
    from loaders.models.evaluating import read_windows

    return read_windows(open_checkpoint(where, container), text, tokens=tokens, window=window)


def _check_memory(spec: LogitsSpec, plan: Plan) -> None:
    from loaders.models.runners import ORIGINAL, device_of

    need = plan.parameters * (4 if spec.dtype == "float32" else 2)
    if device_of(ORIGINAL, spec.device) == "cpu" and need > total_memory():
        less = "; verify.dtype=bfloat16 takes half of it" if spec.dtype == "float32" else ""
        raise BadSpec(
            f"verify=logits: the original takes {size(need)} in {spec.dtype}, this machine has"
            f" {size(total_memory())}{less}"
        )


def judged(
    judging: Judging, output: Store, name: str, keep: Destination | None = None, digests: Sequence[str] = ()
) -> Quality:
    """Evaluate an output's files. The result is kept in the journal of `keep`, for files with the same `digests`.

    A job that fails a limit thus need not be evaluated again under a wider one.

    Raises:
        BadCheckpoint: an engine cannot load the original or the output.
        VerifyFailed: the output computes NaN or infinities, or has too few logits.
        StorageError: the disk is full, ...
    """
    from loaders.models.evaluating import judge, kept
    from loaders.models.quality import Quality

    reference = judging.reference
    key = text_digest(" ".join([reference.key, judging.engine.described, *digests]))
    before = None if keep is None else keep.get(KEPT)
    if before is not None:
        found = json_object(before, KEPT)
        if found.get("key") == key:
            return Quality(**{**found["quality"], "kl_by_window": tuple(found["quality"]["kl_by_window"])})
    with kept(judging.folder) as folder:
        done = "its logits are there" if reference.is_in(folder) else "in transformers"
        note(f"evaluating {name} in {judging.engine.described}; the original: {done}")
        with Meter(f"evaluating {name}", 2 * reference.windows.tokens, "tokens") as meter:
            quality = judge(
                reference, open_checkpoint(output, key="output.path"), judging.engine, folder, key=name,
                on_tokens=meter.add,
            )  # fmt: skip
    if keep is not None:
        keep.put(KEPT, json_bytes({"key": key, "quality": quality.to_json()}))
    return quality


def faults_of(spec: LogitsSpec, quality: Mapping[str, Any]) -> list[str]:
    """List the limits that an output's quality exceeds."""
    found = []
    if spec.max_kl is not None and quality["kl"] > spec.max_kl:
        found.append(
            f"KL of the logits is {quality['kl']:.5g} nats a token (95 %: {quality['kl_low']:.5g} to"
            f" {quality['kl_high']:.5g}), above verify.max_kl={spec.max_kl:g}"
        )
    ratio, most = quality["perplexity_ratio"], spec.max_perplexity_ratio
    if most is not None and ratio > most:
        found.append(
            f"perplexity is {ratio:.5g} times the original's (95 %: {quality['perplexity_ratio_low']:.5g} to"
            f" {quality['perplexity_ratio_high']:.5g}), above verify.max_perplexity_ratio={most:g}"
        )
    if spec.min_top1 is not None and quality["top1"] < spec.min_top1:
        found.append(f"top-1 agreement is {quality['top1']:.5g}, below verify.min_top1={spec.min_top1:g}")
    return found


def pass_gate(spec: LogitsSpec, quality: Mapping[str, Any], output: Address) -> None:
    """Check an output's quality.

    Raises:
        VerifyFailed: it exceeds a limit.
    """
    if faults := faults_of(spec, quality):
        raise VerifyFailed(
            f"not published: {'; '.join(faults)}. Its files are kept: a wider limit publishes them as they are,"
            f" python -m jobs.clean {shlex.quote(str(output))} delete=true removes them"
        )
