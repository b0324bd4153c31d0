"""What the settings of the library are called in a job, for its messages."""

from __future__ import annotations

QUANT = [
    "dtype",
    "group_size",
    "double_quant",
    "pure",
    "engine",
    "among",
    "target_bits",
    "target_gb",
    "calibration",
    "chosen",
]
KEYS = {
    "checkpoint": "model.path",
    "output": "output.path",
    **{name: f"output.{name}" for name in ("layout", "container", "split")},
    "transform": "transform",
    "num_blocks": "transform.num_blocks",
    "adapter": "transform.path",
    "peft's merge_and_unload": "weightmill run transform=merge_lora transform.path={adapter} model.path=BASE",
    "quantize": "quant",
    **{name: f"quant.{name}" for name in QUANT},
    "evaluate": "verify=logits",
    **{name: f"verify.{name}" for name in ("text", "tokens", "window", "device")},
}
