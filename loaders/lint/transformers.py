"""Checks of what transformers reads through bitsandbytes and as BitNet: the skip list against what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loaders.backends.machine import has_avx512_bf16
from loaders.checkpoints.name_patterns import fault_of
from loaders.layouts.hf import DEFAULT_HEADS, is_skipped
from loaders.lint.base import Finding, Subject, fault, module, some, warning
from loaders.quantization.schemes.bitsandbytes_4bit import CPU_ROWS, Bnb4
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import counted

# The key of the skip list by method; lint takes the methods that are checked here from this.
SKIP_KEYS = {"bitsandbytes": "llm_int8_skip_modules", "bitnet": "modules_to_not_convert"}


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that transformers would have with a checkpoint of bitsandbytes or BitNet."""
    block: Mapping[str, Any] = subject.config["quantization_config"]
    method = _method(subject)
    key = SKIP_KEYS[method]
    skip = block.get(key)
    if skip is not None and not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
        yield fault("transformers", f"{key} is no list of names", "fails", "write a list, or null")
        return
    broken = next(filter(None, (fault_of(each, f"quantization_config.{key}") for each in skip or ())), None)
    if broken is not None:
        yield fault("transformers", broken, "fails, or takes as long, since it matches every module with it", "mend it")
    else:
        yield from _skip_list(subject, key, skip)
    yield from _experts(subject)
    if method == "bitsandbytes":
        yield from bitsandbytes(subject)


def _method(subject: Subject) -> str:
    return str(subject.checkpoint.quantized_by)


def _skip_list(subject: Subject, key: str, skip: Sequence[str] | None) -> Iterator[Finding]:
    def is_left_alone(tensor: LogicalTensor) -> bool:
        return tensor.role in DEFAULT_HEADS if skip is None else is_skipped(module(tensor), skip)

    is_single = _method(subject) in subject.checkpoint.family.single_experts
    linears = [tensor for tensor in subject.linears if is_single or tensor.role != "expert"]
    bare = [module(r) for r in linears if r.decode is None and not is_left_alone(r)]
    if bare:
        yield fault(
            "transformers",
            f"{counted(len(bare), 'linear layer is', 'linear layers are')} stored plain and not in {key}: {some(bare)}",
            "makes quantized modules of them and finds no codes",
            f"name them in {key} (and lm_head with them)",
        )
    caught = [module(r) for r in linears if r.decode is not None and is_left_alone(r)]
    if caught:
        yield fault(
            "transformers",
            f"{counted(len(caught), 'quantized layer is', 'quantized layers are')} skipped by {key}: {some(caught)}",
            "makes plain modules of them and fails on the shapes",
            f"take them out of {key}",
        )


def _experts(subject: Subject) -> Iterator[Finding]:
    found = [r for r in subject.sources.tensors if r.role == "expert"]
    experts = [module(r) for r in found if r.decode is not None]
    if _method(subject) in subject.checkpoint.family.single_experts:
        if stacks := [module(r) for r in found if len(r.shape) == 3]:
            yield fault(
                "transformers",
                f"{len(stacks)} stacks of experts: {some(stacks)}",
                "makes a linear layer of each expert matrix, finds none of their weights, and stops or fills in random"
                " numbers",
                "quantize the plain model anew",
            )
    elif experts:
        yield fault(
            "transformers 5",
            f"{counted(len(experts), 'expert is', 'experts are')} quantized one by one: {some(experts)}",
            "fuses experts and fails with a size mismatch; transformers 4 loads them",
            "keep experts by a rule",
            loads_in="transformers 4",
        )
    routers = [module(r) for r in subject.sources.tensors if r.role == "router" and r.decode is not None]
    if routers:
        yield fault(
            "transformers 5",
            f"{counted(len(routers), 'router is', 'routers are')} quantized: {some(routers)}",
            "reads them as plain parameters and fails",
            "keep routers by a rule",
            loads_in="transformers 4",
        )


def bitsandbytes(subject: Subject) -> Iterator[Finding]:
    four_bit = [(tensor, tensor.decode) for tensor in subject.sources.tensors if isinstance(tensor.decode, Bnb4)]
    stopping = [
        (module(tensor), why)
        for tensor, scheme in four_bit
        if (why := scheme.stops_cpu_kernel(tensor.shape)) is not None
    ]
    if stopping:
        is_here = ", so on this machine," if has_avx512_bf16() else ""
        yield warning(
            "bitsandbytes on a CPU with AVX512-BF16",
            f"{counted(len(stopping), 'layer')} with a number of rows that is no multiple of {CPU_ROWS}, or of columns"
            f" that is none of the group size ({stopping[0][1]}): {some([name for name, _ in stopping])}",
            f"stops{is_here} at the first use: its kernel there takes no others; GPUs take any",
            "keep them by a rule if such a CPU is to run it",
        )
    plain = {r.group for r in subject.sources.tensors if r.group and r.decode is None}
    for group in sorted({r.group for r, _ in four_bit if r.group}):
        if group in plain:
            yield warning(
                "vLLM, which fuses them",
                f"{group}: some of its layers are quantized and some are not",
                "fails; transformers loads them apart",
                "quantize all of them or none",
            )
