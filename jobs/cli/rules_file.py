"""A file of rules, as an override of a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jobs.cli.literals import literal
from loaders.limits import RULE_VALUES


def rules_of(path: str) -> tuple[str, str | None]:
    """Read a YAML file's list of rules and return it as an override, or the problem with it."""
    try:
        rules = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
        if not isinstance(rules, list):
            return "", f"rules: expected a list of rules in {path}, found {type(rules).__name__}"
        _count_values(rules, RULE_VALUES)
        return f"++rules={literal(rules)}", None
    # Lists can nest deeper than a parser recurses, and hold themselves or, many times, one another.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return "", f"rules: cannot read {path}: {' '.join(str(error).split())}"


def _count_values(value: Any, left: int) -> int:
    """Return what is left of a number of values; a value counts each time that it is written out.

    Raises:
        ValueError: nothing is left.
    """
    left -= 1
    if left < 0:
        raise ValueError(f"more than {RULE_VALUES} values")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        left = _count_values(inner, left)
    return left
