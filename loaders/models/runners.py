"""Runners: a checkpoint loaded in its engine, which computes logits from token ids.

Engines: transformers (plain, bitsandbytes, compressed-tensors, bitnet), hqq, mlx-lm, and llama.cpp through
llama-cpp-python. The caller chooses the dtype of float arithmetic as far as the engine allows it: with float32, the
differences come from the weights and not from bfloat16's rounding. LLM.int8 always computes in float16, bitsandbytes'
4-bit matrices in bfloat16 on a CPU with AVX512-BF16, and llama.cpp rounds activations in any case. Checked with
transformers 5.23, bitsandbytes 0.50, compressed-tensors 0.20, hqq 0.2.8, mlx-lm 0.32, llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module, metadata, util
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loaders.backends.machine import usable_cpus
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.models.foreign import hqq_model_from, mlx_model_from, model_from
from loaders.quantization.scheme import Decoder
from loaders.specs import TensorSpec

METHODS = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors", "bitnet": ""}
INSTALLED_BY = {
    "torch": "'weightmill[models]'",
    "transformers": "'weightmill[models]'",
    "accelerate": "'weightmill[models]'",
    "llama_cpp": "'weightmill[llama-cpp]'",
    "mlx_lm": "mlx-lm",
    "compressed_tensors": "compressed-tensors",
}
DEVICES = ("auto", "cpu", "cuda", "mps")
# What engines raise for files that they cannot load, or when memory is short. They have no common error class, and a
# model that cannot be loaded must end as one clear message of the job, not as a traceback.
FAULTS = (
    ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, MemoryError, IndexError,
    AssertionError,
)  # fmt: skip


class Runner(Protocol):
    """A loaded model."""

    def __call__(self, ids_BT: np.ndarray) -> np.ndarray:
        """Compute logits, float32 (B, T, V), of B sequences of T tokens."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that runs checkpoints, and the Python modules that it needs."""

    name: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.modules if util.find_spec(name) is None)

    @property
    def described(self) -> str:
        """The engine's packages with their versions: "transformers 5.23.0, bitsandbytes 0.50.2"."""
        shown = [n for n in self.modules if n not in ("torch", "accelerate", "transformers") or n == self.name]
        return ", ".join(_versioned(name) for name in shown)


def _versioned(module: str) -> str:
    name = {"llama_cpp": "llama-cpp-python"}.get(module, module.replace("_", "-"))
    # A module on the path without metadata, such as a source checkout.
    with suppress(metadata.PackageNotFoundError):
        return f"{name} {metadata.version(name)}"
    return name


ORIGINAL = Engine("transformers", ("torch", "transformers", "accelerate"))


def engine_of(layout: str, config: Mapping[str, Any] | None) -> Engine:
    """Return the engine that runs a layout ("hf", "hqq", "mlx", "gguf", "packed") with a given config.json.

    Raises:
        BadSpec: no engine here runs it.
    """
    if layout == "gguf":
        return Engine("llama.cpp", ("llama_cpp",))
    if layout == "mlx":
        return Engine("mlx-lm", ("mlx_lm",))
    if layout == "packed":
        raise BadSpec(f"{setting('evaluate')}: nothing here runs packed checkpoints")
    block = (config or {}).get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    if layout == "hqq" or method == "hqq":
        return Engine("hqq", (*ORIGINAL.modules, "hqq"))
    if method is not None and method not in METHODS:
        raise BadSpec(
            f"{setting('evaluate')}: checkpoints of {method} are not run here; known: plain, hqq,"
            f" {', '.join(METHODS)}, MLX,"
            " GGUF"
        )
    extra = METHODS.get(method or "", "")
    return Engine("transformers", (*ORIGINAL.modules, *([extra] if extra else [])))


def engine_of_folder(checkpoint: Checkpoint) -> Engine:
    """Return the engine that runs a checkpoint."""
    first = checkpoint.files[0].name
    if checkpoint.container in ("gguf", "packed"):
        return engine_of(checkpoint.container, None)
    is_mlx = isinstance(checkpoint.config.get("quantization"), dict)
    if checkpoint.container == "safetensors":
        is_mlx = is_mlx or _says_mlx(checkpoint.folder(READS_FOLDERS) / first)
    return engine_of("mlx" if is_mlx else "hqq" if first == "qmodel.pt" else "hf", checkpoint.config)


def _says_mlx(path: Path) -> bool:
    """Whether a safetensors file was written by mlx-lm or for it."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return (file.metadata() or {}).get("format") == "mlx"


def check_engine(engine: Engine, device: str, what: str) -> None:
    """Check that an engine can run; `what` names the checkpoint in messages.

    Raises:
        BadSpec: the engine is not installed, or cannot use the device.
    """
    if engine.missing:
        wanted = " ".join(dict.fromkeys(INSTALLED_BY.get(name, name) for name in engine.missing))
        raise BadSpec(
            f"{setting('evaluate')}: {what} runs in {engine.name}, and {', '.join(engine.missing)} is not installed"
            f" here: pip install {wanted}"
        )
    found = device_of(engine, "auto") if device not in ("auto", "cpu") else device
    if found != device:
        raise BadSpec(f"{setting('device')}: {engine.name} here has no {device}; device=auto takes what there is")


def check_tensors(engine: Engine, device: str, tensors: Iterable[tuple[TensorSpec, Decoder]]) -> None:
    """Check that an engine can compute with an output's quantized tensors.

    Raises:
        BadSpec: it cannot compute with one of them on the device.
    """
    if "bitsandbytes" not in engine.modules:
        return
    from loaders.models.quantized_modules import unusable_4bit

    where = device_of(engine, device)
    stopping = unusable_4bit((spec, scheme, where) for spec, scheme in tensors)
    if stopping is not None:
        raise BadSpec(
            f"{setting('evaluate')}: {stopping}; use a GPU ({setting('device')}=cuda), or keep this tensor by a rule"
        )


def device_of(engine: Engine, device: str) -> str:
    """Return the device that an engine runs on; for "auto", a GPU if the engine can use one."""
    if device != "auto":
        return device
    if engine.name == "mlx-lm":
        import mlx.core as mx

        return "mps" if mx.metal.is_available() else "cpu"
    if engine.name == "llama.cpp":
        llama_cpp: Any = import_module("llama_cpp")
        return _torch_device() if llama_cpp.llama_supports_gpu_offload() else "cpu"
    return _torch_device()


def _torch_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def running(
    checkpoint: Checkpoint, engine: Engine | None, *, device: str, dtype: str, window: int, key: str
) -> Iterator[Runner]:
    """Load a checkpoint in its engine for the length of the block; without an engine, decoded in transformers.

    `dtype`: of the float arithmetic, "float32", "bfloat16" or "float16". `window`: the most tokens of a sequence.

    Raises:
        BadCheckpoint: the engine cannot load it, or leaves some of its weights unset; the message begins with `key`.
    """
    where, name = device_of(engine or ORIGINAL, device), (engine or ORIGINAL).name
    load = LOADERS[name] if engine is not None else _decoded
    with quiet(), _eager() if name in ("transformers", "hqq") else nullcontext():
        try:
            # Engines print progress bars, which would break the job's own.
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                runner, close = load(checkpoint, where, dtype, window)
                # Some engines unpack their weights in the first run, so that only now all errors of loading are known.
                runner(np.zeros((1, 2), np.int32))
        except FAULTS as error:
            said = " ".join(str(error).split())[:400] or type(error).__name__
            raise BadCheckpoint(f"{key}: {name} does not load {checkpoint.address}: {said}") from error
        try:
            yield runner
        finally:
            # Models contain reference cycles. The next model is loaded right after this one, and both rarely fit.
            del runner
            close()
            gc.collect()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logs and warnings of engines: they advise on training, kernels and casts. Errors are raised anyway."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _eager() -> Iterator[None]:
    """Disable torch.compile: with some formats transformers compiles, which needs a C++ compiler and is slow."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def _transformers(checkpoint: Checkpoint, device: str, dtype: str, window: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from loaders.models.skeleton import BUILDING

    auto: Any = AutoModelForCausalLM
    with BUILDING:
        model, about = model_from(
            auto, checkpoint.folder(READS_FOLDERS), dtype=getattr(torch, dtype), device_map={"": device},
            output_loading_info=True,
        )  # fmt: skip
    unset = sorted({*about["missing_keys"], *(str(key) for key in about["mismatched_keys"])})
    if unset:
        raise ValueError(f"{len(unset)} weights are left unset, {unset[0]} first")
    _compute_in(model, getattr(torch, dtype))
    return _torch_runner(model, device), lambda: None


def _compute_in(model: Any, dtype: Any) -> None:
    """Convert a model's float weights to a dtype.

    With bitsandbytes, transformers 5.23 loads the other weights in the config's dtype, whatever `dtype` says.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit modules, which would choose one by their first input
            module.compute_dtype, module.compute_type_is_set = dtype, True


def _decoded(checkpoint: Checkpoint, device: str, dtype: str, window: int) -> Any:
    """Load a checkpoint of any kind as floats in transformers: the original that outputs are compared with."""
    from loaders.models.loading import load_model_and_tokenizer

    if checkpoint.container in ("safetensors", "pytorch") and checkpoint.quantized_by is None:
        return _transformers(checkpoint, device, dtype, window)
    model, _ = load_model_and_tokenizer(checkpoint.folder(READS_FOLDERS), device, decode=True, dtype=dtype)
    return _torch_runner(model, device), lambda: None


def _hqq(checkpoint: Checkpoint, device: str, dtype: str, window: int) -> Any:
    """Load qmodel.pt with hqq; load hqq's safetensors, which transformers 5 no longer reads, into hqq's modules."""
    import torch

    from loaders.models.loading import load_model_and_tokenizer

    if checkpoint.files[0].name == "qmodel.pt":
        model = hqq_model_from(checkpoint.folder(READS_FOLDERS), getattr(torch, dtype), device)
    else:
        model, _ = load_model_and_tokenizer(checkpoint.folder(READS_FOLDERS), device, dtype=dtype)
    return _torch_runner(model.eval(), device), lambda: None


def _torch_runner(model: Any, device: str) -> Runner:
    import torch

    model.eval()

    def run(ids_BT: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(ids_BT.astype(np.int64)).to(device)
        with torch.inference_mode():
            found: np.ndarray = model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
        return found

    return run


def _mlx(checkpoint: Checkpoint, device: str, dtype: str, window: int) -> Any:
    import mlx.core as mx

    untyped: Any = mx
    before = untyped.default_device()
    untyped.set_default_device(untyped.cpu if device == "cpu" else untyped.gpu)
    try:
        model: Any = mlx_model_from(checkpoint.folder(READS_FOLDERS), is_lazy=False)
        # This converts scales too, which a wider float holds exactly.
        model.set_dtype(getattr(untyped, dtype))
    except BaseException:
        untyped.set_default_device(before)
        raise

    def run(ids_BT: np.ndarray) -> np.ndarray:
        return np.array(model(untyped.array(ids_BT.astype(np.int32))).astype(untyped.float32))

    def close() -> None:
        untyped.set_default_device(before)
        untyped.clear_cache()

    return run, close


def _llama_cpp(checkpoint: Checkpoint, device: str, dtype: str, window: int) -> Any:
    llama_cpp: Any = import_module("llama_cpp")
    path = checkpoint.folder(READS_FOLDERS) / checkpoint.files[0].name
    threads = usable_cpus()
    kept = {"float32": 0, "float16": 1, "bfloat16": 30}[dtype]  # ggml_type of the cache of keys and values
    # n_batch and n_ubatch (512 by default) cover the window, so that it is computed in one batch.
    model: Any = llama_cpp.Llama(
        model_path=str(path), n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False,
        n_threads=threads, n_threads_batch=threads, n_gpu_layers=0 if device == "cpu" else -1,
        type_k=kept, type_v=kept,
    )  # fmt: skip

    def run(ids_BT: np.ndarray) -> np.ndarray:
        found = []
        for ids in ids_BT:
            model.reset()
            model.eval([int(each) for each in ids])
            found.append(np.array(model.scores[: len(ids)], np.float32))
        return np.stack(found)

    return run, model.close


LOADERS: dict[str, Callable[[Checkpoint, str, str, int], tuple[Runner, Callable[[], None]]]] = {
    "transformers": _transformers,
    "hqq": _hqq,
    "mlx-lm": _mlx,
    "llama.cpp": _llama_cpp,
}
