"""The placement of modules on devices, within the memory that each device may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.models.quantized_modules import QuantizedWeight
from loaders.models.skeleton import Skeleton, set_parameter


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """The limits of a device that decide how weights are loaded to it."""

    device: str

    def dtype(self, asked: str | None, checkpoint: Checkpoint) -> str | None:
        """Return the dtype of float weights on the device, None for the checkpoint's; on MPS, float16 by default.

        Raises:
            BadSpec: bfloat16 is asked for on MPS.
        """
        if not self.device.startswith("mps"):
            return None if asked == "auto" else asked
        found = load_dtype(checkpoint.config) if asked == "auto" else None
        if asked == "bfloat16" or (found is not None and found.name == "BF16"):
            raise BadSpec("dtype: MPS has no bfloat16 matrix products worth having; give float16")
        return None if asked == "auto" else asked or "float16"


def place_of(device: str) -> DeviceLimits:
    """Return the limits of a device."""
    return DeviceLimits(device)


@dataclass(frozen=True, slots=True)
class Places:
    """The device of each module by its path; `modules` is empty if all are on `device`."""

    device: str
    modules: Mapping[str, str]

    @property
    def device_of(self) -> Callable[[str], str]:
        def find(name: str) -> str:
            held = [m for m in self.modules if name == m or name.startswith(m + ".") or not m]
            return self.modules[max(held, key=len)] if held else self.device

        return find


def device_map_of(
    skeleton: Skeleton, held: Mapping[str, QuantizedWeight], limits: Mapping[str, int], device: str
) -> Places:
    """Place modules on the devices of `limits` in their order, without splitting decoder blocks.

    Raises:
        BadSpec: the model does not fit.
    """
    if not limits:
        return Places(device, {})
    size = bytes_of(skeleton, held)
    if sum(limits.values()) < size:
        raise BadSpec(
            f"max_memory: the model takes {size} bytes, {dict(limits)} are {sum(limits.values())};"
            " quantize it, or use LoadingStrategy.STREAMING, which holds a few modules at a time"
        )
    if len(limits) == 1:
        return Places(next(iter(limits)), {})
    from accelerate import infer_auto_device_map

    # accelerate names CUDA devices by their numbers.
    keys = {int(name.partition(":")[2]) if name.startswith("cuda:") else name: n for name, n in limits.items()}
    with _as_stored(skeleton.model, held):
        found = infer_auto_device_map(
            skeleton.model, max_memory=keys, no_split_module_classes=_blocks(skeleton.model), dtype=skeleton.model.dtype
        )
    if "disk" in found.values():
        raise BadSpec(f"max_memory: blocks do not divide over {dict(limits)}; give one of them more, or use STREAMING")
    return Places(device, {m: f"cuda:{d}" if isinstance(d, int) else str(d) for m, d in found.items()})


@contextmanager
def _as_stored(model: Any, held: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Within the block, weights that are held quantized are bytes on meta, as many as are stored of them."""
    import torch

    before = {name: model.get_parameter(name) for name in held}
    for name, each in held.items():
        packed = torch.empty(each.size, dtype=torch.uint8, device="meta")
        set_parameter(model, name, torch.nn.Parameter(packed, requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in before.items():
            set_parameter(model, name, parameter)


def bytes_of(skeleton: Skeleton, held: Mapping[str, QuantizedWeight]) -> int:
    """Return the bytes of the loaded model's parameters; those held quantized count as stored, tied ones once."""
    total, seen = 0, set()
    for name, parameter in skeleton.model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if name in held:
            total += held[name].size
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def _blocks(model: Any) -> list[str]:
    """Return the class names of modules in module lists: decoder blocks, in transformers' models."""
    from torch import nn

    return sorted({type(item).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for item in m})


def hold_to(model: Any, places: Places) -> Any:
    """Add accelerate's hooks that move activations between devices, if there are several."""
    if len(set(places.modules.values())) < 2:
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, device_map=dict(places.modules))
