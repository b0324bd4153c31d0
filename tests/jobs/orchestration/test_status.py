"""What `status` and `list` say of outputs and jobs, from reports, journals and signs of life alone."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.output.journal import Journal
from jobs.output.life import FlyingUnit, Life, MachineSeen, Seen
from loaders.errors import VerifyFailed
from loaders.storage.address import Address
from tests.making import snapshot, write_checkpoint

REPORT = ["weightmill.json", "report.html", "README.md"]
MACHINES = tuple(
    MachineSeen(name=name, flying=2, done=13, retries=number, bytes=450_000_000, bytes_per_s=3e7)
    for number, name in enumerate(("h1", "h2"))
)
SEEN = Seen(
    doing="quantizing", seconds=20.0, units=41, done=26, retries=1, work_bytes=1_390_000_000, done_bytes=900_000_000,
    bytes_per_s=6e7, machines=MACHINES,
    flying=(FlyingUnit(unit="unit-00007", machine="h2", seconds=12.0, bytes=1000, still_s=3.0),),
)  # fmt: skip
LIFE = Life(
    state="running", why="", host="another-host", pid=17, started=1_700_000_000.0, told=1_700_000_020.0, every_s=5.0,
    versions={"weightmill": "1"}, cluster="the Ray cluster at h1", jobs_in_pass=1, units=41, units_done=26,
    units_resumed=0, seen=SEEN,
)  # fmt: skip


def under_way(root: Path, name: str = "out") -> Journal:
    return Journal(Address.of(root / name), "a" * 12)


def test_a_job_at_work_is_shown_with_its_machines_and_a_frozen_one_by_the_age_of_its_sign(
    tmp_path: Path, weightmill: Any
) -> None:
    journal = under_way(tmp_path)
    with journal.hold({"units": 41}, overwrite=False):
        first = weightmill("status", tmp_path / "out", "format=json")
        assert (first.status, first.document["state"], first.document["driver"]) == (0, "running", None)
        journal.destination.put("life.json", LIFE.to_bytes())
        for number in range(26):
            journal.destination.put(f"records/unit-{number:05}.json", b"{}")
        ran = weightmill("status", tmp_path / "out", "format=json")
        assert ran.status == 0
        found = ran.document
        assert found["units"] == {"total": 41, "done": 26, "flying": 1, "failed": 0, "left": 14}
        assert found["bytes"]["per_s"] == 6e7
        assert found["seconds_left"] == pytest.approx(490 / 45, rel=0.01)
        assert [each["name"] for each in found["machines"]] == ["h1", "h2"]
        assert found["driver"]["host"] == "another-host"
        assert found["driver"]["last_sign_age_s"] < 30
        text = weightmill("status", tmp_path / "out").out
        assert "units: 26 of 41 done, 1 in flight, 14 left, 1 retry" in text
        assert "60.00 MB/s now" in text
        assert "unit-00007" in text
        then = time.time() - 300
        os.utime(journal.destination.root / "life.json", (then, then))
        ran = weightmill("status", tmp_path / "out")
        assert ran.status == 1
        assert "silent: its driver is frozen, or its machine is gone" in ran.out
        assert "last sign of life 5 min ago" in ran.out


def test_who_drives_is_told_by_the_lock_here_and_by_the_sign_elsewhere(tmp_path: Path, weightmill: Any) -> None:
    """A lock that is free says that the driver has ended, if it ran here; other machines' locks may not be seen."""
    journal = under_way(tmp_path)
    with journal.hold({"units": 41}, overwrite=False):
        pass

    def state(life: Life, age_s: float) -> str:
        journal.destination.put("life.json", life.to_bytes())
        then = time.time() - age_s
        os.utime(journal.destination.root / "life.json", (then, then))
        return str(weightmill("status", tmp_path / "out", "format=json").document["state"])

    assert state(LIFE, 10) == "running"
    assert state(LIFE, 100) == "stopped"
    assert state(replace(LIFE, host=socket.gethostname()), 10) == "stopped"
    assert state(replace(LIFE, state="stopped"), 10) == "stopped"
    assert state(replace(LIFE, state="failed", why="the disk is full"), 10) == "failed"
    assert "the disk is full" in weightmill("status", tmp_path / "out").out


def test_a_stopped_job_goes_on_by_the_command_that_is_shown(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model.path={source}", "quant=mlx_int4", "quant.group_size=32", "unit_mb=0.05", "cluster.threads=1"]
    assert weightmill("run", *given, f"output.path={tmp_path / 'wanted'}").status == 0
    out = tmp_path / "an output"
    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", _stop)
        assert weightmill("run", *given, f"output.path={out}").status == 130
    ran = weightmill("status", out, "format=json")
    found = ran.document
    assert (ran.status, found["state"]) == (1, "stopped")
    assert found["units"]["done"] == found["units"]["total"] > 1
    assert found["driver"]["left_as"] == "stopped"
    text = weightmill("status", out)
    assert f"{found['units']['total']} of {found['units']['total']} units are done and kept" in text.out
    assert found["command"] in text.out
    words = shlex.split(found["command"])
    assert words[:2] == ["weightmill", "run"]
    assert {*given[1:], f"output.path={out}"} <= {*words}
    again = weightmill("run", *words[2:], "format=json")
    assert again.status == 0, again.err
    assert again.document["run"]["units_resumed"] == found["units"]["total"]
    assert snapshot(out, ignore=REPORT) == snapshot(tmp_path / "wanted", ignore=REPORT)
    done = weightmill("status", out, "format=json")
    assert (done.status, done.document["state"], done.document["journals"]) == (0, "complete", [])
    assert done.document["report"]["quant"] == "mlx_int4"
    assert "bits per weight" in weightmill("status", out).out


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_failed_job_says_why(source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise VerifyFailed("not published: it is not right")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", fail)
        ran = weightmill("run", f"model.path={source}", "quant=nf4", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    ran = weightmill("status", tmp_path / "out")
    assert ran.status == 1
    assert f"{tmp_path / 'out'}: failed\n  not published: it is not right" in ran.out


def test_what_is_damaged_is_said_and_what_is_planted_is_not_taken(tmp_path: Path, weightmill: Any) -> None:
    journal = under_way(tmp_path)
    root = journal.destination.root
    with journal.hold({"units": 41}, overwrite=False):
        pass
    (root / "life.json").write_bytes(LIFE.to_bytes()[:-20])
    (root / "job.json").write_bytes(b'{"xxh3":"0123456789abcdef","content":[]}')
    ran = weightmill("status", tmp_path / "out")
    assert ran.status == 1
    assert "job.json, life.json: damaged, or of another version of weightmill" in ran.out
    assert "run the same command again: what is done is kept" in ran.out
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (root / "life.json").unlink()
    (root / "life.json").symlink_to(secret)
    ran = weightmill("status", tmp_path / "out")
    assert ran.status == 2
    assert "found neither, or nothing that this user may read" in ran.err
    assert len(ran.err.splitlines()) == 1
    (tmp_path / "out").mkdir()
    assert weightmill("status", tmp_path / "out").status == 2
    (tmp_path / "out" / "weightmill.json").write_text("{")
    ran = weightmill("status", tmp_path / "out")
    assert ran.status == 1
    assert "not a report of weightmill" in ran.err


@pytest.mark.quick
def test_a_list_has_outputs_and_jobs_and_fits_a_terminal(
    tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, source = tmp_path / "outs", write_checkpoint(tmp_path / "a-source")
    assert weightmill("run", f"model.path={source}", "quant=nf4", f"output.root={root}").status == 0
    shutil.copytree(root / "a-source-nf4", root / "damaged")
    (root / "damaged" / "weightmill.json").write_text('{"format": 1, "run": []}')
    (root / "of-somebody").mkdir()
    journal = under_way(root, "half")
    with journal.hold({"units": 41}, overwrite=False):
        journal.destination.put("life.json", LIFE.to_bytes())
        found = weightmill("list", root, "format=json").document
        assert [(Path(row["output"]).name, row["state"]) for row in found["outputs"]] == [
            ("a-source-nf4", "complete"), ("damaged", "damaged"), ("half", "running"),
        ]  # fmt: skip
        done, _, half = found["outputs"]
        assert (done["quant"], done["model"], done["units"]) == ("nf4", "a-source", 1)
        assert done["bits_per_weight"] > 4
        assert (half["units_done"], half["units"]) == (0, 41)
        monkeypatch.setenv("COLUMNS", "80")
        text = weightmill("list", root)
        assert text.status == 0
        assert max(len(line) for line in text.out.splitlines() if "damaged/" not in line) <= 80
        assert "running 0/41" in text.out
        monkeypatch.setattr("jobs.orchestration.status.MOST_OUTPUTS", 1)
        cut = weightmill("list", root, "format=json").document
        assert cut["is_cut"]
        assert len(cut["outputs"]) == 2  # one of the folders, and the journal
    alone = weightmill("list", root / "a-source-nf4", "format=json").document
    assert [row["state"] for row in alone["outputs"]] == ["complete"]
    assert "no outputs of weightmill in" in weightmill("list", tmp_path / "nowhere").out


def test_a_bucket_is_looked_into_alike(
    source: Path, weightmill: Any, s3_bucket: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = s3_bucket / tmp_path.name
    given = [f"model.path={source}", "quant=nf4", "unit_mb=0.05"]
    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", _stop)
        assert weightmill("run", *given, f"output.path={root / 'half'}").status == 130
    assert weightmill("run", *given, f"output.path={root / 'whole'}").status == 0
    ran = weightmill("status", root / "half", "format=json")
    found = ran.document
    assert (ran.status, found["state"], found["driver"]["left_as"]) == (1, "stopped", "stopped")
    assert found["units"]["done"] == found["units"]["total"]
    assert weightmill("status", root / "whole").status == 0
    rows = weightmill("list", root, "format=json").document["outputs"]
    assert [(row["output"], row["state"]) for row in rows] == [
        (str(root / "half"), "stopped"), (str(root / "whole"), "complete"),
    ]  # fmt: skip
