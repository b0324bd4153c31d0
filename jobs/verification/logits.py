"""verify=logits and verify=embeddings: what a job's output computes, compared with its original before it is published.

Compared are the logits of a causal language model, or the last hidden states of any model of text. Whatever can be
wrong is found while planning: the text, the tokenizer, the engines, the free space. The original's numbers are kept in
a folder next to the outputs, so that jobs of one source evaluate it once; `weightmill clean delete=true` removes them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli.program import program
from jobs.cli.progress import Meter
from jobs.cli.verb import note
from jobs.execution.cluster import Cluster
from jobs.output.journal import LOGITS
from jobs.planning.plan import Plan, TargetPlan
from jobs.report.tables import size
from jobs.spec.verify import EmbeddingsSpec, LogitsSpec
from jobs.verification.judging_task import JudgeTask, judged_on
from loaders.architectures.family import text_config
from loaders.backends.machine import total_memory
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint, open_checkpoint
from loaders.errors import BadSpec, StorageError, VerifyFailed, setting, settings_called
from loaders.missing import MissingLibrary, absent, not_installed
from loaders.quantization.scheme import Decoder
from loaders.specs import TensorSpec
from loaders.storage.address import Address
from loaders.storage.base import Destination, Store
from loaders.storage.hashes import digest, text_digest
from loaders.storage.json_files import json_bytes, json_object
from loaders.storage.local import free_bytes

# These modules import torch, which takes seconds.
if TYPE_CHECKING:
    from loaders.models.evaluating import Reference, Windows
    from loaders.models.hidden_states import Closeness
    from loaders.models.quality import Quality
    from loaders.models.runners import Engine

KEPT = "quality.json"
WHAT = {"logits": "logits", "embeddings": "last hidden states"}


@dataclass(frozen=True, kw_only=True)
class Judging:
    """A planned evaluation: the settings, the original, the output's engine, and the folder of what is kept."""

    spec: LogitsSpec | EmbeddingsSpec
    reference: Reference
    engine: Engine
    folder: Path
    numbers_bytes: int
    model_bytes: int
    quantized: tuple[tuple[TensorSpec, Decoder], ...] = ()

    def task(self, output: Store, name: str) -> JudgeTask:
        """Return the evaluation as a task for a cluster."""
        reference = self.reference
        return JudgeTask(
            kind=self.spec.kind, source=reference.checkpoint.address, container=reference.checkpoint.container,
            files=tuple(reference.checkpoint.files), output=output.address, name=name, folder=self.folder,
            windows=reference.windows, device=reference.device, dtype=reference.dtype, engine=self.engine,
            model_bytes=self.model_bytes, tokens=reference.tokens, threads=1, quantized=self.quantized,
        )  # fmt: skip

    @property
    def note(self) -> str:
        """One line about what will be done, for the plan."""
        windows, length = self.reference.windows.ids.shape
        is_there = self.reference.is_in(self.folder)
        return (
            f"judged by its {WHAT[self.spec.kind]}: {windows} windows of {length} tokens of"
            f" {self.reference.windows.text}, in {self.engine.described}; the original's ({size(self.numbers_bytes)})"
            f" {'are' if is_there else 'go'} in {self.folder}"
        )


def judging_of(
    spec: LogitsSpec | EmbeddingsSpec, plan: Plan, target: TargetPlan, output: Address, *, here: bool = True
) -> Judging:
    """Plan the evaluation of an output; its original's numbers are kept next to it.

    Unless it runs `here`, engines and memory are those of a cluster's machines: see `check_can_judge`.

    Raises:
        BadSpec: the text, the tokenizer or the model does not allow an evaluation; an engine is missing, or cannot
            compute with one of the output's tensors on this machine; or the source or the output is not local.
        StorageError: the original's numbers do not fit on the disk.
    """
    with settings_called({"evaluate": f"verify={spec.kind}"}):
        try:
            return _planned(spec, plan, target, output, here=here)
        except BadSpec as error:
            cannot = f"{setting('evaluate')}: "
            said = [f"{p}; or verify=strict, which runs nothing" if p.startswith(cannot) else p for p in error.problems]
            raise (MissingLibrary if isinstance(error, MissingLibrary) else BadSpec)(said) from None


def _planned(
    spec: LogitsSpec | EmbeddingsSpec, plan: Plan, target: TargetPlan, output: Address, *, here: bool
) -> Judging:
    from loaders.models import runners
    from loaders.models.heads import built_without_logits

    if absent(*runners.ORIGINAL.modules):
        engine = runners.engine_of(target.target.layout.name, target.config)
        missing = absent(*dict.fromkeys((*runners.ORIGINAL.modules, *engine.modules)))
        # Nobody shall install what will then refuse.
        if isinstance(spec, LogitsSpec) and (built := built_without_logits(plan.checkpoint.config)):
            raise BadSpec(
                f"verify=logits: {built} has no logits of next tokens; verify=embeddings judges hidden states"
            )
        raise not_installed(f"verify={spec.kind}: running the original and the output", missing)
    from loaders.models.evaluating import Reference
    from loaders.models.heads import width_of

    plan.checkpoint.folder(f"verify={spec.kind}: {READS_FOLDERS}")
    if not output.is_local:
        raise BadSpec(f"verify={spec.kind}: {READS_FOLDERS}; write {output} into a folder first")
    states = isinstance(spec, EmbeddingsSpec)
    if not states:
        _check_logits(plan.checkpoint)
    engine = runners.engine_of(target.target.layout.name, target.config)
    quantized = tuple(
        (d.tensor.spec, d.scheme) for d in target.decisions if d.action == "quantize" and d.scheme is not None
    )
    model_bytes = plan.parameters * (4 if spec.dtype == "float32" else 2)
    if here:
        for each, what in ((runners.ORIGINAL, "the original"), (engine, "the output")):
            runners.check_engine(each, spec.device, what)
        runners.check_tensors(engine, spec.device, quantized)
        _check_memory(spec, model_bytes)
    windows = _windows(plan.checkpoint.address, plan.checkpoint.container, spec.text, _changed(spec.text), spec.tokens,
                       spec.window, states)  # fmt: skip
    reference = Reference(plan.checkpoint, windows, spec.device, spec.dtype, states)
    words = text_config(plan.checkpoint.config, "vocab_size") or windows.vocabulary
    width = width_of(plan.checkpoint.config) if states else int(words)
    folder, need = output.parent.path / LOGITS, 4 * reference.tokens * width
    if not reference.is_in(folder) and need > free_bytes(folder):
        raise StorageError(
            f"verify.tokens: the original's {WHAT[spec.kind]} take {size(need)} in {folder},"
            f" {size(free_bytes(folder))} are free there; take fewer tokens, or make room"
        )
    return Judging(
        spec=spec, reference=reference, engine=engine, folder=folder, numbers_bytes=need, model_bytes=model_bytes,
        quantized=quantized,
    )  # fmt: skip


def asked(verify: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the numbers of an evaluation, from its settings: the text by its digest, and no limits."""
    gates = ("allow_nonfinite", "max_relative_error")
    found = {key: value for key, value in verify.items() if key not in gates and not key.startswith(("max_", "min_"))}
    text = found.get("text")
    if isinstance(text, str):
        with suppress(OSError):  # which evaluating it says
            found["text"] = digest(Path(text).read_bytes())
    return found


def _check_logits(checkpoint: Checkpoint) -> None:
    from loaders.models.heads import check_causal, encodes

    try:
        check_causal(checkpoint)
    except BadSpec as error:
        if not encodes(checkpoint):
            raise
        raise BadSpec(f"{error}; verify=embeddings judges it by its hidden states") from None


def _changed(text: str | None) -> int:
    return Path(text).stat().st_mtime_ns if text is not None and Path(text).is_file() else 0


@lru_cache(maxsize=8)
def _windows(
    where: Address, container: str, text: str | None, changed: int, tokens: int, window: int, states: bool
) -> Windows:
    """Read the windows of a text, once for all jobs of a sweep. `changed`, its mtime, is part of the cache's key."""
    from loaders.models.evaluating import read_windows

    return read_windows(open_checkpoint(where, container), text, tokens=tokens, window=window, states=states)


def _check_memory(spec: LogitsSpec | EmbeddingsSpec, need: int) -> None:
    from loaders.models.runners import ORIGINAL, device_of

    if device_of(ORIGINAL, spec.device) == "cpu" and need > total_memory():
        less = "; verify.dtype=bfloat16 takes half of it" if spec.dtype == "float32" else ""
        raise BadSpec(
            f"verify={spec.kind}: the original takes {size(need)} in {spec.dtype}, this machine has"
            f" {size(total_memory())}{less}"
        )


def judged(
    judging: Judging, output: Store, name: str, keep: Destination | None = None, digests: Sequence[str] = (),
    cluster: Cluster | None = None,
) -> Quality | Closeness:  # fmt: skip
    """Evaluate an output's files, in this process, or on a machine of a cluster that is not this process.

    The result is kept in the journal of `keep`, for files with the same `digests`. A job that fails a limit thus need
    not be evaluated again under a wider one.

    Raises:
        BadCheckpoint: an engine cannot load the original or the output.
        VerifyFailed: the output computes NaN or infinities, or other numbers of logits or hidden states.
        StorageError: the disk is full, ...
    """
    from loaders.models.evaluating import judge, judge_states, kept
    from loaders.models.hidden_states import Closeness
    from loaders.models.quality import Quality

    reference = judging.reference
    key = text_digest(" ".join([reference.key, judging.engine.described, *digests]))
    before = None if keep is None else keep.get(KEPT)
    if before is not None:
        made = json_object(before, KEPT)
        if made.get("key") == key:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in made["quality"].items()}
            return Closeness(**values) if reference.states else Quality(**values)
    done = f"its {WHAT[judging.spec.kind]} are there" if reference.is_in(judging.folder) else "in transformers"
    doing, tokens = f"evaluating it and the original, {name}", 2 * reference.tokens
    if cluster is not None and not cluster.is_local:
        note(f"evaluating {name} in {judging.engine.name}, on one of the cluster's machines; the original: {done}")
        quality = judged_on(cluster, judging.task(output, name), doing)
    else:
        note(f"evaluating {name} in {judging.engine.described}; the original: {done}")
        with kept(judging.folder) as folder, Meter(doing, tokens, "tokens") as meter:
            quality = (judge_states if reference.states else judge)(
                reference, open_checkpoint(output, key="output.path"), judging.engine, folder, key=name,
                on_tokens=meter.add,
            )  # fmt: skip
    if keep is not None:
        keep.put(KEPT, json_bytes({"key": key, "quality": quality.to_json()}))
    return quality


def faults_of(spec: LogitsSpec | EmbeddingsSpec, quality: Mapping[str, Any]) -> list[str]:
    """List the limits that an output's quality exceeds."""
    return _faults_of_states(spec, quality) if isinstance(spec, EmbeddingsSpec) else _faults_of_logits(spec, quality)


def _faults_of_logits(spec: LogitsSpec, quality: Mapping[str, Any]) -> list[str]:
    found = []
    if spec.max_kl is not None and quality["kl"] > spec.max_kl:
        found.append(
            f"KL of the logits is {quality['kl']:.5g} nats a token{_interval(quality, 'kl')}, above"
            f" verify.max_kl={spec.max_kl:g}"
        )
    ratio, most = quality["perplexity_ratio"], spec.max_perplexity_ratio
    if most is not None and ratio > most:
        found.append(
            f"perplexity is {ratio:.5g} times the original's{_interval(quality, 'perplexity_ratio')}, above"
            f" verify.max_perplexity_ratio={most:g}"
        )
    if spec.min_top1 is not None and quality["top1"] < spec.min_top1:
        found.append(f"top-1 agreement is {quality['top1']:.5g}, below verify.min_top1={spec.min_top1:g}")
    return found


def _faults_of_states(spec: EmbeddingsSpec, quality: Mapping[str, Any]) -> list[str]:
    found = []
    if spec.min_cosine is not None and quality["cosine"] < spec.min_cosine:
        found.append(
            f"the cosine of hidden states is {quality['cosine']:.5g}{_interval(quality, 'cosine')}, below"
            f" verify.min_cosine={spec.min_cosine:g}"
        )
    error, most = quality["hidden_error"], spec.max_hidden_error
    if most is not None and error > most:
        found.append(f"the relative error of hidden states is {error:.5g}, above verify.max_hidden_error={most:g}")
    return found


def _interval(quality: Mapping[str, Any], name: str) -> str:
    low, high = quality[f"{name}_low"], quality[f"{name}_high"]
    return "" if low is None or high is None else f" (95 %: {low:.5g} to {high:.5g})"


def pass_gate(spec: LogitsSpec | EmbeddingsSpec, quality: Mapping[str, Any], output: Address) -> None:
    """Check an output's quality.

    Raises:
        VerifyFailed: it exceeds a limit.
    """
    if faults := faults_of(spec, quality):
        raise VerifyFailed(
            f"not published: {'; '.join(faults)}. Its files are kept: a wider limit publishes them as they are,"
            f" {program()} clean {shlex.quote(str(output))} delete=true removes them"
        )
