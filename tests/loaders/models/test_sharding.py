"""A model over several processes: each rank ends with its shard of the right values and never held more."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from loaders.places import DEMO
from tests.loaders.models.large import bytes_of
from tests.processes import start

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

MIB, COUNT = 1 << 20, 2
WAYS = ("own", "scatter", "broadcast")


@pytest.fixture(scope="module")
def by_rank(large: Path) -> list[list[dict[str, Any]]]:
    """What each rank found: of the demo by all ways, of the large model by the first.

    One start for all: it takes longer than the loading.
    """
    models = [(str(DEMO), WAYS, True), (str(large), WAYS[:1], False)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(COUNT), "PYTHONWARNINGS": "ignore",
        "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        start("-m", "tests.loaders.models.ranks", json.dumps(models), environment={**environment, "RANK": str(rank)})
        for rank in range(COUNT)
    ]
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
    return found


@pytest.mark.slow
def test_each_rank_ends_with_its_shard_of_the_right_values(by_rank: list[list[dict[str, Any]]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO).eval()
    with torch.no_grad():
        wanted = model(torch.arange(3, 20)[None]).logits.float().flatten()[:512]
    for way, each in ((way, each) for found in by_rank for way, each in zip(WAYS, found[:-1], strict=True)):
        assert each["right"], (way, each["rank"])
        assert each["started_meta"] == (each["rank"] > 0), way
        assert torch.equal(torch.tensor(each["logits"]), wanted), way
        if way != "broadcast":
            assert each["held"] <= each["total"] / COUNT + 64 * 1024  # rows do not divide evenly


@pytest.mark.slow
def test_no_rank_holds_more_than_its_shards(
    large: Path, by_rank: list[list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    size = bytes_of(large)
    assert size >= 1_000_000_000
    found = [results[-1] for results in by_rank]
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
