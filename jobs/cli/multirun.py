"""Composing the jobs of a sweep: Hydra's multirun, whose batches go to one function."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cli.compose import Request, composer, misnamed, plain, register_launcher, said_by_hydra
from jobs.cli.sweep_folders import SweepFolders
from loaders.errors import BadSpec, io_errors
from loaders.places import CONF
from loaders.presets.naming import joined
from loaders.storage.address import without_secrets

# What the default name of an output says in any case.
IN_NAMES = ("model", "model.path", "model.name", "quant", "transform", "transform.num_blocks", "mtp", "rules",
            "source", "output", "output.layout", "output.split")  # fmt: skip


@dataclass(frozen=True)
class Composed:
    """A job of a sweep: all its values, and the varied ones as they would be typed."""

    number: int
    values: dict[str, Any]
    varied: dict[str, str]

    @property
    def named(self) -> list[str]:
        """The varied settings of quant, which are in the output's name even where they are as in the preset."""
        return [key for key in self.varied if key.startswith("quant.")]

    @property
    def suffix(self) -> str:
        """The other varied values for the output's name, such as "-max_relative_error-0.5".

        What the name has without that is left out.
        """
        others = [key for key in self.varied if key not in IN_NAMES and key not in self.named]
        return joined(f"{key.split('.')[-1]}-{without_secrets(self.varied[key])}" for key in others)

    @property
    def name(self) -> str:
        """The job's varied values, or its number if nothing varies."""
        return without_secrets(" ".join(f"{k}={v}" for k, v in self.varied.items())) or f"job {self.number}"


Together = Callable[[Sequence[Composed], bool], Sequence[Any]]


def sweep(verb: str, request: Request, together: Together) -> None:
    """Compose the jobs of a multirun and pass each batch of Hydra's sweeper to `together(jobs, searches)`.

    `together` returns a result or an exception for each job. `searches` is set for a sweeper that chooses jobs by the
    results of earlier ones: it learns of a job's failure and goes on.

    Raises:
        BadSpec: Hydra cannot compose the jobs.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if request.problems:
        raise BadSpec(request.problems)
    folders = SweepFolders()

    def begins(config: Any) -> None:
        HydraConfig.instance().set_config(config)
        with io_errors("making", folder := Path(HydraConfig.get().sweep.dir).absolute()):
            folders.begin(folder)

    def all_of(configs: Sequence[Any]) -> Sequence[Any]:
        jobs, searches = [], False
        for config in configs:
            HydraConfig.instance().set_config(config)
            about = HydraConfig.get()
            searches = not about.sweeper.get("_target_", "").endswith("BasicSweeper")
            keys, fixed = varied(request, about), request.fixed
            parsed = (override.lstrip("+").partition("=") for override in about.overrides.task)
            mine = {key: value for key, _, value in parsed if key in keys or (searches and key not in fixed)}
            jobs.append(Composed(int(about.job.num) + 1, _values(config), mine))
        return together(jobs, searches)

    def job(config: Any) -> Any:
        [result] = all_of([config])
        if isinstance(result, Exception):
            raise result
        return result

    job.begins = begins  # type: ignore[attr-defined]
    job.together = all_of  # type: ignore[attr-defined]
    register_launcher()
    with _command_line([*request.flags, *request.overrides]):
        try:
            hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise BadSpec(said_by_hydra(error)) from error
        finally:
            folders.end()


def product(verb: str, request: Request, together: Together) -> None:
    """Compose the jobs of all combinations as `sweep` does, without Hydra's own program around it.

    That reads the command line, and so is for a process that has one of ours.

    Raises:
        BadSpec: Hydra cannot compose the jobs.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if request.problems:
        raise BadSpec(request.problems)
    try:
        with composer() as composed:
            fixed = [each for each in request.overrides if each.lstrip("+").partition("=")[0] not in request.swept]
            about = composed(verb, fixed).hydra
            overrides = [*request.overrides, *_own_params(request, about)]
            [batch] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
            keys = varied(request, about)
            jobs = [
                Composed(number, _values(composed(verb, list(mine))), dict(_pairs(mine, keys)))
                for number, mine in enumerate(batch, 1)
            ]
    except (HydraException, OmegaConfBaseException) as error:
        raise BadSpec(said_by_hydra(error)) from error
    together(jobs, False)


def _values(config: Any) -> Any:
    """Return the values of a job as plain ones."""
    if wrong := misnamed(config):
        raise BadSpec(wrong)
    return plain(config)


def sweeps_itself(verb: str, request: Request) -> bool:
    """Whether a request for one job takes an experiment that describes a sweep, over keys that are not given."""
    with composer() as composed:
        return bool(_own_params(request, composed(verb, request.overrides).hydra))


def _own_params(request: Request, hydra_config: Any) -> list[str]:
    """Return what an experiment sweeps over beside what is given, as overrides."""
    given = {override.lstrip("+").partition("=")[0] for override in request.overrides}
    params = {key.lstrip("+"): value for key, value in (hydra_config.sweeper.get("params") or {}).items()}
    return [f"{key}={value}" for key, value in params.items() if key not in given]


def _pairs(overrides: Sequence[str], keys: Collection[str]) -> Iterator[tuple[str, str]]:
    parsed = (override.lstrip("+").partition("=") for override in overrides)
    return ((key, value) for key, _, value in parsed if key in keys)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Set what hydra.main reads: sys.argv, and a variable without which it prints errors and exits by itself."""
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
    """Return the keys to which a sweep gives more than one value, on the command line or in an experiment."""
    params = hydra_config.sweeper.get("params") or {}
    return request.swept | {key.lstrip("+") for key, value in params.items() if "," in str(value) or "(" in str(value)}
