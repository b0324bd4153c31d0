"""Targets: the results wanted of a checkpoint, and what the targets of one pass must agree on to share its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.spec.job import JobSpec
from loaders.backends import offered
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import CONTAINERS, Container
from loaders.containers.packed import EXPERTS
from loaders.errors import BadSpec
from loaders.layouts import BY_ENGINE, LAYOUTS, Layout, Naming
from loaders.layouts.diffusers import check_scheme, is_of_diffusers
from loaders.layouts.engines import wants_stacks
from loaders.layouts.hf import HfLayout
from loaders.presets.auto import AutoQuant
from loaders.presets.settings import Bnb4Quant, GgmlQuant
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.next_tokens import NextTokens
from loaders.rules.rule import Mix, Rule
from loaders.storage.address import Address
from loaders.tensors.quantized_sources import check_decodable

TargetId = str
NAMELESS = Naming("model", None, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One wanted result: a scheme with its rules, and the layout and container of the output."""

    id: TargetId
    scheme: Scheme
    rules: tuple[Rule, ...] = ()
    compute_dtype: str | None = None
    mix: Mix | None = None
    layout_name: str = "auto"
    container_name: str = "auto"
    naming: Naming = NAMELESS
    new_blocks: int = 0
    adapter: Address | None = None
    components: tuple[str, ...] | None = None  # of a pipeline of diffusers: those to quantize; None: the usual ones
    next_tokens: NextTokens = "auto"
    kept_dtype: str = "source"  # of floats that are kept: torch's name, as they are stored, or auto
    max_shard_bytes: int | None = None  # of a weight file
    imatrix: Address | None = None  # an importance matrix, by which a GGUF is quantized

    @property
    def layout(self) -> Layout:
        """The output's layout: the requested one, or that of the scheme's engine."""
        return LAYOUTS[BY_ENGINE[self.scheme.engine] if self.layout_name == "auto" else self.layout_name]

    @property
    def container(self) -> Container:
        """The container of the weight files: the requested one, or the layout's usual one.

        Raises:
            BadSpec: the layout's consumer does not read that container.
        """
        known = self.layout.containers
        if self.container_name not in ("auto", *known):
            raise BadSpec(
                f"output.container: {self.container_name} is not read there; layout {self.layout.name} takes"
                f" {' or '.join(known)}"
            )
        return CONTAINERS[known[0] if self.container_name == "auto" else self.container_name]


def new_blocks_of(targets: Sequence[Target]) -> int:
    """Return the number of new blocks that all targets want.

    Raises:
        BadSpec: targets want different numbers, and so have different tensors.
    """
    wanted = {target.new_blocks for target in targets}
    if len(wanted) > 1:
        raise BadSpec("transform: outputs with other numbers of blocks are different work: run them apart")
    return next(iter(wanted), 0)


def adapter_of(targets: Sequence[Target]) -> Address | None:
    """Return where the adapter is that all targets want merged.

    Raises:
        BadSpec: targets want different ones, and so have different weights.
    """
    wanted = {target.adapter for target in targets}
    if len(wanted) > 1:
        raise BadSpec("transform: outputs with other adapters are different work: run them apart")
    return next(iter(wanted), None)


def is_decoded(checkpoint: Checkpoint, targets: Sequence[Target]) -> bool:
    """Whether an already quantized source is decoded when it is read, and not copied as it is stored.

    Raises:
        BadSpec: its quantization is not decoded here, or some targets want it decoded and others copied.
    """
    if checkpoint.container == "gguf":
        return _is_gguf_decoded(targets)
    # quant=none copies quantized weights into layouts that store them in the same form. The packed layout holds MLX's
    # packed uint32 words, so it takes those of an MLX checkpoint unchanged.
    layouts = ("auto", "hf", "diffusers", *(("packed",) if checkpoint.quantized_by == "mlx" else ()))
    copies = [target for target in targets if target.scheme == Plain() and target.layout_name in layouts]
    if len(copies) == len(targets) or checkpoint.quantized_by is None:
        _check_copies(checkpoint, copies)
        return False
    if copies:
        raise BadSpec(
            "quant: the source is already quantized; quant=none copies it as it is stored, the others decode it: run"
            " quant=none apart, or give it a quant.dtype"
        )
    check_decodable(checkpoint)
    return True


def _check_copies(checkpoint: Checkpoint, copies: Sequence[Target]) -> None:
    """Check that quantized experts of a packed checkpoint, stored one by one, are only copied into a packed output.

    Raises:
        BadSpec: a target would copy them into another layout, which no engine reads.
    """
    is_apart = any(w.file.startswith(EXPERTS) and w.dtype.name == "U32" for w in checkpoint.weights)
    if checkpoint.container == "packed" and is_apart and any(target.layout_name != "packed" for target in copies):
        raise BadSpec(
            "quant: quant=none copies words as they are stored, and no other engine reads quantized experts one by one;"
            " give quant.dtype=bfloat16, a quant, or output=packed"
        )


def _is_gguf_decoded(targets: Sequence[Target]) -> bool:
    """Whether a GGUF is decoded to transformers' names and orders, and not kept as it is for another GGUF.

    Raises:
        BadSpec: some targets are GGUFs and others are not.
    """
    kept = [target for target in targets if target.layout is LAYOUTS["gguf"]]
    if kept and len(kept) < len(targets):
        raise BadSpec("output.layout: from a GGUF, outputs as GGUF and others are different work: run them apart")
    return not kept


def is_split(checkpoint: Checkpoint, targets: Sequence[Target]) -> bool:
    """Whether stacks of experts are split into single experts; not if the model's own class loads the output.

    Raises:
        BadSpec: the checkpoint has stacks, and some targets want them whole and others split.
    """
    stacks = checkpoint.family.stacks
    wanted = {
        not (isinstance(t.layout, HfLayout) and wants_stacks(t.scheme.engine, checkpoint.family)) for t in targets
    }
    if len(wanted) == 2 and any(stack.pattern.search(w.name) for stack in stacks for w in checkpoint.weights):
        raise BadSpec(
            "quant: the checkpoint stacks its experts; transformers wants them whole, the other engines asked for one"
            " by one: run them apart"
        )
    return True in wanted


def for_source(target: Target, checkpoint: Checkpoint) -> Target:
    """Return the target as its source wants it: what is of diffusers is written for diffusers.

    Raises:
        BadSpec: diffusers could not load the output, or the target is about components that the source does not have.
    """
    if not is_of_diffusers(checkpoint):
        if target.components is not None:
            raise BadSpec(
                f"model.components_to_quantize: {checkpoint.address} is no pipeline of diffusers; leave it out"
            )
        if target.layout_name == "diffusers":
            raise BadSpec(f"output.layout: {checkpoint.address} is no model of diffusers; choose another")
        return target
    what = "a pipeline of diffusers" if checkpoint.components else "a component of a pipeline of diffusers"
    check_scheme(target.scheme, "quant")
    if target.mix is not None:
        raise BadSpec(
            f"quant: {checkpoint.address} is {what}, for which no mix is chosen; choose nf4, fp4, int8 or none"
        )
    for rule in target.rules:
        if rule.scheme is not None:
            check_scheme(rule.scheme, rule.label)
    if target.layout_name not in ("auto", "diffusers") or target.container_name not in ("auto", "safetensors"):
        raise BadSpec(
            f"output: {checkpoint.address} is {what}, which is written for diffusers, as safetensors; leave it out"
        )
    if target.new_blocks or target.adapter is not None:
        raise BadSpec(
            f"transform: {checkpoint.address} is {what}, whose blocks and adapters are not known here; leave it out"
        )
    unknown = [name for name in target.components or () if name not in checkpoint.components]
    if unknown:
        raise BadSpec(
            f"model.components_to_quantize: {unknown[0]} is no component with weights; there are"
            f" {', '.join(checkpoint.components) or 'none: this is one component by itself'}"
        )
    return replace(target, layout_name="diffusers")


TARGET = "target"  # the id of a job's only target


def target_of(spec: JobSpec) -> Target:
    """Return the target of a job.

    Raises:
        BadSpec: its scheme does not run on the backend.
    """
    scheme, backend = spec.quant.scheme, spec.backend.kind
    if backend not in ("auto", *offered(scheme)):
        raise BadSpec(f"backend: quant={spec.quant.name} runs on {', '.join(offered(scheme))}, not on {backend}")
    compute_dtype = spec.quant.compute_dtype if isinstance(spec.quant, Bnb4Quant) else None
    # A budget is of the sizes that were measured: those of what is kept as it is stored.
    is_searched = isinstance(spec.quant, AutoQuant) and spec.output.dtype == "auto"
    naming = Naming(spec.model_name, spec.quant.label, spec.output.split)
    return Target(
        id=TARGET, scheme=scheme, rules=spec.own_rules, compute_dtype=compute_dtype, mix=spec.quant.mix,
        layout_name=spec.output.layout, container_name=spec.output.container, naming=naming,
        new_blocks=spec.transform.num_blocks or 0, adapter=spec.transform.adapter,
        components=spec.model.components_to_quantize,
        next_tokens=spec.mtp,
        kept_dtype="source" if is_searched else spec.output.dtype,
        max_shard_bytes=spec.output.max_shard_bytes,
        imatrix=Address.of(spec.quant.imatrix) if isinstance(spec.quant, GgmlQuant) and spec.quant.imatrix else None,
    )  # fmt: skip
