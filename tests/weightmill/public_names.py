"""The public names with their signatures, as a text: `python -m tests.weightmill.public_names` writes it anew.

A line that changes is a change of what programs of others are written against: see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import weightmill

GOLDEN = Path(__file__).with_name("public_names.txt")


def signature(value: Any) -> str:
    """Return a signature without the addresses of defaults."""
    # Of pydantic's models: what it shows by itself depends on what was asked of the class before.
    if hasattr(value, "model_fields"):
        return f"(*, {', '.join(value.model_fields)})"
    try:
        text = str(inspect.signature(value))
    except (ValueError, TypeError):
        return ""
    return re.sub(r"<(?:function|object)[^>]*>|<[\w.]+ object at 0x[0-9a-f]+>", "...", text.replace("'", ""))


def members(kind: type) -> Iterator[tuple[str, str]]:
    """Yield what programs may call or read of a class, with what is of it alone."""
    if issubclass(kind, enum.Enum):
        yield from ((name, "") for name in kind.__members__)
        return
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    # What a public class brings along is listed with that class.
    public = {id(getattr(weightmill, name)) for name in weightmill._PUBLIC} - {id(kind)}
    bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in ("loaders", "weightmill")]
    own = {name for base in bases if id(base) not in public for name in vars(base)}
    for name in sorted({*own, *fields, *getattr(kind, "model_fields", {})}):
        if not name.startswith("_") and not name.startswith("model_"):
            value = inspect.getattr_static(kind, name, None)
            value = getattr(value, "__func__", value)  # of a class method or a static one
            yield name, signature(value) if inspect.isfunction(value) else ""


def lines() -> list[str]:
    """Return a line for every name, and one for each member of a class."""
    found = []
    for name in sorted(weightmill._PUBLIC):
        value = getattr(weightmill, name)
        if name == "__version__":
            found.append(name)
        elif inspect.isclass(value):
            takes = "" if issubclass(value, enum.Enum | BaseException) else signature(value)
            found.append(f"class {name}{takes}")
            found += [f"  .{member}{given}" for member, given in members(value)]
        else:
            found.append(f"{name}{signature(value)}")
    return found


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(lines()) + "\n")
