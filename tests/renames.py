"""Write what transformers' classes do to published names to loaders/architectures/renames.json: python -m tests.renames

transformers.conversion_mapping has renamings by model type and by class. What a class ties, and keeps in float32,
stands in its attributes, which are read in all of its modules (about a minute).
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from loaders.architectures.renames import RENAMES_FILE


def fused(changes: list[Any]) -> list[list[Any]]:
    """Return the weights of linear layers that are joined or cut: [pattern, what is made of them] for each.

    Experts are others' business, since a layer's experts are fused in most models; convolutions and tables are no
    linear layers.
    """
    found = []
    for change in changes:
        names = [*getattr(change, "source_patterns", ()), *getattr(change, "target_patterns", ())]
        operations = {type(each).__name__ for each in getattr(change, "operations", ())}
        if operations and not re.search("expert|conv|embed|wte|gate.weight|bias|statics|shard", " ".join(names)):
            targets = [target.replace("\\.", ".") for target in change.target_patterns]
            found += [[pattern, targets] for pattern in change.source_patterns]
    return found


def plain(changes: list[Any]) -> list[list[str]]:
    """Return the renamings: [pattern, replacement] for each."""
    from transformers.core_model_loading import WeightRenaming

    return [
        [pattern, change.target_patterns[0].replace("\\.", ".")]
        for change in changes
        if type(change) is WeightRenaming
        for pattern in change.source_patterns
    ]


def _changes(types: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield model types with transformers' changes of names: those by type, then those by class, of the class's type.

    Those by class hold for names within a module of the class, so that those of beginnings of names are left out.
    """
    from transformers import conversion_mapping

    by_key = conversion_mapping._build_checkpoint_conversion_mapping()
    by_key = {key: by_key[like] for key, like in conversion_mapping._MODEL_TO_CONVERSION_PATTERN.items()} | by_key
    for key, changes in sorted(by_key.items(), key=lambda each: each[0] in types):
        if key in types:
            yield types[key], [each for each in changes if not any("^" in p for p in each.source_patterns)]
        elif key == key.lower():
            yield key, changes


def classes(only: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield classes of models, with the model type that each is of: all, or those of these packages."""
    from transformers import PreTrainedModel, models

    for package in pkgutil.iter_modules(models.__path__):
        if only and package.name not in only:
            continue
        for file in sorted(Path(models.__path__[0], package.name).glob("modeling_*.py")):
            try:
                module = import_module(f"{models.__name__}.{package.name}.{file.stem}")
            except ImportError:  # of a package that is not installed
                continue
            for found in vars(module).values():
                is_own = isinstance(found, type) and found.__module__ == module.__name__
                model_type = getattr(getattr(found, "config_class", None), "model_type", "")
                if is_own and issubclass(found, PreTrainedModel) and model_type:
                    yield model_type, found


# What is tied beside heads and other layers: tables, and what has one dimension.
TABLE = re.compile(r"embeddings?\b|embed_(?!out\b)|_embedding|tokens_embed|bias|scale|norm\b|scalar")


def tied(model_class: Any) -> list[list[str]]:
    """Return linear layers but lm_head that a class ties: [what is not stored], and the other if it is no table."""
    found = getattr(model_class, "_tied_weights_keys", None)
    pairs = [[_module(each) for each in pair] for pair in (found.items() if isinstance(found, dict) else ())]
    return [
        [name] if TABLE.search(other) else [name, other]
        for name, other in pairs
        if name not in ("", "lm_head") and not TABLE.search(name)
    ]


# Ties that classes make as they are built, and do not name: parts of a name, tied among themselves.
TIED_WHEN_BUILT = {
    "bark": ["fine_acoustics.lm_heads"],
    "deimv2": ["bbox_embed", "class_embed"],
    "zamba": ["shared_transf"],
    "zamba2": ["shared_transformer"],
}


def _module(pattern: str) -> str:
    """Return the module that a pattern of tied weights names, up to where it is no plain name."""
    plain = re.match(r"[\w.]*", pattern.removeprefix("^").replace("\\.", "."))
    return "" if plain is None else plain[0].removesuffix(".weight").rstrip(".")


def in_float32(model_class: Any) -> list[str]:
    """Return patterns for the modules that a class keeps in float32, but for those that are no layers."""
    kept = [getattr(model_class, key, None) or () for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    no_layer = re.compile(r"bias$|norm\w*$|norm\.|sinks$|scale$|weight$|conv1d$|_hc\b|^[A-Za-z]*_?(?:log|std|mean)$")
    return [pattern for patterns in kept for pattern in patterns if not no_layer.search(pattern)]


def renames(only: Collection[str] = ()) -> dict[str, Any]:
    """Return what the installed transformers makes of names and layers, by model type, in its order.

    "renames" are [pattern, replacement], "fused" are [pattern, replacements], "float32" are patterns for modules,
    "tied" are [module that is not stored], followed by the module that is stored where this is a linear layer, too.
    `only` are the packages whose classes are looked at, if not all.
    """
    import transformers

    found: dict[str, list[list[str]]] = {}
    joined: dict[str, list[list[Any]]] = {}
    ties = {model_type: [[part, part] for part in parts] for model_type, parts in TIED_WHEN_BUILT.items()}
    floats: dict[str, set[str]] = {}
    known = list(classes(only))
    for model_type, changes in _changes({each.__name__: model_type for model_type, each in known}):
        for table, rows in ((found, plain(changes)), (joined, fused(changes))):
            if rows:
                have = table.setdefault(model_type, [])
                have += [row for row in rows if row not in have]
    for model_type, model_class in known:
        if pairs := tied(model_class):
            have = ties.setdefault(model_type, [])
            have += [pair for pair in pairs if pair not in have]
        if patterns := in_float32(model_class):
            floats.setdefault(model_type, set()).update(patterns)
    return {
        "transformers": transformers.__version__,
        "renames": dict(sorted(found.items())),
        "fused": dict(sorted(joined.items())),
        "tied": dict(sorted(ties.items())),
        "float32": {key: sorted(patterns) for key, patterns in sorted(floats.items())},
    }


def main() -> None:
    document = renames()
    parts = [f'"transformers": {json.dumps(document.pop("transformers"))}']
    for name, table in document.items():
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        parts.append(f'"{name}": {{\n{rows}\n}}')
    RENAMES_FILE.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
