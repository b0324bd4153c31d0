"""Values in the grammar of Hydra's overrides."""

from __future__ import annotations

import json
import re
from typing import Any


def literal(value: Any) -> str:
    """Write a value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return quoted(str(value))


def quoted(text: str) -> str:
    """Quote a text for Hydra 1.3. A backslash is literal there, except in a run of them before a quote or the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def verbatim(text: str) -> str:
    """Return a text for OmegaConf, which resolves ${...} in texts, that stands for the text itself."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
