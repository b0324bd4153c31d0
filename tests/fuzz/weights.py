"""Inputs of the readers of weights and of what describes them."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import gguf
from loaders.loading.load import load_weights
from loaders.specs import Slot
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from tests.fuzz import whole
from tests.fuzz.cases import Case, Reader
from tests.fuzz.mutations import SIZES, Draw, chance, damaged, json_texts, safetensors_of
from tests.fuzz.seeds import seed

TINY = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
}
WAYS = st.sampled_from(whole.WAYS)


@cache
def parts_of(name: str) -> tuple[Any, bytes]:
    """The header and the data of a seed's first safetensors file."""
    raw = min(seed(name).glob("*.safetensors")).read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@st.composite
def safetensors_cases(draw: Draw) -> Case:
    name = draw(st.sampled_from(("tiny", "tiny", "safetensors", "nf4", "mlx_int4", "w4a16")))
    header, data = (TINY, bytes(25)) if name == "tiny" else parts_of(name)
    if chance(draw, 4):
        text = json.dumps(header).encode()
        raw = draw(damaged(safetensors_of(text, data), 8 + len(text)))
    else:
        text = draw(json_texts(header, ("__metadata__", "z")))
        length = draw(st.sampled_from((*SIZES, len(text) + 1, len(text) + len(data)))) if chance(draw, 12) else None
        raw = safetensors_of(text, data[: draw(st.integers(0, len(data)))] if chance(draw, 10) else data, length)
    return Case(files={"model.safetensors": raw}, words=draw(st.sampled_from((("specs",), ("load",)))))


def read_file(folder: Path, words: tuple[str, ...]) -> None:
    """Read a folder's one weight file."""
    load_weights(next(folder.iterdir())) if words == ("load",) else open_checkpoint(next(folder.iterdir()))


@st.composite
def index_cases(draw: Draw) -> Case:
    name = "model.safetensors.index.json"
    document = json.loads((seed("safetensors") / name).read_text())
    files = (
        "../x.safetensors", "/etc/passwd", "a/../../x", "sub/x.safetensors", "model-00001-of-00002.safetensors",
        "config.json", "\\x", "~/x", ".", "", "model-00001-of-00002.safetensors\x00", "x" * 5000, "\ud800.safetensors",
        "/dev/zero", "extra",
    )  # fmt: skip
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            key = draw(st.sampled_from(sorted(document["weight_map"])))
            document["weight_map"][key] = draw(st.sampled_from(files))
    raw = draw(json_texts(document, ("weight_map", "metadata")))
    return Case("safetensors", {name: raw}, draw(st.sampled_from((("decode",), ("lint",), ("inspect",)))))


CONFIG_SEEDS = (
    "safetensors", "moe", "nf4", "int8", "fp8", "fp8_modelopt", "gptq", "awq", "auto-round", "mlx_int4", "mlx_mxfp4",
    "nvfp4", "mixed", "w4a16", "mxfp4_gpt-oss", "safetensors_hqq", "ternary", "pytorch",
)  # fmt: skip
CONFIG_KEYS = (
    "quantization_config", "quantization", "text_config", "rope_scaling", "rope_parameters", "num_hidden_layers",
    "model_type", "num_experts", "num_local_experts", "tie_word_embeddings", "head_dim", "dtype", "torch_dtype",
    "layer_types", "auto_map", "architectures", "vision_config", "no_rope_layers", "mlp_only_layers", "quant_method",
    "config_groups", "group_size", "bits", "ignore", "targets", "modules_to_not_convert", "weight_block_size",
    "sparsity_config", "hidden_act", "moe_layers", "dynamic", "interleave_moe_layer_step", "sliding_window_pattern",
    "rope_theta", "format", "version", "linear_class", "kv_cache_scheme", "quant_algo", "exclude_modules",
    "llm_int8_skip_modules", "_load_in_4bit", "attention_bias", "num_attention_heads",
)  # fmt: skip
MODEL_TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gemma", "gemma2", "phi3", "gemma3",
    "gemma3_text", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "llama4_text", "bert", "mamba2", "nemotron_h",
    "falcon_h1", "gpt2", "unknown",
)  # fmt: skip
BESIDE = (
    "hf_quant_config.json", "quantize_config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "adapter_config.json",
)  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PRODUCER = {
    "producer": {"name": "modelopt", "version": "0.29"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
        "group_size": 16,
    },
}


@st.composite
def config_cases(draw: Draw) -> Case:
    name = draw(st.sampled_from(CONFIG_SEEDS))
    config = json.loads((seed(name) / "config.json").read_text())
    files = {}
    if chance(draw, 3):
        config["model_type"] = draw(st.sampled_from(MODEL_TYPES))
    if chance(draw, 7):
        config = {**{key: config.get(key) for key in ("model_type", "quantization_config")}, "text_config": config}
    if chance(draw, 5):
        files[draw(st.sampled_from(BESIDE))] = draw(json_texts(PRODUCER, CONFIG_KEYS))
    if draw(st.booleans()):
        config.setdefault("rope_parameters", ROPE)
    files["config.json"] = draw(json_texts(config, CONFIG_KEYS))
    return Case(name, files, draw(WAYS))


GGUF_SEEDS = st.sampled_from(("gguf", "gguf_q8_0", "gguf_q4_0"))


@cache
def gguf_of(name: str) -> tuple[str, bytes, Any, Any]:
    """The name and bytes of a seed's GGUF, its metadata, and its tensors."""
    path = next(seed(name).glob("*.gguf"))
    files = PinnedFiles(Folder(path.parent))
    return path.name, path.read_bytes(), gguf.read_metadata(files, path.name), gguf.read_specs(files, path.name)


@st.composite
def gguf_cases(draw: Draw) -> Case:
    name = draw(GGUF_SEEDS)
    file, raw, _, _ = gguf_of(name)
    return Case(name, {file: draw(damaged(raw, draw(st.sampled_from((24, 200, 3000, 6000)))))}, draw(WAYS))


GGUF_KEYS = (
    "llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "split.no", "split.count",
    "split.tensors.count", "tokenizer.ggml.unknown_token_id", "llama.attention.head_count_kv",
    "tokenizer.chat_template", "general.alignment", "tokenizer.ggml.pre", "llama.expert_used_count",
)  # fmt: skip
GGUF_TEXTS = (
    "", "llama", "qwen2", "qwen3moe", "gpt2", "none", "linear", "yarn", "\x00", "x" * 10000, "\x1b[2J", "default",
    "llama-bpe",
)  # fmt: skip
GGUF_NAMES = ("blk.99999999999.attn_q.weight", "x", "blk.-1.ffn_up.weight", "é\x1b[0m", "token_embd.weight.x")
PIECES = ("<s>", "a", "ab", "▁", "▁a", "<0x41>", "é", "\x1b]0;x\x07", "z" * 3000)


@st.composite
def gguf_values(draw: Draw, rows: int) -> gguf.MetadataValue:
    """Values of every type of metadata, with arrays as long as the vocabulary among them."""
    how = draw(st.sampled_from(("integer", "float", "text", "boolean", "integers", "floats", "texts")))
    count = draw(st.sampled_from((0, 1, 5, rows)))
    if how == "integer":
        kind = draw(st.sampled_from((0, 1, 2, 3, 4, 5, 10, 11)))
        bits = struct.calcsize("<" + gguf.SCALARS[kind]) * 8
        least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if gguf.SCALARS[kind].islower() else (0, (1 << bits) - 1)
        return gguf.MetadataValue(kind, draw(st.sampled_from((0, 1, 2, 3, 7, 64, most, least))))
    if how == "float":
        numbers = st.sampled_from((0.0, -1.0, 1e30, float("nan"), float("inf")))
        return gguf.MetadataValue(draw(st.sampled_from((6, 12))), draw(numbers))
    if how == "text":
        return gguf.text(draw(st.sampled_from(GGUF_TEXTS)))
    if how == "boolean":
        return gguf.boolean(draw(st.booleans()))
    if how == "integers":
        return gguf.int32s([draw(st.sampled_from((-1, 0, 1, 2, 2**31 - 1)))] * count)
    if how == "floats":
        return gguf.float32s([draw(st.sampled_from((0.0, 1e30, float("nan"))))] * count)
    return gguf.texts([draw(st.sampled_from((*PIECES, "", "a b", "é é é")))] * count)


@st.composite
def gguf_metadata_cases(draw: Draw) -> Case:
    name = draw(GGUF_SEEDS)
    file, _, metadata, specs = gguf_of(name)
    metadata = dict(metadata)
    rows = int(metadata["llama.vocab_size"].value)
    if chance(draw, 3):
        tokens = [f"{draw(st.sampled_from(PIECES))}{i}" for i in range(4)] + [f"t{i}" for i in range(4, rows)]
        kinds = [draw(st.sampled_from((1, 2, 3, 4, 5, 6, 7)))] * 4 + [1] * (rows - 4)
        metadata |= {
            "tokenizer.ggml.model": gguf.text("llama"),
            "tokenizer.ggml.tokens": gguf.texts(tokens),
            "tokenizer.ggml.scores": gguf.float32s([0.0] * rows),
            "tokenizer.ggml.token_type": gguf.int32s(kinds),
        }
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from((*sorted(metadata), *GGUF_KEYS)))
        if chance(draw, 6):
            metadata.pop(key, None)
        else:
            metadata[key] = draw(gguf_values(rows))
    slots, at = [], 0
    odd = draw(st.integers(0, 3 * len(specs)))
    for number, spec in enumerate(specs):
        shape, own = spec.shape, spec.name
        if number == odd:
            lengths = st.sampled_from((0, 1, 2, 2**31, *spec.shape))
            shape = tuple(draw(st.lists(lengths, max_size=4))) if draw(st.booleans()) else shape
            own = draw(st.sampled_from((own, *GGUF_NAMES)))
        slots.append((Slot(name=own, dtype=spec.dtype, shape=shape, offset=at), at))
        at += -(-spec.size // gguf.ALIGNMENT) * gguf.ALIGNMENT
    return Case(name, {file: gguf.header(metadata, slots) + bytes(at)}, draw(WAYS))


@st.composite
def packed_cases(draw: Draw) -> Case:
    name, file = draw(
        st.sampled_from(
            (
                ("packed", "model_weights.json"),
                ("packed_moe", "model_weights.json"),
                ("packed_moe", "packed_experts/layout.json"),
            )
        )
    )
    document = json.loads((seed(name) / file).read_text())
    keys = ("bits", "moe_layers", "num_tensors", "config", "components", "expert_size", "num_experts")
    return Case(name, {file: draw(json_texts(document, keys))}, draw(WAYS))


PAYLOADS = (
    "awq", "fp8", "gptq", "int8", "mlx_int4", "mlx_mxfp4", "mxfp4_gpt-oss", "nf4", "nf4_double", "nvfp4",
    "safetensors_hqq", "ternary", "w4a16", "gguf_q4_0",
)  # fmt: skip
SIDES = ("g_idx", "scales", "qzeros", "absmax", "shape", "nbits", "axis", "group_size", "SCB", "scale", "zero")


@st.composite
def payload_cases(draw: Draw) -> Case:
    """Scales, zeros, maps and codes of quantized weights, in files whose headers are right."""
    name = draw(st.sampled_from(PAYLOADS))
    path = min(path for path in seed(name).iterdir() if path.suffix in (".safetensors", ".gguf"))
    data = bytearray(path.read_bytes())
    if path.suffix == ".gguf":
        return Case(name, {path.name: draw(damaged(bytes(data)))}, ("load", "float32"))
    [length] = struct.unpack("<Q", data[:8])
    entries = [(key, e["data_offsets"]) for key, e in json.loads(data[8 : 8 + length]).items() if key != "__metadata__"]
    sides = [(key, at) for key, at in entries if key.endswith(SIDES) or "quant_state" in key or "quant_map" in key]
    for _ in range(draw(st.integers(1, 3))):
        _, (start, stop) = draw(st.sampled_from(entries if chance(draw, 5) or not sides else sides))
        begin, size = 8 + length + start, stop - start
        piece = draw(damaged(bytes(data[begin : begin + size])))
        if chance(draw, 3):
            piece = draw(st.sampled_from((b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\x7f"))) * size
        data[begin : begin + size] = piece[:size].ljust(size, b"\0")
    return Case(name, {path.name: bytes(data)}, ("load", "float32"))


NAMES = (
    "a[/b]", "[bold]x", "[link=file:///etc/passwd]x", "\x1b]0;x\x07", "\x1b[2J", "a\nb", "a\tb", "\r", "\ud800",
    "\udce9", "é😀", ":smile:", "x" * 5000, "", " ", ".", "..", "a/../../b", "/etc/x", "x\x00", "\u202ereversed",
    "%s%n", "{0}", "${x}", "$(id)", "`id`", "'", '"', "\\", "__metadata__", "lm_head.weight", "__proto__", "None",
    "nan", "0", "{expert:>99}", "model.layers.99999999999999999999.mlp.up_proj.weight",
    "model.layers.-1.mlp.up_proj.weight",
)  # fmt: skip
SMALL = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@st.composite
def name_cases(draw: Draw) -> Case:
    """Names of tensors, and words of a config, that consoles, formats, paths or databases may misunderstand."""
    names = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "x.weight"]
    odd = st.sampled_from(NAMES)
    for _ in range(draw(st.integers(1, 2))):
        at, word = draw(st.integers(0, 3)), draw(odd)
        names[at] = draw(st.sampled_from((word, names[at] + word, word + names[at], names[at].replace("layers", word))))
    header, start = {}, 0
    for index, name in enumerate(dict.fromkeys(names)):
        shape = [64] if index == 2 else [64, 64]
        size = 2 * 64 ** len(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    config: dict[str, Any] = dict(SMALL)
    if chance(draw, 3):
        config["model_type"] = draw(odd)
    if chance(draw, 3):
        key = draw(st.sampled_from(("architectures", "auto_map", "dtype", "x")))
        config[key] = draw(st.sampled_from((draw(odd), [draw(odd)], {draw(odd): draw(odd)})))
    weights = safetensors_of(json.dumps(header).encode(), b"\x80\x3f" * (start // 2))
    files = {"model.safetensors": weights, "config.json": json.dumps(config).encode()}
    presets = st.sampled_from(("nf4", "none", "mlx_int4", "w4a16", "hqq4", "gguf_q8_0"))
    verbs = (("inspect",), ("lint",), ("plan", draw(presets)), ("run", draw(presets)), ("diff",), ("recommend",))
    return Case(files=files, words=draw(st.sampled_from(verbs)))


def read_names(folder: Path, words: tuple[str, ...]) -> None:
    """Run a verb; what is published must verify, and what is not must not be there."""
    import shutil

    verb, *preset = words
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    asked = {
        "inspect": (f"model.path={folder}", "tensors=all"),
        "lint": (str(folder),),
        "diff": (f"a={folder}", f"b={seed('safetensors')}"),
        "recommend": (f"path={folder}",),
    }.get(verb, (f"model.path={folder}", f"output.path={out}", f"quant={''.join(preset)}"))
    if verb == "run":
        asked = (*asked, "tracking=none", "cluster=local")
    status = whole.run_verb(verb, *asked)
    if verb != "run":
        whole.refuse(status)
    else:
        left = [path.name for path in folder.parent.glob(".out.*")]
        assert (status == 0) == out.exists(), f"status {status}, output {out.exists()}"
        assert not left or status == 1, f"status {status}, left {left}"
        for each in left:
            shutil.rmtree(folder.parent / each)
        if status == 0:
            assert whole.run_verb("verify", f"output.path={out}", "cluster=local") == 0, (
                "published, and does not verify"
            )
        whole.refuse(status)


READERS = {
    "safetensors": Reader(safetensors_cases(), read_file, 150),
    "index": Reader(index_cases(), whole.read, 40),
    "config": Reader(config_cases(), whole.read, 50),
    "gguf": Reader(gguf_cases(), whole.read),
    "gguf_metadata": Reader(gguf_metadata_cases(), whole.read),
    "packed": Reader(packed_cases(), whole.read),
    "payload": Reader(payload_cases(), whole.read, 40),
    "names": Reader(name_cases(), read_names, 10),
}
