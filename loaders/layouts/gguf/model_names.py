"""What the name of a model says: organization, base, size, fine-tuning, version, as gguf-py reads it.

It follows Metadata.get_model_id_components in gguf-py's metadata.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
STORED = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
TUNED = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
AS_IT_IS = re.compile(r"(v\d+(?:\.\d+)*|\d.*)")
UNITS = " KMBT"  # thousands, millions, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NameParts:
    """The parts of a model's name; None for what it does not say."""

    name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def title(text: str) -> str:
    """Return a name with spaces for hyphens, and capitals where a word has none and is no number or version."""
    words = text.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not AS_IT_IS.fullmatch(w) else w for w in words)


def name_parts(model_id: str, parameters: int) -> NameParts:
    """Return the parts of ORGANIZATION/NAME or NAME; a size that is far from `parameters` is none."""
    if " " in model_id:
        return NameParts(name=model_id)
    organization, rest = model_id.split("/", 1) if "/" in model_id else ("", model_id)
    owner = None if not organization or organization.startswith(".") else organization
    parts = [part for part in rest.split("-") if part]
    kinds = [_kind(at, parts, parameters) for at in range(len(parts))]
    sized = [part for part, kind in zip(parts, kinds, strict=True) if "size_label" in kind]
    if any(each.isdecimal() for part in sized for each in part):
        for part, kind in zip(parts, kinds, strict=True):
            if "size_label" in kind and part.isalpha():
                kind.discard("size_label")
    _find_base(parts, kinds)

    def joined(wanted: str, without: str = "") -> str | None:
        found = [part for part, kind in zip(parts, kinds, strict=True) if wanted in kind and without not in kind]
        return "-".join(dict.fromkeys(found) if wanted == "size_label" else found) or None

    size, finetune, version = joined("size_label"), joined("finetune"), joined("version", "basename")
    says = size is not None or finetune is not None or version is not None
    base = joined("basename") if says else None
    return NameParts(name=rest, organization=owner, basename=base, finetune=finetune, version=version, size_label=size)


def _kind(at: int, parts: list[str], parameters: int) -> set[str]:
    """Return what a part of a name is, which may be brought to its usual spelling."""
    part, kind = parts[at], set[str]()
    if VERSION.fullmatch(part):
        kind.add("version")
    elif STORED.fullmatch(part):
        kind.add("type")
        parts[at] = part.upper()
    elif at > 0 and SIZE.fullmatch(part):
        part = part.replace("_", ".")
        if part[-1].isdecimal():  # bloom-7b1
            part = part[:-2] + "." + part[-1] + part[-2]
        if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
            part = part[:-1] + part[-1].upper()
        if _is_far(part, parameters):  # a length of context, more likely
            kind.add("finetune")
            part = part[:-1] + part[-1].lower()
        kind = kind or {"size_label"}
        parts[at] = part
    elif at > 0 and TUNED.fullmatch(part):
        kind.add("finetune")
    return kind


def _is_far(size: str, parameters: int) -> bool:
    if parameters == 0:
        return False
    try:
        said = float(size[:-1]) * 1000 ** UNITS.find(size[-1])
    except ValueError:
        return False
    return bool(abs(said - parameters) > 7 * parameters // 8)


def _find_base(parts: Sequence[str], kinds: Sequence[set[str]]) -> None:
    """Find the parts at the beginning that name the model as such; versions at their end are none of them."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("basename")
        else:
            at_start = False
            if not kind:
                kind.add("finetune")
    for kind in reversed(kinds):
        if "basename" not in kind or len(kind) == 1:
            break
        kind.discard("basename")


def rounded(count: float) -> str:
    """Return a number of parameters in thousands, millions, billions or trillions, in two digits at least."""
    unit = next((n for n in (4, 3, 2) if count > 1000**n), 1)
    scaled = count * 10.0 ** (-3 * unit)
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{UNITS[unit]}"


def size_label(tensors: Sequence[tuple[str, Sequence[int]]]) -> tuple[str | None, int]:
    """Return the size as a name has it (8B, or 8x7B for experts) and the number of parameters.

    `tensors` are names and shapes with columns last; stacks of experts count one expert's share each.
    """
    total = shared = expert = counts = stacks = 0
    for name, shape in tensors:
        size = 1
        for length in shape:
            size *= length
        total += size
        if "_exps." in name and len(shape) >= 3:
            count = shape[-2 if ".bias" in name else -3]
            expert += size // max(count, 1)
            counts += count
            stacks += 1
        else:
            shared += size
    if total == 0:
        return None, 0
    return (f"{counts // stacks}x{rounded(shared + expert)}" if counts else rounded(total)), total
