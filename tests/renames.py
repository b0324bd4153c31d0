"""Write transformers' renamings of published tensors to loaders/architectures/renames.json: python -m tests.renames

transformers.conversion_mapping has them by model type and by class. Only those by type are taken.
"""

from __future__ import annotations

import json
import re
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


def renames() -> dict[str, Any]:
    """Return what the installed transformers renames and fuses, by model type, in its order.

    "renames" are [pattern, replacement], "fused" are [pattern, replacements].
    """
    import transformers
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: dict[str, list[list[str]]] = {}
    joined: dict[str, list[list[Any]]] = {}
    for key, changes in conversion_mapping._build_checkpoint_conversion_mapping().items():
        rows = [
            [pattern, change.target_patterns[0].replace("\\.", ".")]
            for change in changes
            if type(change) is WeightRenaming
            for pattern in change.source_patterns
        ]
        if rows and key == key.lower():
            found[key] = rows
        if (several := fused(changes)) and key == key.lower():
            joined[key] = several
    for key, like in conversion_mapping._MODEL_TO_CONVERSION_PATTERN.items():
        for table in (found, joined):
            if like in table and key == key.lower():
                table[key] = table[like]  # type: ignore[index]
    return {
        "transformers": transformers.__version__,
        "renames": dict(sorted(found.items())),
        "fused": dict(sorted(joined.items())),
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
