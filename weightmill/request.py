"""Settings as Python values, made into a request as the command line makes it, with the same checks and words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from jobs.cli.compose import FOLDER, Request, choices_of, take_apart
from jobs.cli.literals import literal, verbatim
from jobs.cli.multirun import sweeps_itself
from jobs.cli.validation import fields_of
from jobs.cli.verb import Verb
from loaders.errors import BadSpec
from loaders.near_misses import meant
from loaders.storage.address import SCHEME

# What one word may say of a group: the name of a choice, or the address that the group is about.
PLACES = {"model": "model.path", "output": "output.path"}
FOLDERS = "config_dir"  # the command line's --config-dir


def request_of(verb: Verb[Any], *parts: Mapping[str, Any]) -> Request:
    """Make the request of a verb from settings by name: {"model": "llama70b", "quant.group_size": 64}.

    Mappings stand for what is below a name: {"quant": {"group_size": 64}}. In one, `name` is the choice if nothing else
    chooses: {"quant": {"name": "nf4"}}. A list for a setting that takes one value is a sweep over these values. Of
    several `parts`, a later one counts where both have a setting.

    Raises:
        BadSpec: a value is of no kind that a setting takes, or a list for a verb that does one thing at a time.
    """
    config = verb.config or verb.name
    folders = [os.fspath(each) for part in parts for each in _listed(part.get(FOLDERS))]
    words = [f"{FOLDER}{folder}" for folder in folders]
    known = dict(fields_of(verb.spec))
    choices = choices_of(config, take_apart(config, verb.spec, words).folders)
    sweeps = False
    settings = {key: value for part in parts for key, value in _flat(part, known, choices) if key != FOLDERS}
    settings = _chosen(settings, choices)
    for key, value in settings.items():
        if key.partition(".")[0].startswith("hydra"):
            raise BadSpec(
                f"{key}: settings of Hydra itself are for the command line; give lists of values to sweep over"
            )
        name, options = _place(key, value, choices)
        swept = isinstance(value, list | tuple) and (name in choices or not _takes_a_list(known.get(name)))
        if swept and not value:
            raise BadSpec(f"{name}: expected one value or several to sweep over, found an empty list")
        if swept and not verb.can_sweep:
            raise BadSpec(
                f"{name}: expected one value, found a list; {verb.name} does one thing, run sweeps over lists"
            )
        sweeps = sweeps or swept
        texts = [_text(name, each, options) for each in (value if swept else [value])]
        words.append(f"{name}={','.join(texts)}")
    return take_apart(config, verb.spec, ["-m", *words] if sweeps else words)


def is_sweep(verb: Verb[Any], request: Request) -> bool:
    """Whether a request is for several jobs: by lists of values, or by an experiment that has such."""
    if request.is_sweep or request.problems or not verb.can_sweep:
        return request.is_sweep
    has_experiment = any(word.startswith("experiment=") for word in request.given)
    return has_experiment and sweeps_itself(verb.config or verb.name, request)


def _flat(
    settings: Mapping[str, Any], known: Mapping[str, FieldInfo], choices: Mapping[str, Any], before: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield settings by their whole names."""
    for key, value in settings.items():
        if not isinstance(key, str):
            raise BadSpec(f"settings: expected names of settings, such as 'quant.group_size', found {key!r}")
        name = f"{before}{key}"
        holds_more = any(each.startswith(f"{name}.") for each in known) or name in choices
        if isinstance(value, Mapping) and holds_more:
            yield from _flat(value, known, choices, f"{name}.")
        else:
            yield name, value


def _chosen(settings: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return settings in which the name of a choice chooses, where nothing else does; it would label the default."""
    found = dict(settings)
    for group, options in choices.items():
        names = _listed(found.get(f"{group}.name"))
        if names and all(name in options for name in names) and not {group, PLACES.get(group)} & {*found}:
            found[group] = found.pop(f"{group}.name")
    return found


def _place(key: str, value: Any, choices: Mapping[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """Return which setting a value is for, and the choices that it may name; none for a value that is no choice."""
    if key not in choices:
        return key, ()
    values = value if isinstance(value, list | tuple) else [value]
    if key in PLACES and all(_is_address(key, each, choices[key]) for each in values):
        return PLACES[key], ()
    return key, choices[key]


def _is_address(key: str, value: Any, options: tuple[str, ...]) -> bool:
    """Whether a value is a path or a URL, and no name of a choice (a folder of such a name is ./NAME).

    A folder that is yet to be made is one whose name could not have been meant for a choice.
    """
    if isinstance(value, PurePath):
        return True
    if not isinstance(value, str) or value in options:
        return False
    is_there = "/" in value or SCHEME.match(value) is not None or os.path.lexists(value)
    return is_there or (key == "output" and meant(value, options) is None)


def _takes_a_list(field: FieldInfo | None) -> bool:
    """Whether a setting's value may be a list."""
    if field is None:
        return False
    kinds = [field.annotation, *get_args(field.annotation)]
    return any(get_origin(kind) in (tuple, list) or kind in (tuple, list) for kind in kinds)


def _text(name: str, value: Any, options: tuple[str, ...]) -> str:
    """Write a value as the command line has it."""
    if options or name == "experiment":
        # A name of a choice, which is looked up with what is near it.
        return "null" if value is None else str(value)
    if name == "rules" and isinstance(value, str | PurePath):
        return os.fspath(value)
    return literal(_plain(name, value))


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON has it, its texts as OmegaConf takes them."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return verbatim(value)
    if isinstance(value, PurePath):
        return verbatim(os.fspath(value))
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, each) for key, each in value.items()}
    if hasattr(value, "item"):  # a number of numpy's or torch's
        return _plain(name, value.item())
    raise BadSpec(f"{name}: expected a text, a number, a path, a list or a mapping, found {type(value).__name__}")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
