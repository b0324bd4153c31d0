"""What the settings of the library are called in a job, for its messages."""

from __future__ import annotations

from loaders.errors import LEAVE

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
    "imatrix",
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
    "leave {it} out, or let a job keep {it} by rules=": "to keep {it}: rules=",
    LEAVE: "keep it by a rule (rules=...)",
    "evaluate": "verify=logits",
    **{name: f"verify.{name}" for name in ("text", "tokens", "window", "device")},
}
# What a command line shows, and what stands for it where the verbs are functions.
HELP_QUANT = "`weightmill help quant` lists all"
SWEEP = "a sweep takes several: {program} run -m {group}={listed}"
IN_PYTHON = {**KEYS, HELP_QUANT: "preset_names() lists all", SWEEP: "a list of them is a sweep: {group}=[{quoted}]"}
