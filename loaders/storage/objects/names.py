"""Finding a model's files where nothing can be listed: by the names that files of models have, and that these name.

What a report of ours names, what indexes name, the modules of a config's own code, and the folders of a pipeline are
found too. Weights without an index and under other names are not: give the address of the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loaders.storage.base import OUR_REPORT, Entry

WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "adapter_model.safetensors", "adapter_model.bin", "model_weights.bin",
)  # fmt: skip
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS[:4])
MODEL_INDEX = "model_index.json"
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
NAMES = (
    OUR_REPORT, MODEL_INDEX, *CONFIGS, *INDEXES, *WEIGHTS, "model_weights.json", "adapter_config.json",
    "generation_config.json", "quantize_config.json", "quantization_config.json", "hf_quant_config.json",
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "tekken.json", "params.json",
    "chat_template.jinja", "chat_template.json", "image_processor.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md", "README.md",
)  # fmt: skip
# Of the folders that a model_index.json names.
INNER = (
    *CONFIGS, "scheduler_config.json", *INDEXES, *WEIGHTS[:4], "tokenizer.json", "tokenizer.model", "vocab.json",
    "merges.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip
AT_ONCE = 16
JSON_LIMIT = 1 << 30  # bytes of a file that names others
MOST = 100_000  # files that are looked for


def found_by_name(
    find: Callable[[str], Entry | None], read: Callable[[Entry, int, int], memoryview]
) -> tuple[Entry, ...]:
    """Return the files that exist, sorted by name. Errors as those of the functions, which are a store's own."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="find") as pool:
        found: dict[str, Entry] = {}

        def look(names: Iterable[str]) -> list[Entry]:
            wanted = [name for name in dict.fromkeys(names) if name not in found and _is_plain(name)][:MOST]
            new = [entry for entry in pool.map(find, wanted) if entry is not None]
            found.update({entry.name: entry for entry in new})
            return new

        new = look(NAMES)
        while new:
            new = look([name for entry in new for name in _named_in(entry, read)])
    return tuple(sorted(found.values()))


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


def _named_in(entry: Entry, read: Callable[[Entry, int, int], memoryview]) -> list[str]:
    """Return the names that a file gives of others; they are a stranger's."""
    folder, _, base = entry.name.rpartition("/")
    if base not in (OUR_REPORT, MODEL_INDEX, *CONFIGS, *INDEXES) or entry.size > JSON_LIMIT:
        return []
    # What is wrong with it is said when it is read for what it is.
    try:
        document = json.loads(bytes(read(entry, 0, entry.size)))
    except (ValueError, RecursionError):
        return []
    names = _names(base, document) if isinstance(document, dict) else []
    return [f"{folder}/{name}" if folder else name for name in names if isinstance(name, str)]


def _names(base: str, document: dict[str, Any]) -> list[Any]:
    if base == OUR_REPORT:
        files = document.get("files")
        rows = [row.get("name") for row in files if isinstance(row, dict)] if isinstance(files, list) else []
        return [*rows, *_keys(document.get("aux"))]
    if base == MODEL_INDEX:
        parts = [name for name, value in document.items() if isinstance(value, list)]
        return [f"{part}/{name}" for part in parts for name in INNER]
    if base in INDEXES:
        weight_map = document.get("weight_map")
        return list(weight_map.values()) if isinstance(weight_map, dict) else []
    # {"AutoModel": "modeling_x.XModel", "AutoTokenizer": ["tokenization_x.X", null]}, with "REPOSITORY--" before.
    classes = document.get("auto_map")
    flat = (
        [each for value in classes.values() for each in (value if isinstance(value, list) else [value])]
        if isinstance(classes, dict)
        else []
    )
    return [f"{each.partition('.')[0]}.py" for each in flat if isinstance(each, str) and "--" not in each]


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict | list) else []
