"""Checks of what hqq writes: its own qmodel.pt, and the form that transformers 4 reads."""

from __future__ import annotations

from collections.abc import Iterator

from loaders.errors import setting
from loaders.layouts.hqq import HqqLayout
from loaders.lint.base import Finding, Subject, fault, module, some, warning
from loaders.words import counted


def check(subject: Subject) -> Iterator[Finding]:
    """Yield the problems that hqq or transformers would have."""
    files = [tag.name for tag in subject.checkpoint.files]
    is_own = files == [HqqLayout.file]
    if subject.checkpoint.container == "pytorch" and not is_own:
        yield fault(
            "hqq",
            f"the weights are in {some(files)}",
            f"looks for {HqqLayout.file} alone, and fails",
            f"make it again with {setting('layout')}=hqq: all weights in {HqqLayout.file}",
        )
    if not is_own:
        yield warning(
            "transformers 5",
            "HQQ in the form of transformers 4",
            "does not load HQQ: it warns of missing weights and computes with random ones",
            f"load it with transformers 4 (on a CPU in float32), or make it again with {setting('layout')}=hqq for"
            " the hqq package",
        )
    experts = [module(tensor) for tensor in subject.sources.tensors if tensor.role == "expert"]
    if experts:
        yield warning(
            "hqq, transformers 5",
            f"{counted(len(experts), 'expert lies', 'experts lie')} one by one: {some(experts)}",
            "fuses experts, and does not find these; with transformers 4 it does",
            "load it with transformers 4",
        )
