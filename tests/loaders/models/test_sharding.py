"""A model over several processes: each rank ends with its shard of the right values and never held more."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loaders.places import ROOT
from tests.loaders.models.large import bytes_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

DEMO = ROOT / "jobs" / "demo"
MIB = 1 << 20


def run_ranks(folder: Path, ways: tuple[str, ...], count: int, does_compute: bool = True) -> list[list[dict[str, Any]]]:
    """What each rank found, by way: starting the ranks takes longer than all of the ways."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    compute = "compute" if does_compute else "no"
    script = [sys.executable, "-m", "tests.loaders.models.ranks", str(folder), ",".join(ways), compute]
    ranks = [
        subprocess.Popen(script, cwd=ROOT, env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]  # fmt: skip
    found = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=600)
            assert rank.returncode == 0, err[-3000:]
            lines = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT ")]
            found.append([json.loads(line) for line in lines])
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()  # which closes its pipes, too
    return [list(of_way) for of_way in zip(*found, strict=True)]


def test_each_rank_ends_with_its_shard_of_the_right_values() -> None:
    ways, count = ("own", "scatter", "broadcast"), 2
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO).eval()
    with torch.no_grad():
        wanted = model(torch.arange(3, 20)[None]).logits.float().flatten()[:512]
    by_way = run_ranks(DEMO, ways, count)
    assert len(by_way) == len(ways)
    for way, each in ((way, each) for way, found in zip(ways, by_way, strict=True) for each in found):
        assert each["right"], (way, each["rank"])
        assert each["started_meta"] == (each["rank"] > 0), way
        assert torch.equal(torch.tensor(each["logits"]), wanted), way
        if way != "broadcast":
            assert each["held"] <= each["total"] / count + 64 * 1024  # rows do not divide evenly


@pytest.mark.slow
def test_no_rank_holds_more_than_its_shards(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = bytes_of(large)
    assert size >= 1_000_000_000
    [found] = run_ranks(large, ("own",), 2, does_compute=False)
    with capsys.disabled():
        for each in found:
            print(
                f"\n  rank {each['rank']}: model {each['total'] / MIB:.0f} MiB,"
                f" its shards {each['held'] / MIB:.0f} MiB, anonymous memory at most {each['peak'] / MIB:.0f} MiB",
                end="",
            )
    for each in found:
        assert each["right"]
        assert each["held"] <= size / 2 + MIB
        # Beside its shards a rank has the modules of transformers and torch that are imported while it is measured
        assert each["peak"] <= each["held"] + 200 * MIB
