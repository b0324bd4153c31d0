"""What to type instead of a value of the wrong type: 64 for 64.0, true for yes, 1000 for 1GB, null for none."""

from __future__ import annotations

import re
from typing import Any

YES, NO = ("yes", "on", "y", "1", "true", "enabled"), ("no", "off", "n", "0", "false", "disabled", "none")
EMPTY = ("none", "null", "nil", "auto", "default", "all", "max", "unlimited", "")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
BYTES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
LISTS = {
    "rules": "'rules=[{action: keep, role: head}]', or a file: rules=mine.yaml",
    "objective": "'objective=[error/relative]'",
}


def instead(name: str, kind: str, found: Any, is_optional: bool) -> str:
    """Return "; give key=value", where it is plain what was meant; else an empty text. `kind` is pydantic's."""
    text = str(found).strip().lower() if isinstance(found, str | int | float | bool) else ""
    if isinstance(found, str) and is_optional and text in EMPTY:
        return f"; give {name}=null"
    given = None
    if kind.startswith("bool"):
        given = "true" if text in YES else "false" if text in NO else None
    elif kind.startswith("int"):
        number = _number(name, found)
        given = str(int(number)) if number is not None and number == int(number) else None
    elif kind.startswith("float"):
        number = _number(name, found)
        given = None if number is None else f"{number:g}"
    elif kind.startswith("string") and isinstance(found, int | float) and not isinstance(found, bool):
        return f"; quote it twice, as in \"{name}='...'\", or it is read as a number"
    elif kind.startswith(("tuple", "list")) and name in LISTS:
        return f", such as {LISTS[name]}"
    elif kind.startswith(("tuple", "list")) and isinstance(found, str):
        given = f"[{found}]"
    elif kind.startswith(("model", "dict")) and isinstance(found, str) and re.fullmatch(r"[a-z_]+", name):
        return f"; a file of settings chooses by `defaults: [override /{name}: {found}]`"
    return "" if given is None else f"; give {name}={given}"


def _number(name: str, found: Any) -> float | None:
    """Return the number that a text or a float stands for, in the unit that the setting's name ends with."""
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return None
    if isinstance(found, int | float):
        return float(found) if abs(found) < 1e15 else None
    text = found.strip().replace("_", "")
    if text.endswith("%") and re.fullmatch(r"\d+(\.\d+)?", text[:-1]):
        return float(text[:-1]) / 100
    match = SIZE.fullmatch(text)
    if match is None:
        return None
    unit = next((BYTES[each[1]] for each in ("_mb", "_gb") if name.endswith(each)), None)
    if match[2] and unit is None:
        return None
    size = float(match[1]) * BYTES[match[2].lower()]
    return size / unit if unit and match[2] else size
