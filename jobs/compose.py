"""From a command line to a checked request. The only file that imports hydra.

Hydra selects and overrides; one strict pydantic model decides whether the result is a request, and every fault is
reported at once, with its config path. To that end plain overrides are handed to Hydra as additions (`++key=value`):
it would stop at the first key it does not know, the model names them all.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from loaders.errors import BadSpec

CONF = Path(__file__).resolve().parent.parent / "conf"
DEMO = Path(__file__).resolve().parent / "demo"
PATHS = (
    "model.path",
    "output.root",
    "output.path",
    "a",
    "b",
    "path",
    "folder",
)  # relative to the user's working directory
VERBATIM = (*PATHS, "peer")  # taken as they are typed, whatever characters they hold
MISSING = "???"  # as conf/ marks what must be given
# What people call things elsewhere
SYNONYMS = {
    "blocksize": "group_size", "block_size": "group_size", "compress_statistics": "double_quant",
    "bnb_4bit_use_double_quant": "double_quant", "quant_storage": "storage_dtype", "model_path": "path",
    "torch_dtype": "dtype", "num_workers": "threads", "workers": "threads", "force": "overwrite",
}  # fmt: skip
S = TypeVar("S", bound=BaseModel)


@dataclass
class Request:
    """A command line, taken apart: Hydra's overrides, its flags, and the faults found so far."""

    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.flags or "--multirun" in self.flags

    @property
    def wants_help(self) -> bool:
        return "-h" in self.flags or "--help" in self.flags


# --- the command line


def take_apart(verb: str, arguments: Sequence[str]) -> Request:
    """Sort a command line, quote paths, and check choices (quant=nf4) against what conf/ offers."""
    request = Request(flags=[a for a in arguments if a.startswith("-")])
    for override in (a for a in arguments if not a.startswith("-")):
        prepared, problem = _prepared(verb, override, is_sweep=request.is_sweep)
        problem = problem or _grammar(override, prepared)
        if problem:
            request.problems.append(problem)
        else:
            request.overrides.append(prepared)
    return request


def _prepared(verb: str, override: str, *, is_sweep: bool) -> tuple[str, str | None]:
    key, equals, value = override.partition("=")
    if not equals:
        if key.startswith("~"):
            return override, None
        return "", f"{override}: expected key=value{_near(key, choices_of(verb), 'is it')}"
    bare = key.lstrip("+~")
    if bare.split(".")[0] == "hydra" or bare.startswith("hydra/"):
        return override, None
    if bare in choices_of(verb):
        return _choice(verb, override, bare, value)
    value = " ".join(value.split("\n"))
    if bare == "rules" and value.endswith((".yaml", ".yml")):
        return _rules_of(value)
    if bare in VERBATIM and not is_sweep and not re.match(r"""['"\[{]|\$\{|null$""", value):
        value = _quoted(value)
    return f"++{bare}={value}" if not key.startswith("~") else override, None


def _rules_of(path: str) -> tuple[str, str | None]:
    """The rules that a YAML file lists, as an override."""
    try:
        rules = yaml.safe_load(Path(path).expanduser().read_text())
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


def _choice(verb: str, override: str, group: str, value: str) -> tuple[str, str | None]:
    options = choices_of(verb)[group]
    for chosen in (part.strip() for part in value.split(",")):
        if re.fullmatch(r"[\w.\-]+", chosen) and chosen not in options and chosen != "null":
            return "", f"{group}: unknown choice {chosen!r}{_near(chosen, options)}; known: {', '.join(options)}"
    return override, None


@cache
def choices_of(verb: str) -> dict[str, tuple[str, ...]]:
    """The groups that a verb's config selects from, and their options."""
    found = {}
    for entry in yaml.safe_load((CONF / f"{verb}.yaml").read_text()).get("defaults", []):
        if isinstance(entry, dict):
            [group] = entry
            if not group.startswith("override "):
                found[group] = tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    return found


def _near(name: str, known: Sequence[str] | dict[str, Any], phrase: str = "did you mean") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; {phrase} {close[0]!r}?" if close else ""


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
    problems = list(request.problems)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose(verb, overrides=request.overrides)
        return check(spec, plain(config), problems)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadSpec([*problems, _said_by_hydra(error)]) from error


def plain(config: Any) -> Any:
    """A DictConfig as plain values; what is still missing stays "???"."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    values.pop("hydra", None)
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


def check(spec: type[S], values: dict[str, Any], problems: Sequence[str] = ()) -> S:
    """Validate plain values; paths become absolute.

    Raises:
        BadSpec: every fault, those given first.
    """
    found = [*problems, *_missing(values), *_make_absolute(values)]
    try:
        made = spec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        found += [_problem(spec, values, fault) for fault in error.errors() if fault["input"] != MISSING]
    if found:
        raise BadSpec(found)
    return made


def _missing(values: Any, name: str = "") -> list[str]:
    """What conf/ requires and nobody gave."""
    if isinstance(values, dict):
        return [problem for key, value in values.items() for problem in _missing(value, f"{name}.{key}".lstrip("."))]
    return [f"{name}: missing; give {name}=..."] if values == MISSING else []


def _make_absolute(values: dict[str, Any]) -> list[str]:
    problems = []
    for path in PATHS:
        *parents, leaf = path.split(".")
        holder: Any = values
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        value = holder.get(leaf) if isinstance(holder, dict) else None
        if not isinstance(value, str) or value == MISSING:
            continue
        if value == "demo://":
            holder[leaf] = str(DEMO)
        elif "://" in value and not value.startswith("file://"):
            scheme = value.split("://")[0]
            problems.append(f"{path}: {scheme}:// is not read or written yet; fetch it into a folder first")
        elif value:
            holder[leaf] = os.path.abspath(Path(value.removeprefix("file://")).expanduser())
    return problems


def _problem(spec: type[BaseModel], values: dict[str, Any], fault: Any) -> str:
    """One line: where, what is expected, what was found."""
    location = _without_tags(spec, fault["loc"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    kind, found = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        known = list(_fields(spec, values, location[:-1]))
        meant = SYNONYMS.get(str(location[-1]))
        hint = f"; did you mean {meant!r}?" if meant in known else _near(str(location[-1]), known)
        return f"{name}: unknown key{hint}; known: {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{name}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name}: {message}; found {json.dumps(found, default=str)}"


def _without_tags(spec: type[BaseModel], location: Sequence[Any]) -> list[Any]:
    """Pydantic puts the tag of a union into a fault's place: ("quant", "bnb4", "group_size")."""
    kept: list[Any] = []
    for part in location:
        if not (kept and isinstance(part, str) and part in _tags(spec, kept)):
            kept.append(part)
    return kept


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation may hold."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _models(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def at_field(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold; none for a plain value."""
    return list(_models(annotation))


def _at(spec: type[BaseModel], location: Sequence[Any]) -> list[type[BaseModel]]:
    """The models at a place in the tree."""
    models = [spec]
    for part in location:
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [found for f in fields for found in _models(f.annotation)]
    return models


def _fields(spec: type[BaseModel], values: Any, location: Sequence[Any]) -> dict[str, None]:
    """What may stand at a place: of several models, in the one whose kind was chosen."""
    for part in location:
        values = values[part]
    kind = values.get("kind") if isinstance(values, dict) else None
    models = _at(spec, location)
    chosen = [m for m in models if "kind" in m.model_fields and kind in get_args(m.model_fields["kind"].annotation)]
    return {name: None for model in chosen or models for name in model.model_fields}


def _tags(spec: type[BaseModel], location: Sequence[Any]) -> set[Any]:
    models = _at(spec, location)
    if len(models) < 2:
        return set()
    return {tag for m in models for tag in get_args(m.model_fields["kind"].annotation)}


# --- sweeps


def sweep(verb: str, request: Request, run: Callable[[dict[str, Any], str], float | None]) -> None:
    """Run a multirun through Hydra: `run(values, suffix)` for each job, the suffix naming what the sweep varies.

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

    @hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")
    def job(config: Any) -> float | None:
        made.add(Path(HydraConfig.get().sweep.dir).absolute())
        return run(plain(config), _suffix(HydraConfig.get().overrides.task, varied(request, HydraConfig.get())))

    with _command_line([*request.flags, *request.overrides]):
        try:
            job()
        except (HydraException, OmegaConfBaseException) as error:
            raise BadSpec(_said_by_hydra(error)) from error
        finally:
            _remove_empty(made)


def _remove_empty(folders: set[Path]) -> None:
    """Hydra makes a folder for every sweep; ours holds nothing but a copy of the request."""
    for folder in folders:
        with suppress(OSError):
            (folder / "multirun.yaml").unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()


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
    """The keys that a sweep gives more than one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(request.overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    params = hydra_config.sweeper.get("params") or {}
    return swept | {key.lstrip("+") for key, value in params.items() if "," in str(value) or "(" in str(value)}


def _suffix(task: Sequence[str], keys: set[str]) -> str:
    """-group_size=128-double_quant=true: varied values; model and quant are in the name already."""
    parts = []
    for override in task:
        key, _, value = override.lstrip("+").partition("=")
        if key in keys and key not in ("model", "quant", "model.path"):
            parts.append(f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9_.+]+', '_', value)}")
    return "".join(f"-{part}" for part in parts)
