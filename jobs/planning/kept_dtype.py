"""The dtype of what is kept, `output.dtype`, and where it cannot be."""

from __future__ import annotations

from jobs.planning.targets import Target
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import DTYPES, DType
from loaders.errors import BadSpec
from loaders.layouts.diffusers import is_of_diffusers
from loaders.quantization.schemes.plain import Plain
from loaders.rules.kept import usual_dtype


def kept_dtype(target: Target, checkpoint: Checkpoint, *, is_decoded: bool) -> DType | None:
    """Return the dtype to which what a target keeps is cast; None leaves all as it is stored.

    Raises:
        BadSpec: the dtype was asked for where it cannot be.
    """
    wanted = target.kept_dtype
    if wanted == "source":
        return None
    if wanted != "auto":
        _check(target, checkpoint, is_decoded=is_decoded)
        return next(dtype for dtype in DTYPES.values() if dtype.torch == wanted)
    return usual_dtype(checkpoint, target.scheme, is_decoded=is_decoded)


def _check(target: Target, checkpoint: Checkpoint, *, is_decoded: bool) -> None:
    if target.layout.name == "gguf":
        raise BadSpec("output.dtype: a GGUF's tensors have llama.cpp's types; quant.file_type and rules choose them")
    if is_of_diffusers(checkpoint):
        raise BadSpec("output.dtype: components of diffusers have a dtype each; quant=none quant.dtype=... casts them")
    if isinstance(target.scheme, Plain) and target.scheme.dtype is not None:
        raise BadSpec("output.dtype: quant.dtype casts all weights already; give one of the two")
    if checkpoint.quantized_by is not None and not is_decoded:
        raise BadSpec(
            "output.dtype: a quantized source is copied as it is stored; quant.dtype=... decodes it to such floats"
        )
