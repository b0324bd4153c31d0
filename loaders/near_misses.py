"""What was meant by a name that is not known here: other spellings, short forms, and the words of other tools.

Nothing is taken for something else: a message names what was meant, and whoever typed it types that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Words that people, other tools and other libraries use, and what such a thing may be called here. The first that is
# known where the word was found is meant.
MEANT: dict[str, tuple[str, ...]] = {
    # dtypes, in short and as numpy and ggml call them
    "bf16": ("bfloat16", "gguf_bf16"), "bfloat": ("bfloat16",), "brain": ("bfloat16",),
    "fp16": ("float16", "gguf_f16"), "f16": ("float16", "gguf_f16"), "half": ("float16",), "fp32": ("float32",),
    "f32": ("float32",), "float": ("float32",), "single": ("float32",), "full": ("float32",),
    # devices
    "gpu": ("cuda",), "nvidia": ("cuda",), "rocm": ("cuda",), "hip": ("cuda",), "metal": ("mps", "mlx"),
    "apple": ("mps", "mlx"),
    # quantizations
    "bnb": ("nf4",), "bitsandbytes": ("nf4",), "qlora": ("nf4",), "bnb_4bit": ("nf4",), "bnb4": ("nf4",),
    "load_in_4bit": ("nf4", "quantize"), "load_in_8bit": ("int8", "quantize"), "normal_float": ("nf4",),
    "normalfloat4": ("nf4",), "bnb_8bit": ("int8",), "llm_int8": ("int8",), "llm.int8": ("int8",), "8bit": ("int8",),
    "hqq": ("hqq4",), "half_quadratic": ("hqq4",), "mlx": ("mlx_int4",), "mlx_4bit": ("mlx_int4",),
    "mlx_8bit": ("mlx_int8",), "mlx_q4": ("mlx_int4",), "mlx_q8": ("mlx_int8",), "mixed_4_6": ("mlx_mixed_4_6",),
    "gguf": ("gguf_q4_k_m", "gguf"), "ggml": ("gguf_q4_k_m", "gguf"), "llama.cpp": ("gguf_q4_k_m", "gguf"),
    "q4": ("gguf_q4_k_m",), "q4_k": ("gguf_q4_k_m",), "q5": ("gguf_q5_k_m",), "q5_k": ("gguf_q5_k_m",),
    "q2": ("gguf_q2_k",), "q3": ("gguf_q3_k_m",), "q3_k": ("gguf_q3_k_m",), "importance_matrix": ("imatrix",),
    "q6": ("gguf_q6_k",), "q8": ("gguf_q8_0",), "fp8": ("fp8_dynamic",), "float8": ("fp8_dynamic",),
    "w8a8_fp8": ("fp8_dynamic",), "w8a8_int8": ("w8a8",), "nvfp4": ("nvfp4a16", "mlx_nvfp4"), "bitnet": ("ternary",),
    "b1.58": ("ternary",), "1.58bit": ("ternary",), "1bit": ("ternary",), "tq1_0": ("gguf_tq2_0",),
    "dequantize": ("none",), "dequant": ("none",), "copy": ("none", "keep"),
    # strategies
    "mmap": ("lazy",), "map": ("lazy",), "memmap": ("lazy",), "safetensors": ("lazy",), "parallel": ("multithread",),
    "stream": ("streaming",), "offload": ("streaming",), "pread": ("read",), "uma": ("unified_memory",),
    "gds": ("fastsafetensors",), "model_streamer": ("runai",), "default": ("auto",),
    # yes and no, where there are other words for them
    "off": ("none", "warn", "false"), "no": ("none", "false"), "disable": ("none",), "disabled": ("none",),
    "false": ("none",), "on": ("true", "strict", "mlflow"), "yes": ("true", "strict", "mlflow"),
    "true": ("strict", "mlflow"), "error": ("fail",), "warning": ("warn",), "ignore": ("keep", "warn"),
    "wandb": ("mlflow",), "perplexity": ("quality/perplexity", "logits"), "ppl": ("quality/perplexity", "logits"),
    "kl": ("quality/kl", "logits"), "kld": ("quality/kl", "logits"), "weights": ("strict",),
    "loss": ("error/relative",), "error_relative": ("error/relative",),
    "bits": ("bits", "size/bits_per_weight", "target_bits"),
    # actions and roles of rules
    "skip": ("keep",), "exclude": ("keep",), "copied": ("keep",), "plain": ("keep", "none"), "remove": ("drop",),
    "delete": ("drop",), "convert": ("cast",), "quant": ("quantize",), "attn": ("attention",),
    "self_attn": ("attention",), "ffn": ("mlp",), "feed_forward": ("mlp",), "experts": ("expert",),
    "moe": ("expert",), "lm_head": ("head",), "embed": ("embedding",), "embed_tokens": ("embedding",),
    "embeddings": ("embedding",), "gate": ("router",), "layernorm": ("norm",), "rmsnorm": ("norm",),
    "visual": ("vision",), "ssm": ("linear_attention",), "mamba": ("linear_attention",),
    # engines and layouts
    "transformers": ("transformers", "hf"), "huggingface": ("hf", "transformers"), "hugging_face": ("hf",),
    "pt": ("pytorch",), "torch": ("pytorch",), "bin": ("pytorch",), "pth": ("pytorch",),
    "compressed_tensors": ("vllm", "hf"), "llamacpp": ("gguf",), "llama_cpp": ("gguf",), "mlx_lm": ("mlx",),
    "lora": ("merge_lora",), "peft": ("merge_lora",), "adapter": ("merge_lora",), "llama_pro": ("block_expansion",),
    # settings
    "blocksize": ("group_size",), "block_size": ("group_size",), "groupsize": ("group_size",),
    "q_group_size": ("group_size",), "group": ("group_size",), "gs": ("group_size",), "wbits": ("bits",),
    "w_bit": ("bits",), "w_bits": ("bits",), "q_bits": ("bits",), "nbits": ("bits",), "num_bits": ("bits",),
    "bit": ("bits",), "target_bpw": ("target_bits",), "bpw": ("target_bits", "bits"), "head_bits": ("output_type",),
    "q_mode": ("mode",), "compress_statistics": ("double_quant",), "use_double_quant": ("double_quant",),
    "bnb_4bit_use_double_quant": ("double_quant",), "quant_storage": ("storage_dtype",),
    "bnb_4bit_quant_storage": ("storage_dtype",), "bnb_4bit_compute_dtype": ("compute_dtype",),
    "bnb_4bit_quant_type": ("table", "quantize", "quant"), "quant_type": ("table", "quantize", "quant"),
    "output_tensor_type": ("output_type",), "token_embedding_type": ("embedding_type",), "ftype": ("file_type",),
    "quant_method": ("quantize", "quant"), "quantization": ("quantize", "quant"), "quantise": ("quantize", "quant"),
    "quantization_config": ("quantize", "quant"), "quant_config": ("quantize", "quant"),
    "scheme": ("quantize", "quant"), "load_in_low_bit": ("quantize",), "q": ("quantize", "quant"),
    "outtype": ("quant",), "quant_predicate": ("quant",), "torch_dtype": ("dtype",), "precision": ("dtype",),
    "device": ("backend",), "device_map": ("max_memory", "device", "backend"), "map_location": ("device", "backend"),
    "max_gpu_memory": ("max_memory",), "memory": ("available_memory_gb",), "memory_gb": ("available_memory_gb",),
    "vram": ("available_memory_gb",), "attn_implementation": ("attention",), "low_cpu_mem_usage": ("strategy",),
    "use_mmap": ("strategy",), "loader": ("strategy",), "num_workers": ("workers", "max_workers", "threads"),
    "workers": ("max_workers", "threads"), "n_threads": ("workers", "threads"),
    "threads": ("workers", "max_workers", "multithread"), "num_threads": ("workers",),
    "memory_budget": ("memory_budget_mb",), "budget": ("memory_budget_mb",), "budget_mb": ("memory_budget_mb",),
    "max_memory_mb": ("memory_budget_mb",), "prefetch": ("prefetch_count",), "priority": ("priority_weights",),
    "cache": ("use_cache",), "cache_dir": ("use_cache",), "layers": ("layer_filter", "name"),
    "filter": ("layer_filter",), "include": ("layer_filter", "rules"), "modules": ("layer_filter",),
    "names": ("layer_filter",), "max_error": ("max_relative_error",), "tolerance": ("max_relative_error",),
    "check": ("check_finite",), "shapes": ("expected_shapes",), "model_path": ("path",),
    "model_name": ("name_or_path",), "model_name_or_path": ("name_or_path",), "model_id": ("name_or_path",),
    "pretrained_model_name_or_path": ("name_or_path",), "output": ("head",), "force": ("overwrite",), "url": ("uri",),
    "json": ("format",), "j": ("format",), "output_format": ("format",), "outputformat": ("format",),
    "calib_data": ("calibration",), "calibration_data": ("calibration",), "calibration_dataset": ("calibration",),
    "dataset": ("calibration", "text"), "imatrix": ("imatrix", "calibration"), "max_kld": ("max_kl",),
    "num_samples": ("calibration_tokens", "tokens"), "nsamples": ("calibration_tokens", "tokens"), "ctx": ("window",),
    "context": ("window",),
    "seqlen": ("window",), "max_seq_length": ("window",), "n_ctx": ("window",), "pattern": ("name",),
    "regex": ("name",), "match": ("name",), "tensor": ("name",), "module": ("name",), "target": ("role", "name"),
    "targets": ("role", "name"), "type": ("role", "dtype"), "do": ("action",), "to": ("cast_to",),
    "settings": ("quant",), "limit": ("max_relative_error",), "port": ("uri",),
}  # fmt: skip

CALIBRATED = "needs calibration data, so it is read here and not written; {} has its bits without calibration"
AT_4_BITS = CALIBRATED.format("w4a16 (vLLM, transformers), hqq4 or nf4")
# Dtypes that may be given for a quantization, and their names here.
CASTS = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "f16": "float16",
         "half": "float16", "float32": "float32", "fp32": "float32"}  # fmt: skip
# Quantizations that are known by these names elsewhere, and are not one of those here: why, and what there is.
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("gptq", "awq", "autoround", "auto_round", "gptqmodel", "autoawq", "auto_gptq"), AT_4_BITS),
    **dict.fromkeys(("smoothquant", "smooth_quant"), CALIBRATED.format("w8a8 or fp8_dynamic")),
    "imatrix": "an importance matrix is a setting of gguf_*, such as gguf_q4_k_m: imatrix=FILE",
    "dwq": CALIBRATED.format("the plain type"),
    **dict.fromkeys(("aqlm", "vptq", "exl2", "exl3", "higgs", "spqr", "quip", "quip#", "quark", "torchao", "quanto",
                     "eetq"), "it is neither read nor written here; hqq4, nf4, w4a16 and gguf_q4_k_m have 4 bits"),
    **dict.fromkeys(("4bit", "int4", "4", "w4", "q4bit"), "4 bits are nf4 (transformers), w4a16 (vLLM), mlx_int4"
                    " (mlx-lm) and gguf_q4_k_m (llama.cpp)"),
    **dict.fromkeys(("8", "w8"), "8 bits are int8 (transformers), fp8_dynamic (vLLM), mlx_int8 (mlx-lm) and gguf_q8_0"
                    " (llama.cpp)"),
    **dict.fromkeys(("3", "3bit", "2", "2bit"), "2 and 3 bits are hqq2, hqq3, and mlx_int4 with bits=2 or 3"),
    **dict.fromkeys(CASTS, "it is a cast: none with dtype=bfloat16 (float16, float32), or gguf_bf16, gguf_f16"),
}  # fmt: skip
# Arguments of other tools that nothing here corresponds to, and why.
WITHOUT: dict[str, str] = {
    "trust_remote_code": "code in a checkpoint is never run; leave it out",
    "revision": "it is part of the address: hf://OWNER/NAME@REVISION",
    "token": "set HF_TOKEN in the environment, or log in by `hf auth login`",
    "use_auth_token": "set HF_TOKEN in the environment, or log in by `hf auth login`",
    "hf_token": "set HF_TOKEN in the environment, or log in by `hf auth login`",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "allow_requantize": "leave it out: quantized sources are decoded on the way in, and the plan says so",
    "seed": "leave it out: nothing is random",
    "zero_point": "w4a16_asym has zero points, w4a16 has none",
    "sym": "w4a16 is symmetric, w4a16_asym is not",
    "desc_act": "it is GPTQ's, which needs calibration data and is not written here",
    "damp_percent": "it is GPTQ's, which needs calibration data and is not written here",
    "rules": "they are a job's: weightmill.run(..., rules=...)",
    "leave_output_tensor": "give rules='[{role: head, action: keep}]'",
    "ignore": "give rules='[{role: head, action: keep}]'",
    "modules_to_not_convert": "give rules='[{name: PATTERN, action: keep}]'",
    "llm_int8_skip_modules": "give rules='[{name: PATTERN, action: keep}]'",
    "tensor_type": "give rules='[{name: PATTERN, action: quantize, quant: {type: Q6_K}}]'",
    "skip_layers": "give rules='[{name: PATTERN, action: keep}]'",
    "llm_int8_threshold": "leave it out: the engine decides about outliers when it computes",
    "verbose": "leave it out: progress is shown on standard error",
    "v": "leave it out: progress is shown on standard error",
    "quiet": "leave it out: give 2>/dev/null for silence",
    "progress": "leave it out: progress is shown on standard error",
}  # fmt: skip
IQ = re.compile(r"(?:gguf_)?iq\d\w*")


def plain(name: str) -> str:
    """Return a name as it is compared: in small letters, with underscores, and without what encloses it."""
    text = name.strip().strip("'\"").lower().removeprefix("torch.").removesuffix(".yaml")
    return re.sub(r"[\s\-]+", "_", text.lstrip("-"))


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was meant by another; None if none is near."""
    names = {plain(each): each for each in known}
    wanted = plain(name)
    if wanted in names:
        return names[wanted]
    for each in MEANT.get(wanted, ()):
        if each in names:
            return names[each]
    ending = [each for each in names if wanted and each.endswith(f"_{wanted}")]
    if len(ending) == 1:
        return names[ending[0]]
    # Two letters that were typed the wrong way round are nearer than any others.
    swapped = (wanted[:at] + wanted[at + 1] + wanted[at] + wanted[at + 2 :] for at in range(len(wanted) - 1))
    if (found := next((each for each in swapped if each in names), None)) is not None:
        return names[found]
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    return names[close[0]] if close else None


def near(name: str, known: Iterable[str], phrase: str = "did you mean") -> str:
    """Return "; did you mean 'this'?" for the known name that was meant; empty if none is near."""
    found = meant(name, known)
    return f"; {phrase} {found!r}?" if found is not None and found != name else ""


def unknown_quant(name: object, known: Iterable[str], where: str = "") -> str:
    """Say that there is no such quantization: what it is elsewhere, or what was meant, and which there are.

    `where` says where they are all explained, instead of a list of them.
    """
    names, text = list(known), str(name)
    said = f"unknown {name!r}" if isinstance(name, str) else f"expected a name, found {name!r}"
    elsewhere = ELSEWHERE.get(plain(text)) if plain(text) not in {plain(each) for each in names} else None
    if elsewhere is None and IQ.fullmatch(plain(text)) and meant(text, names) is None:
        elsewhere = CALIBRATED.format("gguf_tq2_0 (2 bits) or gguf_q4_k_m")
    if elsewhere is not None and isinstance(name, str):
        return f"{said}: {elsewhere}{where}"
    hint = near(text, names)
    return f"{said}{hint}{where}" if hint and where else f"{said}{hint}; known: {', '.join(names)}"


def unknown_setting(name: str, known: Iterable[str], word: str = "setting") -> str:
    """Say that there is no such setting: why, or what was meant, and which there are."""
    names = list(known)
    if (why := WITHOUT.get(plain(name))) is not None:
        return f"no such {word}; {why}"
    return f"no such {word}{near(name, names)}; known: {', '.join(names) or 'none'}"
