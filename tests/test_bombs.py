"""Small files that would hang a reader, or take all memory, are refused: in a process of little time and memory."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest

from loaders.places import ROOT
from tests.bombs import BOMBS

pytestmark = pytest.mark.quick
CPU_S = 60  # of all of them together; one that is not refused takes hours
MEMORY = 3 << 30  # of address space, of which the libraries alone take two thirds


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bombs", tmp_path_factory.mktemp("bombs")],
        cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = dict(map(json.loads, ran.stdout.splitlines()))
    assert ran.returncode == 0, (ran.returncode, list(found)[-1:], ran.stderr[-3000:])
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str, said: dict[str, str]) -> None:
    assert re.search(BOMBS[name][1], said[name]), said[name]
    assert len(said[name]) < 1000


def test_all_refusals_are_of_the_checkpoint(said: dict[str, str]) -> None:
    assert {each.partition(":")[0] for each in said.values()} <= {"BadCheckpoint", "opened"}
