"""`quantize`: tensors in memory, quantized by a preset to the bytes that a job would write."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

from loaders.dtypes import WEIGHT_DTYPES
from loaders.errors import BadSpec
from loaders.loading.config import LoadConfig
from loaders.loading.encode import WantedTensor
from loaders.loading.in_memory import MemoryLoader, check_known_to_mlx, model_config
from loaders.loading.load import Loading
from loaders.loading.quantized_tensor import QuantizedTensor, QuantizedWeights
from loaders.progress import OnProgress, Progress
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision, Rule
from loaders.words import counted

THE_ONE = Rule(action="quantize", why="it is what quantize was given")


@overload
def quantize(
    tensors: Mapping[str, Any],
    quant: str = "nf4",
    *,
    config: Mapping[str, Any] | None = None,
    device: str | None = None,
    backend: str = "cpu",
    measure: bool = True,
    allow_nonfinite: bool = False,
    max_relative_error: float | None = None,
    progress: OnProgress | None = None,
    **settings: Any,
) -> QuantizedWeights: ...


@overload
def quantize(
    tensors: Any,
    quant: str = "nf4",
    *,
    name: str = "layer.weight",
    device: str | None = None,
    backend: str = "cpu",
    measure: bool = True,
    allow_nonfinite: bool = False,
    max_relative_error: float | None = None,
    progress: OnProgress | None = None,
    **settings: Any,
) -> QuantizedTensor: ...


def quantize(
    tensors: Any,
    quant: str = "nf4",
    *,
    config: Mapping[str, Any] | None = None,
    name: str = "layer.weight",
    device: str | None = None,
    backend: str = "cpu",
    measure: bool = True,
    allow_nonfinite: bool = False,
    max_relative_error: float | None = None,
    progress: OnProgress | None = None,
    **settings: Any,
) -> Any:
    """Quantize a tensor of numpy or torch, or a mapping of them by name such as a state dict.

    quant: a preset, and `settings` those of its own: group_size=128, double_quant=True. A tensor gives a
    `QuantizedTensor`, with the names of the parts of a weight called `name`. A mapping gives a dict, in which the
    engine's rules decide, as in `load_weights`, which tensors are quantized; the others are the given ones themselves.
    The names and the model's `config`, its config.json or transformers' object for it, say what each tensor is; without
    a config, what a layer is usually called does. The dict keeps the config for `save`. Of tied tensors one is
    returned.
    numpy's arrays are of float32, float16, or ml_dtypes' bfloat16.
    device: where parts and dequantized weights go; None: where the first tensor is. backend: where encoders run.
    progress: a function that is called with a `Progress` after each tensor, by one thread at a time.

    Nothing of the tensors is copied but the ranges that are being encoded.

    Raises:
        BadSpec: no such preset, setting or device, a tensor that is no dense one, or one that the preset cannot encode;
            of a mapping no tensor is quantized, and a name says nothing.
        VerifyFailed: weights are NaN or infinite, or errors exceed the limit of the preset.
        Whatever `progress` raises.
    """
    one, model = not isinstance(tensors, Mapping), model_config(config)
    given: dict[str, Any] = {name: tensors} if one else dict(tensors)
    if not given:
        raise BadSpec("tensors: expected some, found an empty mapping")
    strategy = MemoryLoader(given)
    wanted = LoadConfig(
        quantize=quant, settings=settings, device=device or _device_of(next(iter(given.values()))), backend=backend,
        measure=measure, allow_nonfinite=allow_nonfinite, max_relative_error=max_relative_error,
    )  # fmt: skip
    if not one and wanted.quant is not None and wanted.quant.scheme.engine == "mlx":
        check_known_to_mlx(model)
    loading = Loading(
        strategy.checkpoint(model), wanted, wanted.quant, own_rules=(THE_ONE,) if one else (),
        strategy=strategy, on_done=_teller(progress, sum(held.size for held in strategy.held.values())),
    )  # fmt: skip
    is_plain = wanted.quant is None or isinstance(wanted.quant.scheme, Plain)
    kept = () if is_plain else _kept_whole(loading.decisions)
    weights, stats = loading.run()
    return weights[name] if one else QuantizedWeights(weights, model, (*stats.notes, *kept))


def _kept_whole(decisions: Sequence[Decision]) -> Sequence[str]:
    """Return a sentence if a scheme quantizes none of the tensors.

    Raises:
        BadSpec: a matrix is among them whose name says nothing.
    """
    if any(each.action != "keep" for each in decisions):
        return ()
    said = f"none of {counted(len(decisions), 'tensor')} is quantized"
    for tensor, why in ((each.tensor, each.rule.why) for each in decisions):
        if tensor.role == "other" and len(tensor.shape) > 1 and tensor.dtype.name in WEIGHT_DTYPES:
            raise BadSpec(
                f"tensors: {said} ({tensor.name}: {why}); name them as the model does, with its config=, or give a"
                " tensor alone"
            )
    return (f"{said} ({decisions[0].tensor.name}: {decisions[0].rule.why})",)


def _device_of(tensor: Any) -> str:
    device = getattr(tensor, "device", "cpu")  # numpy's arrays have one, too
    return str(device)


def _teller(progress: OnProgress | None, total: int) -> Any:
    """Return a function that counts finished tensors and tells of them, by one thread at a time."""
    lock, began, done = threading.Lock(), time.perf_counter(), 0

    def tell(wanted: WantedTensor) -> None:
        nonlocal done
        with lock:
            done += wanted.tensor.source_bytes
            if progress is not None:
                progress(
                    Progress(
                        doing="quantizing", done=done, total=total, counted="bytes", last=wanted.tensor.name,
                        seconds=time.perf_counter() - began,
                    )
                )  # fmt: skip

    return tell
