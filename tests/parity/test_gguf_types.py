"""The types of tensors, held against llama.cpp's own choice: a dry run of its quantizer over tiny models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

from loaders.architectures.gguf import architecture_of
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.layouts.gguf.layout import GgufLayout
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.llama_cpp import MIXES, GgmlMix
from loaders.rules.rule import dropping
from loaders.tensors.sources import tensors_of
from tests import tiny_models
from tests.llama_dry_run import types_in

pytestmark = pytest.mark.engine

# One model of each kind of layers: stacks, a head that is tied, recurrent layers, latent attention, fused q, k and v.
KINDS = (
    "qwen3_moe",
    "qwen2_moe",
    "qwen3_5",
    "qwen3_next",
    "gemma3",
    "gemma4_moe",
    "gemma4_per_layer",
    "phi3",
    "falcon_h1",
    "mamba2",
    "jamba",
    "llama4",
    "bert",
    "modernbert",
)
FILE_TYPES = tuple(name for name in MIXES if name not in ("F32", "F16", "BF16"))


@cache
def planned(model: Path, mix: str) -> dict[str, str]:
    """Return the types that are planned for the tensors of a checkpoint, by their names in a GGUF."""
    checkpoint, layout = open_checkpoint(str(model)), GgufLayout()
    tensors = layout.formed(checkpoint, tensors_of(checkpoint, decode=True, split=True).tensors)
    engine = (*dropping(architecture_of(checkpoint.config).dropped(checkpoint.config)),
              *GgmlMix(mix).rules(tensors, checkpoint.config))  # fmt: skip
    placed = layout.place(checkpoint, decide(tensors, Plain(), (), engine))
    return {stored.name: stored.spec.dtype.name for each in placed for stored in each.stored.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_that_llama_cpp_chooses(kind: str, tmp_path: Path, weightmill: Callable[..., Any]) -> None:
    model = tiny_models.make(kind, tmp_path / "tiny")
    ran = weightmill("run", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=gguf_bf16")
    assert ran.status == 0, ran.err
    [floats] = (tmp_path / "out").glob("*.gguf")
    wrong = {}
    for file_type in FILE_TYPES:
        constant = f"LLAMA_FTYPE_MOSTLY_{file_type}"
        theirs, ours = types_in(floats, constant), planned(model, file_type)
        found = {name: (theirs.get(name), ours.get(name)) for name in theirs.keys() | ours.keys()}
        wrong[file_type] = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
    assert {file_type: found for file_type, found in wrong.items() if found} == {}
