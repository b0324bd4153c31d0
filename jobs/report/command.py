"""The command that makes an output again, from the request in its report.

Choices are those of conf/ that are the nearest to the request; what differs from them follows. A path of the machine
that ran the job stands there as a word: DIR, ADAPTER, FILE.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml

from jobs.cli.choices import values_of
from jobs.cli.compose import files_of
from jobs.cli.literals import literal
from jobs.cli.program import NAME
from jobs.cli.validation import path_keys
from jobs.spec.job import JobSpec
from jobs.spec.tracking import EXPERIMENT
from loaders.backends.devices import OTHER_BYTES
from loaders.places import CONF, DEMO
from loaders.storage.address import Address

GROUPS = ("source", "transform", "quant", "output", "backend", "verify")
KEYS = ("unit_mb", "rules", "mtp")
# The parts of `output` that say where it goes; the address of an output has them all.
OF_THE_PLACE = {"root", "path", "suffix", "named", "branch"}
OUTPUT = ("layout", "container", "split", "card")  # what is made counts, and not where it goes
PLAIN = re.compile(r"[\w./:@+-]+")


def command_of(request: Mapping[str, Any], source: str) -> str:
    """Return the command for a resolved request; `source` is where it was read, which of the Hub names the commit."""
    defaults = _defaults()
    words = [*_model(request["model"], source)]
    # Another backend gives the same bytes, but for these.
    groups = [group for group in GROUPS if group != "backend" or request["backend"]["kind"] in OTHER_BYTES]
    for group in groups:
        # The mix that quant=auto chose follows from its budget.
        given = {
            key: v for key, v in request[group].items() if (key in OUTPUT if group == "output" else key != "chosen")
        }
        words += _group(group, given, defaults.get(group))
    words += [f"{key}={said(key, request[key])}" for key in KEYS if request[key] != defaults[key]]
    return shlex.join(["weightmill", "run", *words])


def rerun_of(request: Mapping[str, Any], output: str) -> str:
    """Return the command that goes on with a job on this machine: as `command_of`, with paths, and where it goes.

    `output` is the address of its output. The address of a tracking server that had a password is left out.
    """
    defaults, model = _defaults(), request["model"]
    source = model["path"] or f"hf://{model['hub_id']}" + (f"@{model['revision']}" if model["revision"] else "")
    words = [*_model(model, source, real=True)]
    for group in (*GROUPS, "strategy", "store", "cluster", "tracking"):
        left_out = OF_THE_PLACE if group == "output" else {"chosen"}
        given = {key: value for key, value in request[group].items() if key not in left_out and "***" not in str(value)}
        if given.get("experiment") == EXPERIMENT:  # which is the default
            del given["experiment"]
        words += _group(group, given, defaults.get(group), real=True)
    words += [f"{key}={said(key, request[key])}" for key in (*KEYS, "lint") if request[key] != defaults[key]]
    is_tracked = request["tracking"]["kind"] != "none"
    words += [f"output.root={request['output']['root']}"] if is_tracked else []  # where mlflow.db is
    return shlex.join([NAME, "run", *words, f"output.path={output}"])


def _model(model: Mapping[str, Any], source: str, *, real: bool = False) -> Iterator[str]:
    yield "model=demo" if source == str(DEMO) else f"model.path={said('model.path', source, real=real)}"
    if model["name"] is not None:
        yield f"model.name={model['name']}"
    if model["components_to_quantize"] is not None:
        yield f"model.components_to_quantize={literal(list(model['components_to_quantize']))}"


def _group(group: str, given: Mapping[str, Any], default: Any, *, real: bool = False) -> Iterator[str]:
    """Yield the choice of a group and the settings that differ from it. Defaults are left out, but for the method."""
    known = {name: values_of(path) for name, path in files_of("run")[group].items()}

    def further(name: str) -> dict[str, Any]:
        return {key: value for key, value in given.items() if value != known[name].get(key)}

    fitting = [name for name, values in known.items() if values.get("kind") == given.get("kind")]
    # Of the choices that are equally near, the default, and the one that the request names, say it best.
    chosen = min(fitting, key=lambda name: (len(further(name)), name != default, name != given.get("name")))
    if chosen != default or group == "quant":
        yield f"{group}={chosen}"
    yield from (
        f"{group}.{key}={said(f'{group}.{key}', value, real=real)}" for key, value in sorted(further(chosen).items())
    )


def said(key: str, value: Any, *, real: bool = False) -> str:
    """Write a setting's value as a command has it; a path of the machine is a word there, unless it is wanted."""
    if key in path_keys(JobSpec) and isinstance(value, str):
        address = Address.of(value)
        if not address.is_local:
            return str(address)
        if real:
            return value
        words = {"model.path": "DIR", "transform.path": "ADAPTER"}
        return words.get(key, "FILE") if address.path.is_absolute() else value
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return value
    return literal(_without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Leave out the conditions of rules that were not given."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


@cache
def _defaults() -> dict[str, Any]:
    """Return the default choice of each group, and the values of plain keys."""
    values = yaml.safe_load((CONF / "run.yaml").read_text())
    chosen = [entry for entry in values.pop("defaults") if isinstance(entry, dict)]
    return {**values, **{group: name for entry in chosen for group, name in entry.items()}}
