"""Names of modules that stay as they are, so that they also fit the names that engines have inside.

Engines rename a checkpoint's tensors when they load it: `language_model.lm_head` is `lm_head` inside transformers 5,
`vision_tower.vision_model.encoder` is `model.vision_tower.encoder`, and vLLM has names of its own. What differs most is
the beginnings of names; what stays are the ends, from a numbered layer on, and the one component that names a tower. So
lists are written by these; where transformers renames within names, they have both (`loaders.architectures.renames`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from loaders.architectures.family import Family
from loaders.architectures.generic import block_of, part_of
from loaders.architectures.renames import (
    WRAPPERS,
    float32_of,
    fused_modules,
    inside,
    insides,
    tensor_inside,
    tied_heads,
    tied_layers,
)  # fmt: skip
from loaders.layouts.base import module_of
from loaders.rules.rule import Decision

NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)|^\d+(?=\\\.)")  # a component of an escaped name that is a number


# Tables that no model makes of linear layers.
TABLES = re.compile(
    r"(?:^|[._])(?:wte|wpe|shared|embed_(?:tokens|positions|in)|(?:word|position|token_type)_embeddings?)$"
)


def may_be_linear(decision: Decision) -> bool:
    """Whether a tensor that is no linear layer by its name may be one: names are only habits."""
    tensor = decision.tensor
    is_weight = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    return is_weight and tensor.role in ("embedding", "conv", "other") and not TABLES.search(module_of(tensor.name))


def tied_entries(family: Family, kept: Iterable[str], *, has_head: bool) -> tuple[str, ...]:
    """Return entries for modules that a model may tie to others, so that they are not stored, and for whole parts.

    Config.json need not say which these are, so they are all that models of its type may tie, and `lm_head`: where a
    head of another name is stored, that is what it is called inside many classes.
    """
    heads, layers = tied_heads(family.names.model_types), tied_layers(family.names.model_types)
    # transformers takes an entry for a regular expression, too.
    whole = (*(re.escape(WRAPPERS.sub("", name)) for name in layers), *kept_parts(kept, family))
    parts = (rf"(?:.*\.)?{name}" for name in whole)
    return (*heads, *parts, *(("lm_head",) if has_head or not heads else ()))


def tied_patterns(family: Family, kept: Iterable[str], *, has_head: bool) -> tuple[str, ...]:
    """Return regular expressions for what `tied_entries` names, wherever in the model it is."""
    heads, layers = tied_heads(family.names.model_types), tied_layers(family.names.model_types)
    heads = (*heads, "lm_head") if has_head or not heads else heads
    return (
        *(rf"(?:.*\.)?{re.escape(name)}$" for name in heads),
        *(rf"(?:.*\.)?{re.escape(WRAPPERS.sub('', name))}(?:\..*)?$" for name in layers),
        *(rf"(?:.*\.)?{part}(?:\..*)?$" for part in kept_parts(kept, family)),
    )


def inside_patterns(kept: Iterable[Decision], quantized: Sequence[str], family: Family) -> list[re.Pattern[str]]:
    """Return regular expressions that match kept modules by the names of any engine, and none of the quantized ones.

    Parts of a model that are kept as a whole are named by their component. In models of unknown families all other
    modules are named by the ends of their names; those of known families are the same inside, and have no pattern.
    """
    found: dict[str, re.Pattern[str]] = {}
    others = {name for module in quantized for name in (module, inside(module, family.names.model_types))}
    for decision in kept:
        published = module_of(decision.tensor.name)
        for name in dict.fromkeys((published, *insides(published, family.names.model_types))):
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


def modules_within(tensor: str, family: Family) -> tuple[str, ...]:
    """Return the modules whose weight a tensor becomes, or is cut into, though it is not called `weight`."""
    if tensor.endswith(".weight"):
        return ()
    name = tensor_inside(tensor, family.names.model_types)
    alone = (name.removesuffix(".weight"),) if name.endswith(".weight") else ()
    return fused_modules(name, family.names.model_types) or alone


def skip_names(
    kept: Iterable[str], doubtful: Iterable[str], tied: Iterable[str], family: Family, catches: Callable[[str], bool]
) -> list[str]:
    """Return entries for transformers' skip lists, which are compared with beginnings and ends of names.

    Beside each kept module's own name stands the end of it, which also fits the name inside transformers; of a tower
    that is kept as a whole, the tower. `doubtful` may be kept modules, too, and `tied` are further names. No entry
    `catches` a quantized module.
    """
    types = family.names.model_types
    found, tried = set(kept), set(tied)
    for name in (*kept, *doubtful):
        renamed = insides(name, types)
        for each in (name, *renamed, *(part for other in renamed for part in fused_modules(f"{other}.weight", types))):
            # The end of one part's name may be that of another part's, which is quantized.
            end = WRAPPERS.sub("", each)
            tried.add(each if catches(end) else end)
    for part in {part for name in kept if (part := part_of(name + ".")) is not None}:
        # Where one of these is in a published name, the other may be in the name inside.
        entries = {part, f"model.{part}"}
        tried |= set() if any(catches(entry) for entry in entries) else entries
    return sorted(found | {entry for entry in tried - found if not catches(entry)})


def kept_parts(kept: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return the parts of a model that its class keeps in float32 as a whole, of which these modules are."""
    names = [inside(name, family.names.model_types) for name in kept]
    patterns = float32_of(family.names.model_types)
    return tuple(p for p in patterns if any(re.search(rf"(?:^|\.){p}\.", name) for name in names))
