"""Runners of engines that are not built on torch: mlx-lm, and llama.cpp through llama-cpp-python."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from loaders.backends.machine import usable_cpus
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.models.foreign import mlx_model_from


class Runner(Protocol):
    """A loaded model."""

    def __call__(self, ids_BT: np.ndarray) -> np.ndarray:
        """Compute logits, or hidden states, float32 (B, T, V), of B sequences of T tokens."""


@dataclass(frozen=True, slots=True)
class Running:
    """How a checkpoint is to run: the device, the dtype of floats, the most tokens of a sequence, what is computed."""

    device: str
    dtype: str
    window: int
    states: bool


def mlx_runner(checkpoint: Checkpoint, how: Running) -> Any:
    import mlx.core as mx

    untyped: Any = mx
    before = untyped.default_device()
    untyped.set_default_device(untyped.cpu if how.device == "cpu" else untyped.gpu)
    try:
        model: Any = mlx_model_from(checkpoint.folder(READS_FOLDERS), is_lazy=False)
        # This converts scales too, which a wider float holds exactly.
        model.set_dtype(getattr(untyped, how.dtype))
        computes = _mlx_body(model) if how.states else model
    except BaseException:
        untyped.set_default_device(before)
        raise

    def run(ids_BT: np.ndarray) -> np.ndarray:
        return np.array(computes(untyped.array(ids_BT.astype(np.int32))).astype(untyped.float32))

    def close() -> None:
        untyped.set_default_device(before)
        untyped.clear_cache()

    return run, close


def _mlx_body(model: Any) -> Any:
    """Return the part of a model of mlx-lm that computes hidden states."""
    inside = getattr(model, "language_model", model)
    for name in ("model", "transformer", "backbone"):
        if callable(found := getattr(inside, name, None)):
            return found
    raise ValueError(f"{type(model).__module__}: no part of it is known to compute hidden states")


def llama_cpp_runner(checkpoint: Checkpoint, how: Running) -> Any:
    llama_cpp: Any = import_module("llama_cpp")
    path = checkpoint.folder(READS_FOLDERS) / checkpoint.files[0].name
    threads = usable_cpus()
    kept = {"float32": 0, "float16": 1, "bfloat16": 30}[how.dtype]  # ggml_type of the cache of keys and values
    window = how.window
    # n_batch and n_ubatch (512 by default) cover the window, so that it is computed in one batch.
    model: Any = llama_cpp.Llama(
        model_path=str(path), n_ctx=window, n_batch=window, n_ubatch=window, verbose=False, logits_all=True,
        n_threads=threads, n_threads_batch=threads, n_gpu_layers=0 if how.device == "cpu" else -1,
        type_k=kept, type_v=kept, embedding=how.states,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE if how.states else llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED,
    )  # fmt: skip

    def run(ids_BT: np.ndarray) -> np.ndarray:
        found = []
        for ids in ids_BT:
            model.reset()
            model.eval([int(each) for each in ids])
            found.append(np.array(model.scores[: len(ids)], np.float32))
        return np.stack(found)

    def states(ids_BT: np.ndarray) -> np.ndarray:
        found = []
        for ids in ids_BT:
            # llama-cpp-python has no public function that takes token ids here: its `embed` takes text.
            model._batch.reset()
            model._batch.add_sequence([int(each) for each in ids], 0, True)
            model._ctx.kv_cache_clear()
            model._ctx.decode(model._batch)
            first = llama_cpp.llama_get_embeddings(model._ctx.ctx)
            found.append(np.ctypeslib.as_array(first, (len(ids), model.n_embd())).copy())
        return np.stack(found)

    return states if how.states else run, model.close
