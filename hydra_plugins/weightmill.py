"""Hydra's launcher for sweeps: it hands all jobs of a batch over at once, so that those with one source share a pass.

Hydra takes launchers from this namespace only, which is why the folder has no __init__.py. What to do with the jobs
is the task function's `together`, and its `begins` comes before anything is written; whatever sweeper is in use, Basic
or one that searches, gets back what `together` returns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class Remembering:
    """Hydra's config loader, which composes a job of a sweep once: sweepers compose every job to see that they can, and
    the launcher would compose it again, which takes as long as quantizing a small model.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """For a sweeper: kept until `take`."""
        found: DictConfig = self._loader.load_sweep_config(master_config=master_config, sweep_overrides=sweep_overrides)
        self._composed[tuple(sweep_overrides)] = found
        return found

    def take(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """For the launcher: its own from now on."""
        known = self._composed.pop(tuple(sweep_overrides), None)
        found: DictConfig = self._loader.load_sweep_config(master_config, sweep_overrides) if known is None else known
        return found


class OnePass(Launcher):
    """hydra/launcher=weightmill."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader = Remembering(hydra_context.config_loader)
        context: Any = hydra_context
        context.config_loader = self._loader  # the sweeper's, too
        task: Any = task_function
        self._task = task
        self._config = config
        self._task.begins(config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all, do all; a result for each, in their order."""
        setup_globals()
        composed = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._loader.take(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = str(number)
                config.hydra.job.num = number
            composed.append(config)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)  # sweepers that search write there
        results = self._task.together(composed)
        returns = []
        for config, overrides, result in zip(composed, job_overrides, results, strict=True):
            HydraConfig.instance().set_config(config)
            job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            done = JobReturn(overrides=list(filter_overrides(overrides)), cfg=job, hydra_cfg=config, working_dir=".")
            done.status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
            done.return_value = result
            returns.append(done)
        return returns
