"""Runners: a checkpoint loaded in its engine, which computes logits, or last hidden states, from token ids.

Engines: transformers (plain, bitsandbytes, compressed-tensors, bitnet), hqq, mlx-lm, and llama.cpp through
llama-cpp-python. The caller chooses the dtype of float arithmetic as far as the engine allows it: with float32, the
differences come from the weights and not from bfloat16's rounding. LLM.int8 always computes in float16, bitsandbytes'
4-bit matrices in bfloat16 on a CPU with AVX512-BF16, and llama.cpp rounds activations in any case. Checked with
transformers 5.23, bitsandbytes 0.50, compressed-tensors 0.20, hqq 0.2.8, mlx-lm 0.32, llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.missing import absent, not_installed
from loaders.models.engine_runners import Runner, Running, llama_cpp_runner, mlx_runner
from loaders.models.foreign import hqq_model_from, model_from
from loaders.quantization.scheme import Decoder
from loaders.specs import TensorSpec

METHODS = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors", "bitnet": ""}
POOLER = re.compile(r"(^|\.)pooler\.")
DEVICES = ("auto", "cpu", "cuda", "mps")
# What engines raise for files that they cannot load, or when memory is short. They have no common error class, and a
# model that cannot be loaded must end as one clear message of the job, not as a traceback.
FAULTS = (
    ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, MemoryError, IndexError,
    AssertionError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that runs checkpoints, and the Python modules that it needs."""

    name: str
    modules: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        return absent(*self.modules)

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
        raise not_installed(f"{setting('evaluate')}: running {what} in {engine.name}", engine.missing)
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
    checkpoint: Checkpoint, engine: Engine | None, *, device: str, dtype: str, window: int, key: str,
    states: bool = False,
) -> Iterator[Runner]:  # fmt: skip
    """Load a checkpoint in its engine for the length of the block; without an engine, decoded in transformers.

    `dtype`: of the float arithmetic, "float32", "bfloat16" or "float16". `window`: the most tokens of a sequence.
    `states`: compute last hidden states, after the last norm, instead of logits.

    Raises:
        BadCheckpoint: the engine cannot load it, leaves some of its weights unset, or fails as it computes; the message
            begins with `key`.
    """
    where, name = device_of(engine or ORIGINAL, device), (engine or ORIGINAL).name
    load, how = LOADERS[name] if engine is not None else _decoded, Running(where, dtype, window, states)
    with quiet(), _eager() if name in ("transformers", "hqq") else nullcontext():
        try:
            # Engines print progress bars, which would break the job's own.
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                runner, close = load(checkpoint, how)
                loaded = [runner]
                del runner
                # Some engines unpack their weights in the first run, so that only now all errors of loading are known.
                loaded[0](np.zeros((1, 2), np.int32))
        except FAULTS as error:
            raise _failed(f"{key}: {name} does not load {checkpoint.address}", error) from error

        def run(ids_BT: np.ndarray) -> np.ndarray:
            try:
                return loaded[0](ids_BT)
            except FAULTS as error:
                raise _failed(f"{key}: {name} fails on {checkpoint.address}", error) from error

        try:
            yield run
        finally:
            # Models contain reference cycles. The next model is loaded right after this one, and both rarely fit.
            loaded.clear()
            close()
            gc.collect()


def _failed(what: str, error: BaseException) -> BadCheckpoint:
    return BadCheckpoint(f"{what}: {' '.join(str(error).split())[:400] or type(error).__name__}")


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


def _transformers(checkpoint: Checkpoint, how: Running) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from loaders.models.heads import auto_of
    from loaders.models.skeleton import BUILDING

    auto: Any = auto_of(checkpoint.config) if how.states else AutoModelForCausalLM
    with BUILDING:
        model, about = model_from(
            auto, checkpoint.folder(READS_FOLDERS), dtype=getattr(torch, how.dtype), device_map={"": how.device},
            output_loading_info=True,
        )  # fmt: skip
    found = {*about["missing_keys"], *(str(key) for key in about["mismatched_keys"])}
    # A pooler comes after the hidden states, and many checkpoints have none.
    unset = sorted(key for key in found if not (how.states and POOLER.search(key)))
    if unset:
        raise ValueError(f"{len(unset)} weights are left unset, {unset[0]} first")
    _compute_in(model, getattr(torch, how.dtype))
    return _torch_runner(model, how, checkpoint.config), lambda: None


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


def _decoded(checkpoint: Checkpoint, how: Running) -> Any:
    """Load a checkpoint of any kind as floats in transformers: the original that outputs are compared with."""
    if checkpoint.container in ("safetensors", "pytorch") and checkpoint.quantized_by is None:
        return _transformers(checkpoint, how)
    return _torch_runner(_ours(checkpoint, how, decode=True), how, checkpoint.config), lambda: None


def _ours(checkpoint: Checkpoint, how: Running, *, decode: bool) -> Any:
    """Load a checkpoint in transformers by weightmill's own loader."""
    from loaders.models.heads import auto_of
    from loaders.models.loading import load_as, load_model_and_tokenizer

    if how.states:
        return load_as(auto_of(checkpoint.config), checkpoint, how.device, dtype=how.dtype, decode=decode)
    model, _ = load_model_and_tokenizer(checkpoint.folder(READS_FOLDERS), how.device, decode=decode, dtype=how.dtype)
    return model


def _hqq(checkpoint: Checkpoint, how: Running) -> Any:
    """Load qmodel.pt with hqq; load hqq's safetensors, which transformers 5 no longer reads, into hqq's modules."""
    import torch

    if checkpoint.files[0].name == "qmodel.pt":
        model = hqq_model_from(checkpoint.folder(READS_FOLDERS), getattr(torch, how.dtype), how.device)
    else:
        model = _ours(checkpoint, how, decode=False)
    return _torch_runner(model.eval(), how, checkpoint.config), lambda: None


def _torch_runner(model: Any, how: Running, config: Mapping[str, Any]) -> Runner:
    import torch

    from loaders.models.heads import is_causal

    model.eval()
    options = {"use_cache": False} if is_causal(config) else {}

    def run(ids_BT: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(ids_BT.astype(np.int64)).to(how.device)
        with torch.inference_mode():
            made = (model.base_model if how.states else model)(input_ids=ids, **options)
            found: np.ndarray = (made.last_hidden_state if how.states else made.logits).float().cpu().numpy()
        return found

    if how.states:
        # compressed-tensors unpacks weights in the first run of the whole model, and not of a part of it.
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=how.device), **options)
    return run


LOADERS: dict[str, Callable[[Checkpoint, Running], tuple[Runner, Callable[[], None]]]] = {
    "transformers": _transformers,
    "hqq": _hqq,
    "mlx-lm": mlx_runner,
    "llama.cpp": llama_cpp_runner,
}
