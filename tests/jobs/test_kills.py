"""A short campaign of kills; `python -m tests.kills` runs longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills.campaign import Options, campaign

pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")


@pytest.mark.parametrize("quant", ["nf4", "gguf_q8_0"])
def test_a_job_that_is_killed_again_and_again_ends_as_if_it_never_was(quant: str, tmp_path: Path) -> None:
    tally = campaign(Options(kills=3, quant=quant, seed=1), tmp_path)
    assert tally.found == []
    assert sum(tally.kills.values()) == 3
    assert sum(tally.faults.values()) > 0
