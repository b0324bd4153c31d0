"""llama.cpp's own choice of types: llama_model_quantize as a dry run over a GGUF whose tensors are a hole."""

from __future__ import annotations

import ctypes
import re
from importlib import util
from pathlib import Path
from typing import Any

from tests.llama_log import errors, listening

# Such as "[ 2/ 255] blk.0.attn_k.weight - [3072, 1024, 1, 1], type = bf16, size = 6.00 MiB -> 1.69 MiB (q4_K)"
LINE = re.compile(
    r"\]\s+(?P<name>\S+)\s+- \[[^]]*\], type =\s*(?P<type>\w+),.*?(?:\((?P<made>\w+)\))?\s*$", re.MULTILINE
)
FILE_TYPES = {"gguf_q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def is_there() -> bool:
    """Whether llama.cpp can be asked here."""
    return util.find_spec("llama_cpp") is not None


def types_of(planned: Any, quant: str, folder: Path) -> dict[str, str]:
    """Return the type that llama.cpp gives each tensor of a planned GGUF of floats."""
    joined = planned.assembly.joined
    source = folder / "floats.gguf"
    with source.open("wb") as file:
        file.write(joined.head)
        file.truncate(len(joined.head) + sum(piece.size for piece in planned.pieces))
    found = types_in(source, FILE_TYPES[quant])
    source.unlink()
    return found


def types_in(source: Path, file_type: str) -> dict[str, str]:
    """Return the type that llama.cpp gives each tensor of a GGUF; `file_type` is the name of llama.h's constant."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run = getattr(llama_cpp, file_type), True
    out = source.with_name("none")
    with listening() as said:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    assert status == 0, errors(said)
    lines = LINE.finditer("".join(text for _, text in said))
    return {found["name"]: (found["made"] or found["type"]).upper() for found in lines}
