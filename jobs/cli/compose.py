"""From a command line to a checked request. The only file that imports hydra.

Hydra selects and overrides; one strict pydantic model decides whether the result is a request, and every fault is
reported at once, with its config path. To that end plain overrides are handed to Hydra as additions (`++key=value`):
it would stop at the first key it does not know, the model names them all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from jobs.cli.validation import check, near, path_keys
from loaders.errors import BadSpec
from loaders.places import CONF

FOLDER = "--config-dir="  # Hydra's name for it
VERBATIM = ("peer", "filter")  # like paths, taken as they are typed, whatever characters they hold
S = TypeVar("S", bound=BaseModel)


@dataclass
class Request:
    """A command line, taken apart: Hydra's overrides, its flags, and the faults found so far."""

    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)  # the overrides as they were typed
    problems: list[str] = field(default_factory=list)
    folders: tuple[Path, ...] = ()  # of more choices, beside conf/
    verbatim: frozenset[str] = frozenset()  # keys whose values are taken as they are typed

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.flags or "--multirun" in self.flags

    @property
    def swept(self) -> set[str]:
        """The keys that it gives more than one value."""
        return self._keys(is_swept=True)

    @property
    def fixed(self) -> set[str]:
        """The keys that it gives one value."""
        return self._keys(is_swept=False)

    def _keys(self, *, is_swept: bool) -> set[str]:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides(self.overrides)
        return {override.key_or_group for override in parsed if override.is_sweep_override() == is_swept}

    @property
    def wants_help(self) -> bool:
        return "-h" in self.flags or "--help" in self.flags


# --- the command line


def take_apart(verb: str, spec: type[BaseModel], arguments: Sequence[str]) -> Request:
    """Sort a command line, quote the paths of a request, and check choices (quant=nf4) against what conf/ offers."""
    flags = [a for a in arguments if a.startswith("-") and not a.startswith(FOLDER)]
    request = Request(flags=flags, verbatim=frozenset({*path_keys(spec), *VERBATIM}))
    _take_folders(verb, request, [a.removeprefix(FOLDER) for a in arguments if a.startswith(FOLDER)])
    for override in (a for a in arguments if not a.startswith("-")):
        prepared, problem = _prepared(verb, override, request)
        problem = problem or _grammar(override, prepared)
        if problem:
            request.problems.append(problem)
        else:
            request.overrides.append(prepared)
            request.given.append(override)
    return request


def _take_folders(verb: str, request: Request, given: Sequence[str]) -> None:
    """Add folders of the user's own choices to where Hydra looks."""
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
        paths = ",".join(_quoted(f"file://{folder}") for folder in request.folders)
        request.overrides.append(f"hydra.searchpath=[{paths}]")


def _prepared(verb: str, override: str, request: Request) -> tuple[str, str | None]:
    choices, is_sweep = choices_of(verb, request.folders), request.is_sweep
    shown = override.encode(errors="backslashreplace").decode()
    if shown != override:  # reports and stores could not hold such a name
        return "", f"{shown}: expected UTF-8, as all paths and values are; give the file or folder another name"
    key, equals, value = override.partition("=")
    if not equals:
        if key.startswith("~"):
            return override, None
        return "", f"{override}: expected key=value{near(key, choices, 'is it')}"
    bare = key.lstrip("+~")
    if bare.split(".")[0] == "hydra" or bare.startswith("hydra/"):
        return override, None
    if bare in choices:
        return _choice(override, bare, value, choices[bare])
    value = " ".join(value.split("\n"))
    if bare == "rules" and value.endswith((".yaml", ".yml")):
        return _rules_of(value)
    if bare in request.verbatim and not is_sweep and not re.match(r"""['"\[{]|\$\{|null$""", value):
        value = _quoted(value)
    return f"++{bare}={value}" if not key.startswith("~") else override, None


def _rules_of(path: str) -> tuple[str, str | None]:
    """The rules that a YAML file lists, as an override."""
    try:
        rules = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return "", f"rules: cannot read {path}: {' '.join(str(error).split())}"
    if not isinstance(rules, list):
        return "", f"rules: expected a list of rules in {path}, found {type(rules).__name__}"
    return f"++rules={_literal(rules)}", None


def _literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """In Hydra's quotes, where a backslash means itself unless a quote follows the run of them."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def _grammar(override: str, prepared: str) -> str | None:
    """What Hydra's grammar has against an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(prepared)
    except HydraException as error:
        return f"{override}: cannot be read: {_said_by_hydra(error)}; quote values with special characters"
    return None


def _choice(override: str, group: str, value: str, options: Sequence[str]) -> tuple[str, str | None]:
    for chosen in (part.strip() for part in value.split(",")):
        if re.fullmatch(r"[\w.\-]+", chosen) and chosen not in options and chosen != "null":
            return "", f"{group}: unknown choice {chosen!r}{near(chosen, options)}; known: {', '.join(options)}"
    return override, None


def choices_of(verb: str, folders: tuple[Path, ...] = ()) -> dict[str, tuple[str, ...]]:
    """The groups that a verb's config selects from, and their options."""
    return {group: tuple(files) for group, files in files_of(verb, folders).items()}


@cache
def files_of(verb: str, folders: tuple[Path, ...] = ()) -> dict[str, dict[str, Path]]:
    """The file of each option of each group: of conf/, and of more folders like it."""
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
    """The request that a command line makes.

    Raises:
        BadSpec: it makes none; every fault found.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    _register_launcher()
    problems = list(request.problems)
    try:
        values = [word for word in request.overrides if _is_value_of_a_group(verb, word)]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = [word for word in request.overrides if word not in values]
            config = hydra_compose(verb, overrides=overrides, return_hydra_config=True)
        for word in values:
            _set(config, word)
        problems += _sweep_left_out(config, request)
        return check(spec, plain(config), problems)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadSpec([*problems, _said_by_hydra(error)]) from error


def _is_value_of_a_group(verb: str, override: str) -> bool:
    """Whether a plain value of this verb's has the name of a group that others choose from: Hydra takes it for one."""
    key = override.lstrip("+~").partition("=")[0]
    return override.startswith("++") and (CONF / key).is_dir() and key not in choices_of(verb)


def _set(config: Any, override: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = OverridesParser.create().parse_override(override)
    OmegaConf.update(config, parsed.key_or_group, parsed.value(), force_add=True)


def _sweep_left_out(config: Any, request: Request) -> list[str]:
    """A preset that describes a sweep, asked for as one job."""
    given = {override.lstrip("+").partition("=")[0] for override in request.given}
    swept = [key for key in config.hydra.sweeper.get("params") or {} if key.lstrip("+") not in given]
    if not swept:
        return []
    return [
        f"experiment: it is a sweep over {', '.join(swept)}: python -m jobs.run -m ... runs it; or give each a value"
    ]


def plain(config: Any) -> Any:
    """A DictConfig as plain values; what is still missing stays "???"."""
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


def _said_by_hydra(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("See https", "^", "full_key", "object_type")))


# --- sweeps


@dataclass(frozen=True)
class Composed:
    """A job of a sweep: its values, and those of them that vary, as they would be typed."""

    number: int
    values: dict[str, Any]
    varied: dict[str, str]

    @property
    def suffix(self) -> str:
        """-group_size=128-double_quant=true: varied values; model and quant are in the name already."""
        named = {k: v for k, v in self.varied.items() if k not in ("model", "quant", "model.path")}
        return "".join(f"-{k.split('.')[-1]}={re.sub(r'[^A-Za-z0-9_.+]+', '_', v)}" for k, v in named.items())

    @property
    def name(self) -> str:
        """What the sweep gave it."""
        return " ".join(f"{key}={value}" for key, value in self.varied.items()) or f"job {self.number}"


Together = Callable[[Sequence[Composed], bool], Sequence[Any]]


def sweep(verb: str, request: Request, together: Together) -> None:
    """Compose a multirun's jobs and hand them over, as many at once as the sweeper has: `together(jobs, searches)`
    gives a result or an exception for each. A sweeper that searches learns of a job's failure, and goes on.

    Raises:
        BadSpec: Hydra cannot make the jobs.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if request.problems:
        raise BadSpec(request.problems)
    made: set[Path] = set()

    def begins(config: Any) -> None:
        HydraConfig.instance().set_config(config)
        folder = Path(HydraConfig.get().sweep.dir).absolute()
        made.update(each for each in (folder, *folder.parents) if not each.exists())

    def all_of(configs: Sequence[Any]) -> Sequence[Any]:
        jobs, searches = [], False
        for config in configs:
            HydraConfig.instance().set_config(config)
            about = HydraConfig.get()
            searches = not about.sweeper.get("_target_", "").endswith("BasicSweeper")
            keys, fixed = varied(request, about), request.fixed
            parsed = (override.lstrip("+").partition("=") for override in about.overrides.task)
            mine = {key: value for key, _, value in parsed if key in keys or (searches and key not in fixed)}
            jobs.append(Composed(int(about.job.num) + 1, plain(config), mine))
        return together(jobs, searches)

    def job(config: Any) -> Any:
        [result] = all_of([config])
        if isinstance(result, Exception):
            raise result
        return result

    job.begins = begins  # type: ignore[attr-defined]
    job.together = all_of  # type: ignore[attr-defined]
    _register_launcher()
    with _command_line([*request.flags, *request.overrides]):
        try:
            hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise BadSpec(_said_by_hydra(error)) from error
        finally:
            _remove_empty(made)


@cache
def _register_launcher() -> None:
    """By ourselves: Hydra's own search does not see into an editable installation."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from hydra_plugins.weightmill import OnePass

    Plugins.instance().register(OnePass)
    node = {"_target_": f"{OnePass.__module__}.{OnePass.__name__}"}
    ConfigStore.instance().store(group="hydra/launcher", name="weightmill", node=node, provider="weightmill")


def _remove_empty(folders: set[Path]) -> None:
    """Hydra makes a folder for every sweep, and those above it; ours holds nothing but a copy of the request."""
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):
            (folder / "multirun.yaml").unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and prints errors and exits by itself unless told not to."""
    import sys

    before, had = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if had is None:
            del os.environ["HYDRA_FULL_ERROR"]


def varied(request: Request, hydra_config: Any) -> set[str]:
    """The keys that a sweep gives more than one value: on the command line, or in an experiment."""
    params = hydra_config.sweeper.get("params") or {}
    return request.swept | {key.lstrip("+") for key, value in params.items() if "," in str(value) or "(" in str(value)}
