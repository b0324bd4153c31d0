"""A Llama-shaped checkpoint of random weights, for benchmarks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import numpy as np

from jobs.cli.verb import note
from loaders.containers import safetensors, writer_of
from loaders.dtypes import DTYPES
from loaders.places import DEMO
from loaders.specs import StoredSpec, StoredTensor


def random_bf16(rng: np.random.Generator, count: int) -> np.ndarray:
    values = rng.standard_normal(count, np.float32) * np.float32(0.02)
    # bfloat16 is the upper half of a float32. Truncating is good enough for random weights.
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def make_llama(folder: Path, gb: float, shards: int = 8) -> None:
    """Write a Llama-shaped checkpoint of about `gb` gigabytes (1e9 bytes) of random bfloat16 weights."""
    hidden, inner, vocabulary = 2048, 5632, 32000
    layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, round((gb * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for index in range(layers):
        name = f"model.layers.{index}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{name}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    folder.mkdir(parents=True)
    pool = random_bf16(np.random.default_rng(0), vocabulary * hidden)
    names = sorted(shapes)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        laid = safetensors.lay_out(file, [StoredTensor(n, StoredSpec(DTYPES["BF16"], shapes[n])) for n in part])
        writer = writer_of(folder / file, laid)
        for slot in laid.slots:
            # Tensors are rotations of one pool, which is far faster than drawing them all. The CRC of the name is the
            # same in every run; Python's hash() of a string is not.
            start = crc32(slot.name.encode()) % 4096 * 64
            data = np.roll(pool[: slot.size // 2], start)
            writer.write(slot, 0, data.view(np.uint8).data)
        writer.seal()
        writer.close()
        weight_map.update(dict.fromkeys(part, file))
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Some engines' tools convert no model without a tokenizer. They do not compare it with the model.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)


@contextmanager
def given_or_random(path: str | None, gb: float, folder: str | None) -> Iterator[tuple[Path, Path]]:
    """Yield a scratch folder, removed at the end, and a source: the given one, or a random Llama in that folder."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as made:
        work = Path(made)
        if path is not None:
            yield work, Path(path)
            return
        source = work / "random-llama"
        note(f"making a random Llama of {gb:g} GB in {source}")
        make_llama(source, gb)
        yield work, source
