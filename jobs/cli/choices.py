"""The files of choices: what each sets, and what is wrong with one that a person wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from loaders.near_misses import meant, near
from loaders.places import CONF

GLOBAL = "# @package _global_"  # the line by which an experiment's settings stand at the top
OVERRIDE = "override "


@cache
def values_of(path: Path) -> dict[str, Any]:
    """Read a choice's file over those that its `defaults` name."""
    values = yaml.safe_load(path.read_text("utf-8")) or {}
    base: dict[str, Any] = {}
    for other in values.pop("defaults", []):
        if isinstance(other, str) and other != "_self_" and (path.with_name(f"{other}.yaml")).exists():
            base |= values_of(path.with_name(f"{other}.yaml"))
    return {**base, **values}


def about(path: Path) -> str:
    """Return what a choice's file says of itself in its first comment."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


def choice_values(group: str, name: str) -> dict[str, Any]:
    """Return the settings of a choice of a group in conf/."""
    return values_of(CONF / group / f"{name}.yaml")


def with_kind(group: str, kinds: Sequence[Any]) -> list[str]:
    """Return the choices of a group in conf/ whose settings are those of one of some kinds."""
    files = sorted((CONF / group).glob("*.yaml"))
    return [path.stem for path in files if values_of(path).get("kind", "none") in kinds]


def fault_of(path: Path, group: str, choices: Mapping[str, Sequence[str]]) -> str | None:
    """Say what is wrong with a choice's file; None if nothing that is seen from it alone."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return f"{path}: cannot be read: {' '.join(str(error).split())}"
    if values is None and group != "experiment":
        return f"{path}: it is empty; begin with a copy of one of {CONF / group}"
    if not isinstance(values, dict | None):
        return f"{path}: expected settings (key: value), found {_said(values)}"
    entries = (values or {}).get("defaults", [])
    if not isinstance(entries, list):
        return f"{path}: defaults: expected a list, such as [override /quant: nf4, _self_], found {entries!r:.80}"
    for entry in entries:
        wrong = _entry(entry, group, choices)
        if wrong is not None:
            return f"{path}: defaults: {wrong}"
    return None


def _said(values: Any) -> str:
    return "a list" if isinstance(values, list) else f"{values!r:.80}"


def _entry(entry: Any, group: str, choices: Mapping[str, Sequence[str]]) -> str | None:
    """Say what is wrong with an entry of `defaults`, which chooses for another group, or names a file of this one."""
    if isinstance(entry, str):
        known = choices.get(group, ())
        is_known = entry == "_self_" or entry.startswith("/") or entry in known
        return None if is_known or group == "experiment" else f"unknown choice {entry!r}{near(entry, known)}"
    if not isinstance(entry, dict) or len(entry) != 1:
        return f"expected `override /GROUP: NAME`, found {entry!r:.80}"
    [(key, chosen)] = entry.items()
    name = str(key).removeprefix(OVERRIDE).removeprefix("optional ").strip().removeprefix("/")
    if name.startswith("hydra/") or chosen is None:
        return None
    if name not in choices:
        found = meant(name, choices)
        return f"{key}: no such group{f'; did you mean /{found}?' if found else ''}; known: {', '.join(choices)}"
    if group == "experiment" and not str(key).startswith(OVERRIDE):
        return f"{key}: {name} has been chosen already: write `override /{name}: {chosen}`"
    if isinstance(chosen, str) and chosen not in choices[name]:
        return f"{key}: unknown choice {chosen!r}{near(chosen, choices[name])}; known: {', '.join(choices[name])}"
    return None
