"""Short campaigns of kills and flips; `python -m tests.kills` and `python -m tests.flips` run longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flips.campaign import SINGLE
from tests.flips.campaign import campaign as flip_campaign
from tests.kills.campaign import Options, campaign
from tests.kills.folders import folder_campaign
from tests.kinds_of_jobs import KINDS


@pytest.mark.parametrize("quant", ["nf4", "gguf_q8_0"])
def test_a_job_that_is_killed_again_and_again_ends_as_if_it_never_was(quant: str, tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")
    tally = campaign(Options(kills=3, quant=quant, seed=1), tmp_path)
    assert tally.found == []
    assert sum(tally.kills.values()) == 3
    assert sum(tally.faults.values()) > 0


def test_jobs_of_every_kind_that_are_killed_in_folders_end_as_if_they_never_were(tmp_path: Path) -> None:
    tally = folder_campaign(tmp_path, kills=len(KINDS), seed=1)
    assert tally.found == []
    assert tally.kills.keys() == KINDS.keys()


def test_bits_that_flip_in_outputs_and_journals_are_noticed_or_mean_nothing(tmp_path: Path) -> None:
    tally = flip_campaign(tmp_path, flips=6 * len(SINGLE), seed=1)
    assert tally.found == []
    assert tally.noticed
