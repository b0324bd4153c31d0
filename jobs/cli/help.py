"""The help page of a verb: its purpose, examples, choices and settings, generated from conf/ and the specs."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import yaml
from pydantic import BaseModel

from jobs.cli.choices import about, values_of
from jobs.cli.compose import FOLDER, files_of
from jobs.cli.literals import literal
from jobs.cli.validation import at_field
from loaders.faults import kinds_of
from loaders.places import CONF

STATUSES = (
    "0 done, 1 the job failed (a gate, an I/O error, a damaged checkpoint), 2 the request is wrong, 130 interrupted"
)
WIDTH = 80
MANY = 6  # groups of choices, of which a page only has the names
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
    """Return the help page of a verb: a screen, with the names of what has pages of its own."""
    groups = files_of(verb.config or verb.name, folders)
    lines = [*_head(verb), "", *_examples(verb)]
    if groups:
        chosen = defaults_of(verb.config or verb.name)
        names = " ".join(f"{group}={chosen.get(group) or 'NAME'}" for group in groups)
        lines += ["", *_wrapped("choices, with their defaults: ", names)]
    if len(groups) < MANY:
        lines += ["", "settings (key=value):", *_settings(verb.spec, without=groups)]
    else:
        names = ", ".join(name for name, _ in _leaves(verb.spec, "") if "." not in name and " " not in name)
        lines += _wrapped("settings beside those of choices: ", names)
    lines += ["", *_where_to_look(verb, groups), *_wrapped("exit status: ", STATUSES)]
    return "\n".join(lines)


def whole_text(verb: Described, folders: tuple[Path, ...] = ()) -> str:
    """Return the page of a verb with all its choices and settings."""
    groups = files_of(verb.config or verb.name, folders)
    lines = [*_head(verb), "", *_examples(verb)]
    if groups:
        lines += ["", "choices (group=option; the first line is what each option says of itself):"]
        for group, options in groups.items():
            lines += [f"  {group}", *_options(options)]
        lines += ["", *textwrap.wrap(OWN, WIDTH)]
    lines += ["", "settings (key=value):", *_settings(verb.spec), "", *_wrapped("exit status: ", STATUSES)]
    return "\n".join(lines)


def group_text(verb: Described, group: str, folders: tuple[Path, ...] = ()) -> str:
    """Return the page of a group: its choices, and the settings that they have."""
    options = files_of(verb.config or verb.name, folders).get(group, {})
    lines = [f"{group}=NAME, one of:", *_options(options), ""] if options else []
    lines += [f"settings of {group} (each choice has some of them):" if options else "settings:"]
    lines += _settings(verb.spec, within=group)
    if options:
        shown = next(iter(options)) if group != "quant" else "nf4"
        lines += ["", f"weightmill help {group}={shown}    one choice, with its settings and their defaults"]
        lines += textwrap.wrap(OWN, WIDTH)
    return "\n".join(lines)


def choice_lines(verb: Described, group: str, path: Path) -> list[str]:
    """Return what a choice says of itself, and its settings with defaults and meaning."""
    values = {key: value for key, value in values_of(path).items() if key not in ("kind", "name") or group == "model"}
    meanings = _meanings(verb.spec, group, values_of(path).get("kind"))
    for name in meanings:
        values.setdefault(name, None)
    lines = [f"{group}={path.stem}: {about(path)}", ""]
    if group == "experiment":
        return [*lines, f"It is {path}"]
    lines += ["settings, with the defaults of this choice:"] if values else ["It has no settings."]
    for name, value in values.items():
        head = f"  {group}.{name}={plain_literal(value)}"
        said = meanings.get(name, "")
        indent = " " * 30
        lines += textwrap.wrap(said, WIDTH, initial_indent=f"{head:28}  ", subsequent_indent=indent) or [head]
    return lines


def setting_lines(verb: Described, name: str) -> list[str]:
    """Return what one setting means, its default, and which choices have it."""
    [said, *_] = [said for each, said in _leaves(verb.spec, "") if each == name]
    group, _, leaf = name.partition(".")
    having = {
        option: values_of(path)[leaf]
        for option, path in files_of(verb.config or verb.name).get(group, {}).items()
        if leaf in values_of(path)
    }
    lines = _wrapped(f"{name}: ", said)
    if len({str(value) for value in having.values()}) == 1:
        lines += _wrapped("default: ", f"{plain_literal(next(iter(having.values())))}")
    elif having:
        lines += _wrapped("default: ", ", ".join(f"{plain_literal(v)} in {option}" for option, v in having.items()))
    elif not group or name in own_values(verb.config or verb.name):
        lines += _wrapped("default: ", plain_literal(own_values(verb.config or verb.name)[name]))
    return lines


def _head(verb: Described) -> list[str]:
    usage = " ".join(
        [
            "weightmill " + verb.name,
            *(f"[{name.rpartition('.')[2].upper()}]" for name in verb.positional),
            "[key=value ...]",
        ]
    )
    sweeps = "   (-m sweeps over comma lists)" if verb.can_sweep else ""
    return [
        *textwrap.wrap(verb.summary, WIDTH),
        "",
        f"usage: {usage}",
        f"       or python -m jobs.{verb.name} ...{sweeps}",
    ]


def _examples(verb: Described) -> list[str]:
    lines = ["examples:"]
    for arguments, meaning in verb.examples:
        command = f"  weightmill {verb.name} {arguments}".rstrip()
        one = f"{command:44}  # {meaning}"
        # A line that goes on is cut between words, which a shell joins again.
        folded = textwrap.wrap(
            command.strip(), WIDTH - 2, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False,
            drop_whitespace=True, initial_indent="  ",
        )  # fmt: skip
        cut = [f"{line} \\" for line in folded[:-1]] + folded[-1:]
        lines += [one] if len(one) <= WIDTH else [*cut, *_wrapped("      # ", meaning)]
    return lines


def _where_to_look(verb: Described, groups: Mapping[str, Any]) -> list[str]:
    rows = []
    if groups:
        group = "quant" if "quant" in groups else next(iter(groups))
        rows += [(group, "its choices; likewise other groups")]
    if "quant" in groups:
        rows += [("quant=nf4", "one choice: settings, defaults, what loads it"), ("output.path", "one setting")]
    rows += [(f"{verb.name} all", "all choices and settings on one page")]
    return ["where to look:", *(f"  weightmill help {what:14} {said}" for what, said in rows)]


def _options(options: Mapping[str, Path]) -> Iterator[str]:
    for option, path in options.items():
        head = f"    {option:18} "
        yield from _table_row(head, about(path))


def _table_row(head: str, said: str) -> list[str]:
    row = textwrap.wrap(
        said, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )  # fmt: skip
    return row or [head]


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def plain_literal(value: Any) -> str:
    """Write a value as it is typed, without quotes where it needs none."""
    return value if isinstance(value, str) and value else literal(value)


def defaults_of(config: str) -> dict[str, str | None]:
    """Return the choice of each group that a verb makes by default."""
    entries = yaml.safe_load((CONF / f"{config}.yaml").read_text("utf-8")).get("defaults", [])
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def own_values(config: str) -> dict[str, Any]:
    """Return the defaults of a verb's settings that belong to no choice, by their dotted names."""
    found: dict[str, Any] = {}

    def take(values: dict[str, Any], place: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                take(value, f"{place}{name}.")
            else:
                found[f"{place}{name}"] = value

    take({k: v for k, v in values_of(CONF / f"{config}.yaml").items() if k != "hydra"}, "")
    return found


def _meanings(spec: type[BaseModel], group: str, kind: Any) -> dict[str, str]:
    """Return the settings of the choices of a group whose kind is this one, with what they mean."""
    models = at_field(spec.model_fields[group].annotation) if group in spec.model_fields else []
    mine = [model for model in models if len(models) == 1 or kind in kinds_of(model)]
    return {
        name: (field.description or "") + _values(field.annotation)
        for model in mine
        for name, field in model.model_fields.items()
        if name not in ("kind", "suffix", "chosen") and (name != "name" or group == "model")
    }


def _settings(spec: type[BaseModel], within: str = "", without: Collection[str] = ()) -> Iterator[str]:
    for name, description in _leaves(spec, ""):
        group = name.partition(".")[0].strip()
        if (within and group != within and not (within == "rules" and name.startswith(" "))) or group in without:
            continue
        head = f"  {name:26} "
        yield from textwrap.wrap(description, WIDTH, initial_indent=head, subsequent_indent=" " * 29) or [head]


def settings_of(spec: type[BaseModel]) -> list[str]:
    """Return the dotted names of all settings."""
    return [name for name, _ in _leaves(spec, "") if " " not in name]


def chosen_settings(verb: Described, words: Sequence[str]) -> list[str]:
    """Return the dotted names of the settings that the choices in a command line have."""
    models = {group: path for group, path in _chosen(verb, words).items() if group in verb.spec.model_fields}
    kept = []
    for name in settings_of(verb.spec):
        group, _, leaf = name.partition(".")
        mine = _meanings(verb.spec, group, values_of(models[group]).get("kind")) if group in models else None
        if mine is None or leaf.partition(".")[0] in mine:
            kept.append(name)
    return kept


def default_of(verb: Described, words: Sequence[str], name: str) -> tuple[str, ...]:
    """Return the default of a setting under the choices in a command line, as it is typed; nothing if there is none."""
    group, _, leaf = name.partition(".")
    path = _chosen(verb, words).get(group)
    value = None if path is None else values_of(path).get(leaf)
    value = own_values(verb.config or verb.name).get(name) if value is None else value
    return () if value in (None, "", "???") or isinstance(value, list | dict) else (plain_literal(value),)


def _chosen(verb: Described, words: Sequence[str]) -> dict[str, Path]:
    """Return the file of each group's choice: that of a command line, or the default."""
    files = files_of(verb.config or verb.name)
    given = {group: option for word in words for group, _, option in (word.partition("="),) if group in files}
    chosen = {**defaults_of(verb.config or verb.name), **given}
    return {group: files[group][name] for group, name in chosen.items() if group in files and name in files[group]}


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
