"""The help page of a verb: its purpose, examples, choices and settings, generated from conf/ and the specs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, get_args

from pydantic import BaseModel

from jobs.cli.compose import FOLDER, files_of
from jobs.cli.validation import at_field
from loaders.places import CONF

STATUSES = (
    "0 done, 1 the job failed (a gate, an I/O error, a damaged checkpoint), 2 the request is wrong, 130 interrupted"
)
WIDTH = 116
OWN = (
    f"Choices of your own: {FOLDER}DIR, where DIR/GROUP/NAME.yaml (say DIR/model/mine.yaml, DIR/experiment/ladder.yaml)"
    f" is chosen by GROUP=NAME. Begin with a copy of one of {CONF}, and give it another name."
)


class Described(Protocol):
    """The attributes of a verb that the help page shows."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def spec(self) -> type[BaseModel]: ...
    @property
    def examples(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def positional(self) -> tuple[str, ...]: ...
    @property
    def can_sweep(self) -> bool: ...
    @property
    def config(self) -> str: ...


def help_text(verb: Described, folders: tuple[Path, ...] = ()) -> str:
    """Return the help page of a verb."""
    config = verb.config or verb.name
    usage = " ".join(["python -m jobs." + verb.name, *(name.upper() for name in verb.positional), "[key=value ...]"])
    sweeps = "   (-m sweeps over comma lists)" if verb.can_sweep else ""
    lines = [f"{verb.summary}", "", f"usage: {usage}", f"       weightmill {verb.name} ...{sweeps}"]
    lines += ["", "examples:"]
    for arguments, meaning in verb.examples:
        lines += [f"  python -m jobs.{verb.name} {arguments}".rstrip(), f"      {meaning}"]
    groups = files_of(config, folders)
    if groups:
        lines += ["", "choices (group=option; the first line is what each option says of itself):"]
        for group, options in groups.items():
            lines += [f"  {group}"]
            lines += [f"    {option:18} {_first_comment(path)}" for option, path in options.items()]
        lines += ["", *textwrap.wrap(OWN, WIDTH)]
    lines += ["", "settings (key=value):", *_settings(verb.spec), "", f"exit status: {STATUSES}"]
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""


def _settings(spec: type[BaseModel]) -> Iterator[str]:
    for name, description in _leaves(spec, ""):
        head = f"  {name:28} "
        yield from textwrap.wrap(description, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def settings_of(spec: type[BaseModel]) -> list[str]:
    """Return the dotted names of all settings."""
    return [name for name, _ in _leaves(spec, "") if " " not in name]


def words_of(spec: type[BaseModel], name: str) -> tuple[str, ...]:
    """Return the words that a setting accepts; empty if it is not a choice of words."""
    models = [spec]
    *parents, leaf = name.split(".")
    for part in parents:
        models = [
            m for model in models if part in model.model_fields for m in at_field(model.model_fields[part].annotation)
        ]
    found: list[str] = []
    for model in models:
        if leaf in model.model_fields:
            found += _words(model.model_fields[leaf].annotation)
    return tuple(dict.fromkeys(found))


def _words(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    inner = [word for each in get_args(annotation) if not isinstance(each, str) for word in _words(each)]
    return [a for a in get_args(annotation) if isinstance(a, str)] + inner


def _leaves(spec: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in spec.model_fields.items():
        inner = at_field(field.annotation)
        if name in ("kind", "suffix", "named") or (prefix == "quant." and name == "name"):
            continue
        if not inner or name == "rules":
            yield prefix + name, (field.description or "") + _values(field.annotation)
        seen = set()
        for model in inner:
            own = f"{prefix}{name}." if name != "rules" else "  each of rules: "
            for leaf, description in _leaves(model, own):
                if leaf not in seen:
                    seen.add(leaf)
                    yield leaf, description


def _values(annotation: Any) -> str:
    """Return " (a | b | c)" for a choice of words, else an empty text."""
    words = [a for a in get_args(annotation) if isinstance(a, str)]
    words = words or [w for inner in get_args(annotation) for w in get_args(inner) if isinstance(w, str)]
    return f" ({' | '.join(words)})" if words else ""
