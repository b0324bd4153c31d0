"""The command that goes on with a job, from the request in its journal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.report.command import rerun_of
from jobs.spec.job import JobSpec
from jobs.tracking.job_run import flat

# Where it goes is all in output.path, and where the source is in model.path; a password is nowhere.
MAY_DIFFER = {"output.path", "output.branch", "model.path", "model.hub_id", "model.revision", "tracking.uri"}


def composed(given: list[str]) -> JobSpec:
    return compose("run", JobSpec, take_apart("run", JobSpec, given))


@pytest.mark.quick
@pytest.mark.parametrize(
    "given",
    [
        ["model.path=/a folder/z", "unit_mb=30", "cluster.threads=1"],
        ["quant=hqq4", "tracking=none", "cluster=ray", "lint=warn", "rules=[{action: keep, name: lm_head}]"],
        ["quant=auto", "quant.engine=mlx", "quant.target_bits=4.5", "tracking.uri=http://me:secret@h:5000",
         "output.path=hf://me/x", "output.branch=b", "store.at_once=8"],
        ["model=llama70b", "quant=gguf_q4_k_m", "strategy=read", "tracking.experiment=mine", "output.root=/outs"],
        ["transform=merge_lora", "transform.path=/an/adapter", "output.overwrite=true"],
    ],
)  # fmt: skip
def test_it_asks_for_the_same(given: list[str]) -> None:
    spec = composed(given)
    command = rerun_of(spec.resolved(), str(spec.output_address))
    assert "secret" not in command
    again = composed(shlex.split(command)[2:])
    assert again.output_address == spec.output_address
    assert again.source_address == spec.source_address
    assert dict(settings(again)) == dict(settings(spec))


def settings(spec: JobSpec) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in flat(spec.resolved()) if name not in MAY_DIFFER)
