"""Composing a command line into a validated request. This is the only file that imports hydra.

Hydra selects and overrides values; one strict pydantic model then decides whether they are a request, and reports all
faults at once, each with its config path. Hydra itself would stop at the first key that it does not know, so plain
overrides are passed to it as additions (`++key=value`), and the model finds all unknown keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from jobs.cli.choices import fault_of
from jobs.cli.instead import instead
from jobs.cli.literals import quoted, verbatim
from jobs.cli.meant import Keys, bare_problem, choice_problem, option_problem
from jobs.cli.program import program
from jobs.cli.rules_file import rules_of
from jobs.cli.validation import check, fields_of, path_keys
from jobs.spec.keys import SWEEP
from loaders.errors import BadSpec, setting
from loaders.places import CONF
from loaders.presets.catalog import preset_values

FOLDER = "--config-dir="  # the name of the flag in Hydra
FLAGS = ("-m", "--multirun", "-h", "--help")
# Settings whose values, like those of paths, are taken as they are typed: commands and filters hold characters that
# Hydra's grammar would parse.
VERBATIM = ("peer", "filter")
# What is in Hydra's grammar already: quoted, resolved from others, null; of what is no path, lists, too.
WRITTEN = (r"""(['"]).*\1|\$\{.*|null""", r"""['"\[{].*|\$\{.*|null""")
KEYWORDS = ("null", "self", "demo://")  # what is no path where a path may stand, even if one of that name exists
S = TypeVar("S", bound=BaseModel)


@dataclass
class Request:
    """A parsed command line: overrides for Hydra, flags, and the faults found so far."""

    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)  # the overrides as they were typed
    problems: list[str] = field(default_factory=list)
    folders: tuple[Path, ...] = ()  # the user's own config folders, in addition to conf/
    verbatim: frozenset[str] = frozenset()  # keys whose values are taken as they are typed

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.flags or "--multirun" in self.flags

    @property
    def swept(self) -> set[str]:
        """The keys that are given more than one value."""
        return self._keys(is_swept=True)

    @property
    def fixed(self) -> set[str]:
        """The keys that are given one value."""
        return self._keys(is_swept=False)

    def _keys(self, *, is_swept: bool) -> set[str]:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides(self.overrides)
        return {override.key_or_group for override in parsed if override.is_sweep_override() == is_swept}

    def typed_for(self, values: dict[str, Any]) -> list[str]:
        """The settings of quant that were typed, for a preset of the user's own: its file is not known later."""
        quant = values.get("quant")
        if not isinstance(quant, dict) or preset_values(str(quant.get("name"))) is not None:
            return []
        return sorted(key for key in self.fixed if key.startswith("quant."))

    @property
    def wants_help(self) -> bool:
        return "-h" in self.flags or "--help" in self.flags


# --- the command line


def take_apart(verb: str, spec: type[BaseModel], arguments: Sequence[str]) -> Request:
    """Parse a command line: quote values that are paths, and check choices (quant=nf4) against the files in conf/.

    Faults are collected in `problems`, to be reported together with those of `compose`.
    """
    flags = [a for a in arguments if a in FLAGS]
    request = Request(flags=flags, verbatim=frozenset({*path_keys(spec), *VERBATIM}))
    _take_folders(verb, request, [a.removeprefix(FOLDER) for a in arguments if a.startswith(FOLDER)])
    keys = {place: field.annotation is bool for place, field in fields_of(spec)}
    paths: list[str] = []  # that were given without a key
    for override in _without_options(verb, spec, request, arguments, keys):
        prepared, problem = _prepared(verb, override, request, keys, paths)
        problem = problem or _grammar(override, prepared)
        if problem:
            request.problems.append(problem)
        else:
            request.overrides.append(prepared)
            request.given.append(override)
    return request


def _without_options(
    verb: str, spec: type[BaseModel], request: Request, arguments: Sequence[str], keys: Keys
) -> Iterator[str]:
    """Yield the overrides; options that there are not, with the values after them, become problems."""
    rest = [a for a in arguments if a not in FLAGS and not a.startswith(FOLDER)]
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            yield word
            continue
        has_value = bool(rest) and "=" not in word and "=" not in rest[0] and not rest[0].startswith("-")
        value = rest.pop(0) if has_value else None
        choices = choices_of(verb, request.folders)
        sweeps = verb == "run" and spec.__name__ == "JobSpec"
        request.problems.append(option_problem(word, value, keys, choices, sweeps=sweeps))


def _take_folders(verb: str, request: Request, given: Sequence[str]) -> None:
    """Add the user's own config folders to Hydra's search path."""
    known = choices_of(verb)
    for folder in (Path(each).expanduser() for each in given):
        if not any((folder / group).is_dir() for group in known):
            request.problems.append(f"{FOLDER}{folder}: expected a folder with some of {', '.join(known)} in it")
            continue
        both = [f"{g}/{n}" for g, names in known.items() for n in names if (folder / g / f"{n}.yaml").exists()]
        if both:
            request.problems.append(f"{FOLDER}{folder}: {both[0]}.yaml has the name of one of weightmill's; rename it")
        request.folders = (*request.folders, folder.absolute())
        request.given.append(f"{FOLDER}{folder}")
    if request.folders:
        paths = ",".join(quoted(f"file://{folder}") for folder in request.folders)
        request.overrides.append(f"hydra.searchpath=[{paths}]")


def _prepared(verb: str, override: str, request: Request, keys: Keys, paths: list[str]) -> tuple[str, str | None]:
    choices, is_sweep = choices_of(verb, request.folders), request.is_sweep
    shown = override.encode(errors="backslashreplace").decode()
    # Arguments that are not UTF-8 arrive with surrogates, which neither JSON reports nor MLflow's database can store.
    if shown != override:
        return "", f"{shown}: expected UTF-8, as all paths and values are; give the file or folder another name"
    key, equals, value = override.partition("=")
    if not equals:
        if key.startswith("~"):
            return override, None
        return "", bare_problem(override, keys, choices, paths)
    bare = key.lstrip("+~")
    if bare.split(".")[0] == "hydra" or bare.startswith("hydra/"):
        return override, None
    if bare in choices:
        return _choice(override, bare, value, verb, request)
    if bare.startswith(("rules.", "objective.")):
        group = bare.partition(".")[0]
        return "", f"{bare}: {group} is a list; give all of it{instead(group, 'list_type', None, False)}"
    if bare == "rules" and value.endswith((".yaml", ".yml")):
        return rules_of(value)
    if bare in request.verbatim and bare not in VERBATIM and value not in KEYWORDS and os.path.lexists(value):
        value = quoted(verbatim(os.path.abspath(value)))
    elif bare in request.verbatim and not is_sweep and not re.fullmatch(WRITTEN[bare in VERBATIM], value, re.DOTALL):
        value = quoted(value)
    elif bare in request.verbatim and "\n" in value:
        return "", f"{bare}: a path with a line break; give the file or folder another name"
    else:
        value = " ".join(value.split("\n"))
    return f"++{bare}={value}" if not key.startswith("~") else override, None


def _grammar(override: str, prepared: str) -> str | None:
    """Return the problem that Hydra's parser has with an override; None if it parses."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(prepared)
    except HydraException as error:
        return f"{override}: cannot be read: {said_by_hydra(error)}; quote values with special characters"
    return None


def _choice(override: str, group: str, value: str, verb: str, request: Request) -> tuple[str, str | None]:
    choices, files = choices_of(verb, request.folders), files_of(verb, request.folders)[group]
    # A sweep's own words, such as glob(*), and what refers to other values, are Hydra's.
    if (request.is_sweep and "(" in value) or "${" in value:
        return override, None
    listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if group == "quant" and value.startswith("[") and request.is_sweep:
        return "", f"{group}: expected choices without brackets, found {value}; write {group}={listed}"
    for chosen in (part.strip().strip("'\"") for part in listed.split(",")):
        if chosen not in files and (chosen != "null" or group != "experiment"):
            return "", choice_problem(group, chosen, choices[group])
        if chosen in files and (wrong := fault_of(files[chosen], group, choices)) is not None:
            return "", wrong
    if (listed != value or "," in value) and not request.is_sweep:
        names = ", ".join(repr(part.strip().strip("'\"")) for part in listed.split(","))
        several = setting(SWEEP).format(program=program(), group=group, listed=listed, quoted=names)
        hint = f"; {several}" if verb == "run" else ""
        return "", f"{group}: expected one choice, found {value}{hint}"
    return override, None


def choices_of(verb: str, folders: tuple[Path, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Return the config groups that a verb selects from, and the options of each."""
    return {group: tuple(files) for group, files in files_of(verb, folders).items()}


@cache
def files_of(verb: str, folders: tuple[Path, ...] = ()) -> dict[str, dict[str, Path]]:
    """Return the file of each option of each group, from conf/ and from the user's own folders."""
    found = {}
    for entry in yaml.safe_load((CONF / f"{verb}.yaml").read_text()).get("defaults", []):
        if isinstance(entry, dict):
            [group] = entry
            if not group.startswith("override "):
                paths = [path for folder in (*folders, CONF) for path in (folder / group).glob("*.yaml")]
                found[group] = {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}
    return found


# --- to a checked model


def compose(verb: str, spec: type[S], request: Request) -> S:
    """Compose a parsed command line into a validated request.

    Raises:
        BadSpec: the request is wrong; all faults at once.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    problems = list(request.problems)
    try:
        values = [word for word in request.overrides if _is_value_of_a_group(verb, word)]
        with composer() as composed:
            config = composed(verb, [word for word in request.overrides if word not in values])
        for word in values:
            _set(config, word)
        problems += [*_sweep_left_out(config, request), *misnamed(config)]
        values = plain(config)
        if isinstance(output := values.get("output"), dict) and (typed := request.typed_for(values)):
            output.setdefault("named", typed)
        return check(spec, values, problems, _note)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadSpec([*problems, said_by_hydra(error)]) from error


@contextmanager
def composer() -> Iterator[Callable[[str, list[str]], Any]]:
    """Yield a function that composes a config of conf/ with overrides, with what Hydra adds about itself.

    Hydra knows one initialization in a process, which may be another program's: that is as it was, afterwards.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    others, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    register_launcher()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield lambda verb, overrides: hydra_compose(verb, overrides=overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = others


def _note(text: str) -> None:
    from jobs.cli.verb import note  # which imports this module

    note(text)


def _is_value_of_a_group(verb: str, override: str) -> bool:
    """Whether an override sets a plain value whose key is the name of a config group of other verbs.

    Hydra would take such an override for the choice of a group's option, so it is applied after composing.
    """
    key = override.lstrip("+~").partition("=")[0]
    return override.startswith("++") and (CONF / key).is_dir() and key not in choices_of(verb)


def _set(config: Any, override: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override)
    OmegaConf.update(config, parsed.key_or_group, parsed.value(), force_add=True)


def _sweep_left_out(config: Any, request: Request) -> list[str]:
    """Return a problem if an experiment describes a sweep, and the request is for one job."""
    given = {override.lstrip("+").partition("=")[0] for override in request.given}
    swept = [key for key in config.hydra.sweeper.get("params") or {} if key.lstrip("+") not in given]
    if not swept:
        return []
    return [f"experiment: it is a sweep over {', '.join(swept)}: {program()} run -m ... runs it; or give each a value"]


def misnamed(config: Any) -> list[str]:
    """Return a problem if the quantization has the name of another preset: an output would be called what it is not."""
    # Of another verb, or in a file of one's own, `quant` may be a text.
    quant, chosen = config.get("quant"), config.hydra.runtime.choices.get("quant")
    name = quant.get("name") if hasattr(quant, "get") else chosen
    if name == chosen or None in (preset_values(str(chosen)), preset_values(str(name))):
        return []
    return [f"quant.name: {name} is the name of another preset than quant={chosen}; quant={name} chooses that one"]


def plain(config: Any) -> Any:
    """Convert a DictConfig to plain values; missing ones stay "???"."""
    from omegaconf import OmegaConf

    own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    values = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    stray = values.pop("experiment", None)
    if isinstance(stray, dict) and stray:
        raise BadSpec(
            f"experiment: its file sets {', '.join(stray)} below `experiment`, where nothing reads them; begin the file"
            " with the line `# @package _global_`"
        )
    return values


def said_by_hydra(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inner = ("See https", "^", "full_key", "object_type", "Config search path", "provider=")
    return " ".join(line for line in lines if not line.startswith(inner))


@cache
def register_launcher() -> None:
    """Register the launcher here: Hydra 1.3's own search for plugins misses those of an editable installation."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from hydra_plugins.weightmill import OnePass

    Plugins.instance().register(OnePass)
    node = {"_target_": f"{OnePass.__module__}.{OnePass.__name__}"}
    ConfigStore.instance().store(group="hydra/launcher", name="weightmill", node=node, provider="weightmill")
