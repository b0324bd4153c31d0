"""Reading a folder as verbs do: open it, decode, plan, look for faults, load, show."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import WeightmillError
from loaders.lint import lint_at
from loaders.loading.load import load_weights
from loaders.tensors.sources import tensors_of
from tests import passes

PRESETS = (
    "nf4", "int8", "hqq4", "mlx_int4", "mlx_mixed_4_6", "w4a16", "fp8_dynamic", "nvfp4a16", "gguf_q8_0", "gguf_q4_k_m",
    "ternary", "ternary_aggressive", "none", "mxfp4", "fp8_block",
)  # fmt: skip
WAYS = (
    *(("plan", preset) for preset in PRESETS), ("decode",), ("split",), ("lint",), ("load",), ("load", "float32"),
    ("inspect",),
)  # fmt: skip


def read(folder: Path, words: tuple[str, ...]) -> None:
    """Read a folder in the way of WAYS."""
    way, *rest = words
    if way == "plan":
        passes.plan(folder, *rest)
    elif way in ("decode", "split"):
        tensors_of(open_checkpoint(folder), decode=True, split=way == "split")
    elif way == "lint":
        lint_at(folder)
    elif way == "load":
        load_weights(folder, dtype=rest[0] if rest else None)
    elif way == "inspect":
        refuse(run_verb("inspect", f"model.path={folder}", "tensors=all"))
    else:
        raise ValueError(words)


def refuse(status: int) -> None:
    """Raise what counts as a refusal, if a verb ended with one."""
    if status:
        raise WeightmillError(f"status {status}")


def run_verb(verb: str, *arguments: str) -> int:
    """Run a verb; its status must be one of those that are documented, and its text nothing that terminals obey."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status: int = importlib.import_module(f"jobs.{verb}").main(list(arguments))
    text = said.getvalue()
    assert status in (0, 1, 2), f"{verb}: status {status}"
    assert "\x1b" not in text, f"{verb} prints a file's escape codes"
    assert "Traceback" not in text, f"{verb}: {text[-500:]}"
    return status
