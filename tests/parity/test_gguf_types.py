"""The types of tensors, held against llama.cpp's own choice: a dry run of its quantizer over tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

from jobs.planning.engine_rules import engine_rules
from jobs.planning.targets import Target
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import gguf
from loaders.layouts.gguf.layout import GgufLayout
from loaders.quantization.schemes.plain import Plain
from loaders.rules.decide import decide
from loaders.rules.llama_cpp import MIXES, GgmlMix
from loaders.tensors.sources import tensors_of
from tests import tiny_models
from tests.llama_dry_run import types_in
from tests.reading import files_of

pytestmark = pytest.mark.engine

# One model of each kind of layers: stacks, a head that is tied, recurrent layers, latent attention, fused q, k and v.
# Layers for multi-token prediction that a GGUF has, and some that it has not; MXFP4 that stays.
KINDS = (
    "qwen3_moe", "qwen2_moe", "qwen3_5", "qwen3_next", "gemma3", "gemma4_moe", "gemma4_per_layer", "phi3",
    "deepseek_v3", "glm_moe_dsa", "nemotron_h", "granitemoehybrid", "lfm2_moe", "ernie4_5_moe", "hunyuan_v1_moe",
    "internlm2", "starcoder2", "cohere2", "olmo2",
    "falcon_h1", "mamba2", "jamba", "llama4", "bert", "modernbert",
)  # fmt: skip
FILE_TYPES = tuple(name for name in MIXES if name not in ("F32", "F16", "BF16"))


@cache
def planned(model: Path, mix: str) -> dict[str, str]:
    """Return the types that are planned for the tensors of a checkpoint, by their names in a GGUF."""
    checkpoint, layout = open_checkpoint(str(model)), GgufLayout()
    found = tensors_of(checkpoint, decode=True, split=True)
    sources = replace(found, tensors=tuple(layout.formed(checkpoint, found.tensors)))
    target = Target(id="gguf", scheme=Plain(), mix=GgmlMix(name=mix), layout_name="gguf")
    decisions = decide(sources.tensors, Plain(), (), engine_rules(target, checkpoint, sources))
    placed = layout.place(checkpoint, decisions)
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


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "gemma4_per_layer"])
def test_a_gguf_that_is_not_read_is_quantized_as_llama_cpp_does(
    kind: str, tmp_path: Path, weightmill: Callable[..., Any]
) -> None:
    """Its architecture is none that transformers' names are known for here: only its own names and metadata count."""
    model = tiny_models.make(kind, tmp_path / "tiny")
    for source, quant in ((model, "gguf_bf16"), (tmp_path / "gguf_bf16", "gguf_q4_k_m")):
        ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / quant}", f"quant={quant}")
        assert ran.status == 0, ran.err
    [floats], [made] = ((tmp_path / quant).glob("*.gguf") for quant in ("gguf_bf16", "gguf_q4_k_m"))
    specs = gguf.read_specs(files_of(made.parent), made.name)
    assert {spec.name: spec.dtype.name for spec in specs} == types_in(floats, "LLAMA_FTYPE_MOSTLY_Q4_K_M")
