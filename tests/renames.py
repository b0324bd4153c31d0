"""Write transformers' renamings of published tensors to loaders/architectures/renames.json: python -m tests.renames

transformers.conversion_mapping has them by model type and by class. Only those by type are taken, and only plain ones:
what is fused or cut is another tensor inside.
"""

from __future__ import annotations

import json
from typing import Any

from loaders.architectures.renames import RENAMES_FILE


def renames() -> dict[str, Any]:
    """Return the installed transformers' renamings: {model type: [[pattern, replacement], ...]} in their order."""
    import transformers
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: dict[str, list[list[str]]] = {}
    for key, changes in conversion_mapping._build_checkpoint_conversion_mapping().items():
        rows = [
            [pattern, change.target_patterns[0].replace("\\.", ".")]
            for change in changes
            if type(change) is WeightRenaming
            for pattern in change.source_patterns
        ]
        if rows and key == key.lower():
            found[key] = rows
    for key, like in conversion_mapping._MODEL_TO_CONVERSION_PATTERN.items():
        if like in found and key == key.lower():
            found[key] = found[like]
    return {"transformers": transformers.__version__, "renames": dict(sorted(found.items()))}


def main() -> None:
    document = renames()
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in document["renames"].items())
    text = f'{{"transformers": {json.dumps(document["transformers"])},\n"renames": {{\n{rows}\n}}}}\n'
    RENAMES_FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
