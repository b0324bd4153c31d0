"""A small pipeline of diffusers, written without diffusers and without the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.making import LLAMA, Raw, llama_tensors, weights, write_checkpoint, write_safetensors

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "tokenizer": ["transformers", "LlamaTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
STEM = "diffusion_pytorch_model"


def transformer_tensors() -> dict[str, Raw]:
    """Two blocks with the names of FLUX, of which each has a layer that is called as the head is."""
    rng = np.random.default_rng(1)
    found = {}
    layers = ("attn.to_q", "norm.linear", "proj_out")
    names = [f"single_transformer_blocks.{block}.{layer}" for block in range(2) for layer in layers]
    for name in ["x_embedder", "norm_out.linear", "proj_out", *names]:
        found[f"{name}.weight"] = weights(rng.standard_normal((64, 128)).astype(np.float32) * 0.05, "BF16")
        found[f"{name}.bias"] = weights(rng.standard_normal(64).astype(np.float32) * 0.05, "BF16")
    return found


def vae_tensors() -> dict[str, Raw]:
    rng = np.random.default_rng(2)
    values = {"decoder.conv_in.weight": (8, 4, 3, 3), "decoder.mid_block.attentions.0.to_q.weight": (64, 64)}
    return {name: weights(rng.standard_normal(shape).astype(np.float32), "F32") for name, shape in values.items()}


def write_component(folder: Path, tensors: Mapping[str, Raw], class_name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{STEM}.safetensors", tensors)
    config = {"_class_name": class_name, "_diffusers_version": "0.42.1", "in_channels": 64, "rope_theta": 10000}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_pipeline(folder: Path, **model_index: Any) -> Path:
    """Write the pipeline; `model_index` are other entries of model_index.json."""
    folder.mkdir(parents=True)
    # An odd layout of the file, which a copy keeps and a new file would not.
    (folder / "model_index.json").write_text(json.dumps({**MODEL_INDEX, **model_index}, indent=3))
    write_component(folder / "transformer", transformer_tensors(), "FluxTransformer2DModel")
    write_component(folder / "vae", vae_tensors(), "AutoencoderKL")
    text = {name.removeprefix("model."): raw for name, raw in llama_tensors(tied=True).items()}
    config = {**LLAMA, "architectures": ["LlamaModel"], "dtype": "bfloat16"}
    write_checkpoint(folder / "text_encoder", text, config=config)
    for name, file in (("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    return folder
