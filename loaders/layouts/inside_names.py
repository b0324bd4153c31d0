"""Names of modules that stay as they are, so that they also fit the names that engines have inside.

Engines rename a checkpoint's tensors when they load it: `language_model.lm_head` is `lm_head` inside transformers 5,
`vision_tower.vision_model.encoder` is `model.vision_tower.encoder`, and vLLM has names of its own. What differs most is
the beginnings of names; what stays are the ends, from a numbered layer on, and the one component that names a tower. So
lists are written by these; where transformers renames within names, they have both (`loaders.architectures.renames`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from loaders.architectures.families import Family
from loaders.architectures.generic import block_of, part_of
from loaders.architectures.renames import fused_modules, inside
from loaders.layouts.base import module_of
from loaders.rules.rule import Decision

NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)|^\d+(?=\\\.)")  # a component of an escaped name that is a number

# What wraps the text model, in any order; engines put these components in front of names, and take them away.
WRAPPERS = re.compile(r"^(?:(?:model|language_model|transformer|backbone|text_model|llm)\.)+")

# Heads that models tie to their embeddings, so that they are not stored, where they are not called `lm_head`: those of
# `_tied_weights_keys` in transformers' classes.
OTHER_HEADS = {
    **dict.fromkeys(("whisper", "moonshine", "speech_to_text"), "proj_out"),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "esm", "gte", "xmod",
         "roberta-prelayernorm", "ibert", "longformer", "mpnet", "luke"),
        "lm_head.decoder",
    ),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), "decoder"),
    **dict.fromkeys(("electra", "convbert"), "generator_lm_head"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("flaubert", "xlm"), "pred_layer.proj"),
    "distilbert": "vocab_projector", "gpt_neox_japanese": "embed_out", "rwkv": "head",
}  # fmt: skip


def tied_heads(family: Family) -> tuple[str, ...]:
    """Return the names of heads that a model without one of its own may tie to its embedding."""
    others = [OTHER_HEADS[each] for each in family.names.model_types if each in OTHER_HEADS]
    return tuple(dict.fromkeys((*others, *(() if others else ("lm_head",)))))


def inside_patterns(kept: Iterable[Decision], quantized: Sequence[str], family: Family) -> list[re.Pattern[str]]:
    """Return regular expressions that match kept modules by the names of any engine, and none of the quantized ones.

    Parts of a model that are kept as a whole are named by their component. In models of unknown families all other
    modules are named by the ends of their names; those of known families are the same inside, and have no pattern.
    """
    found: dict[str, re.Pattern[str]] = {}
    others = {name for module in quantized for name in (module, inside(module, family.names.model_types))}
    for decision in kept:
        published = module_of(decision.tensor.name)
        for name in dict.fromkeys((published, inside(published, family.names.model_types))):
            if any(pattern.match(name) for pattern in found.values()):
                continue
            for candidate in _candidates(name, family):
                pattern = re.compile(candidate)
                if not any(pattern.match(other) for other in others):
                    found[candidate] = pattern
                    break
    return list(found.values())


def _candidates(name: str, family: Family) -> Iterable[str]:
    """Yield patterns for a module, the widest first."""
    part = part_of(name + ".")
    if part is not None:
        yield rf"(?:.*\.)?{re.escape(part)}(?:\..*)?$"
    if family.names.is_beyond(name):
        yield rf"(?:.*\.)?{re.escape(WRAPPERS.sub('', block_of(name)))}\..*"
    if family.is_generic:
        end = re.escape(WRAPPERS.sub("", name))
        yield rf"(?:.*\.)?{NUMBER.sub('[0-9]+', end)}$"
        yield rf"(?:.*\.)?{end}$"


def skip_names(kept: Iterable[str], tied: Iterable[str], family: Family, catches: Callable[[str], bool]) -> list[str]:
    """Return entries for transformers' skip lists, which are compared with beginnings and ends of names.

    Beside each kept module's own name stands the end of it, which also fits the name inside transformers; of a tower
    that is kept as a whole, the tower. `tied` are further names. No entry `catches` a quantized module.
    """
    found, tried = set(kept), set(tied)
    for name in kept:
        part = part_of(name + ".")
        renamed = inside(name, family.names.model_types)
        fused = fused_modules(f"{renamed}.weight", family.names.model_types)
        ends = {WRAPPERS.sub("", each) for each in (name, renamed, *fused)}
        tried |= ends | (set() if part is None else {part, f"model.{part}"})
    return sorted(found | {entry for entry in tried - found if not catches(entry)})
