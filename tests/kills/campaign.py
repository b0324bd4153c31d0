"""Kills a job from store to store at random points, again and again, and checks what readers and reruns find.

An S3 server (moto's, in a process of its own) lies behind a proxy that makes FAULTS. A job runs in a fork of one
process, so that its libraries are loaded once, and is killed (SIGKILL) a moment after one of its requests. The same
command runs again, is perhaps killed again, until it succeeds; then comes the next output. After each kill:

- nobody takes what lies at the output's address for a checkpoint, unless all of it is there and right;
- what was recorded as done still is;
- nothing that was recorded as done was uploaded again.

And after each success: the bytes are those of a job from folder to folder, as many units were resumed as had records,
and no journal, no upload under way and no temporary file is left.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaders.storage.base import OUR_REPORT
from tests.jobs.test_over_stores import comparable
from tests.kills.processes import SMALL_PART, Process
from tests.kills.targets import Bucket, Folder, Target
from tests.making import llama_tensors, make_source, snapshot
from tests.proxy import Cut, Fault, Lose, Proxy, Refuse, Seen, Status, Truncate

FAULTS: tuple[tuple[Fault, Mapping[str, Any]], ...] = (  # of a hundred requests, about five get one
    (Refuse(), {"chance": 0.01}),
    (Lose(), {"chance": 0.01}),
    (Status(503), {"chance": 0.01}),
    (Status(500), {"chance": 0.01}),
    (Cut(after=2000), {"chance": 0.01}),
    (Truncate(after=2000), {"chance": 0.02, "method": "GET", "path": r"/source/.*safetensors"}),
)
LAYERS = 4
# Moments that chance alone seldom meets: when what makes an output visible is written.
PUBLISHING = tuple(re.compile(rf"PUT /\w+/\w+/{name}\.json$") for name in (r"[\w.]+\.index", "config", "weightmill"))
LONGEST_S = 0.03  # from the request to the kill
STUCK_S = 300.0  # for which no run takes


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 100
    source: str = "s3"
    to: str = "s3"
    quant: str = "nf4"
    seed: int = 0

    @staticmethod
    def of(arguments: Sequence[str]) -> Options:
        given = dict(argument.split("=", 1) for argument in arguments)
        source, to = given.pop("from", "s3"), given.pop("to", "s3")
        numbers = {name: int(given.pop(name)) for name in ("kills", "seed") if name in given}
        if {source, to} - {"s3", "folder"} or source == to == "folder":
            raise SystemExit(f"from={source} to={to}: s3 and folder are known, and one of both is to be s3")
        return Options(source=source, to=to, **numbers, **given)  # type: ignore[arg-type]


@dataclass
class Tally:
    """What a campaign counted, and what it found wrong."""

    found: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)  # by how far the job had come
    runs: int = 0
    rounds: int = 0
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    uploaded: int = 0  # bytes of all runs
    fetched: int = 0
    once: tuple[int, int] = (0, 0)  # bytes that one undisturbed run uploads and fetches
    seconds: float = 0.0

    @property
    def table(self) -> str:
        rows = [("kills", sum(self.kills.values())), *((f"  {stage}", n) for stage, n in self.kills.items())]
        rows += [("runs", self.runs), ("outputs", self.rounds), ("requests", self.requests)]
        rows += [("faults", sum(self.faults.values())), *((f"  {name}", n) for name, n in self.faults.items())]
        sent, got = (total / max(1, once * self.rounds) for total, once in zip(self._moved, self.once, strict=True))
        rows += [("found wrong", len(self.found)), ("seconds", round(self.seconds))]
        lines = [f"{name:32} {number:8}" for name, number in rows]
        lines += [f"{'uploaded, undisturbed = 1':32} {sent:8.2f}", f"{'fetched, undisturbed = 1':32} {got:8.2f}"]
        return "\n".join([*lines, *(f"  {each}" for each in self.found)])

    @property
    def _moved(self) -> tuple[int, int]:
        return self.uploaded, self.fetched


class Watched(Proxy):
    """A proxy that says when so many more requests have arrived, or one for what has a match of a pattern."""

    _left: int | re.Pattern[str] = 0

    def after(self, requests: int | re.Pattern[str]) -> threading.Event:
        self._reached, self._left = threading.Event(), requests
        return self._reached

    def note(self, seen: Seen) -> None:
        super().note(seen)
        if isinstance(self._left, int):
            self._left -= 1
            is_reached = self._left == 0
        else:
            is_reached = bool(self._left.search(f"{seen.method} {seen.target}"))
        if is_reached:
            self._reached.set()


class Campaign:
    def __init__(
        self, options: Options, work: Path, proxy: Watched, forks: Process, target: Target, source: str, wanted: Any
    ) -> None:
        self._options = options
        self._work = work
        self._proxy = proxy
        self._forks = forks
        self._target = target
        self._wanted = wanted
        self._given = [*job_of(options, source), f"store.scratch={work / 'scratch'}", "store.patience_s=100"]
        self._random = random.Random(options.seed)
        self._usual = self._units = 0  # requests and units of an undisturbed run
        self.tally = Tally()

    def run(self) -> None:
        """Run all of it."""
        began = time.monotonic()
        self._round("undisturbed", kills=0)
        self.tally.once = self.tally.uploaded, self.tally.fetched
        self._usual = self.tally.requests
        rules = [self._proxy.add(fault, **given) for fault, given in FAULTS]
        self.tally = Tally(found=self.tally.found, once=self.tally.once)
        while (left := self._options.kills - sum(self.tally.kills.values())) > 0:
            self._round(f"out{self.tally.rounds}", left)
            self.tally.rounds += 1
        for rule in rules:
            self.tally.faults[type(rule.fault).__name__] += rule.hits
        self.tally.seconds = time.monotonic() - began

    def _round(self, name: str, kills: int) -> None:
        """Make one output, by as many runs as it takes."""
        done: dict[str, bytes] = {}  # the records before the run
        while True:
            wait = self._moment(is_rerun=bool(done)) if kills > 0 else None
            was_published = OUR_REPORT in self._target.visible(name)
            status, log = self._one_run(name, wait)
            self._check_run(name, done)
            if status == -signal.SIGKILL:
                kills -= 1
                visible, now = self._target.visible(name), self._target.records(name)
                self._check_visible(name, visible)
                self.tally.kills[self._stage(visible, now)] += 1
                if OUR_REPORT in visible and not self._target.left(name):
                    break  # killed after its very last step
                # When the journal is removed, records are.
                if OUR_REPORT not in visible and not done.items() <= now.items():
                    self._found(name, f"records are gone: {sorted(done.keys() - now.keys())}, or others")
                done = now
                continue
            if status != 0:
                self._found(name, f"status {status}: {Path(f'{log}.err').read_text().strip()[-500:]}")
                break
            ran = json.loads(Path(f"{log}.out").read_text())["run"]
            self._units, resumed = ran["units"], ran["units_resumed"]
            if resumed != len(done) and not was_published:
                self._found(name, f"{resumed} units were resumed, {len(done)} had records")
            break
        self._check_end(name)

    def _moment(self, *, is_rerun: bool) -> int | re.Pattern[str] | None:
        """Choose the request after which a run is killed; None: it is let be."""
        if self._random.random() < (0.4 if is_rerun else 0.05):
            return None
        if self._random.random() < 0.2:
            return self._random.choice(PUBLISHING)
        # A rerun has less to do.
        return self._random.randint(1, max(1, self._usual // (2 if is_rerun else 1)))

    def _one_run(self, name: str, wait: int | re.Pattern[str] | None) -> tuple[int, str]:
        """Run the job until it ends or is killed, after requests; its status, and where its output is."""
        self._proxy.forget()
        log = str(self._work / "log")
        reached = self._proxy.after(wait or -1)
        self._forks.tell(json.dumps([[*self._given, f"output.path={self._target.address(name)}"], log]))
        pid, began = int(self._forks.answer()), time.monotonic()
        while not self._forks.has_answered:
            if reached.wait(0.005):
                time.sleep(self._random.choice((0, self._random.uniform(0, LONGEST_S))))
                os.kill(pid, signal.SIGKILL)
                break
            if time.monotonic() - began > STUCK_S:
                os.kill(pid, signal.SIGKILL)
                self._found(name, f"it takes more than {STUCK_S:g} s")
                break
        status = int(self._forks.answer())
        self._proxy.settle()
        self.tally.runs += 1
        self.tally.requests += self._proxy.count()
        self.tally.uploaded += self._proxy.received()
        self.tally.fetched += self._proxy.sent("GET", "/source/")
        return status, log

    def _found(self, name: str, what: str) -> None:
        self.tally.found.append(f"seed {self._options.seed}, {name}, run {self.tally.runs}: {what}")

    def _check_run(self, name: str, done: Mapping[str, bytes]) -> None:
        """Check that a run did not upload what was done before."""
        files = [row["name"] for record in done.values() for row in json.loads(record)["content"]["files"]]
        for seen in self._proxy.seen:
            path = seen.target.partition("?")[0]
            is_upload = seen.method in ("PUT", "POST") and "/kept/" not in path and seen.received > 0
            if is_upload and any(path.endswith((f"/{name}/{file}", f"/pieces/{file}")) for file in files):
                self._found(name, f"done before, and uploaded again: {path}")

    def _check_visible(self, name: str, visible: Mapping[str, bytes]) -> None:
        """Check that what is visible is not half a result."""
        files, report = self._wanted
        signs = [file for file in ("config.json", OUR_REPORT) if file in visible]
        missing = files.keys() - visible.keys()
        if signs and missing:
            self._found(name, f"half a result is visible: {signs[0]}, and no {sorted(missing)[0]}")
        elif OUR_REPORT in visible and comparable(visible) != (files, report):
            self._found(name, "a wrong result is visible")
        elif signs:
            self._compare(name, comparable({**visible, OUR_REPORT: visible.get(OUR_REPORT, b"") or _EMPTY})[0])

    def _compare(self, name: str, files: Mapping[str, bytes]) -> None:
        wanted: Mapping[str, bytes] = self._wanted[0]
        for file in sorted(wanted.keys() | files.keys()):
            if wanted.get(file) != files.get(file):
                self._found(name, f"{file} is not as it should be")

    def _stage(self, visible: Mapping[str, bytes], records: Mapping[str, bytes]) -> str:
        if OUR_REPORT in visible:
            return "published, not tidied"
        if "config.json" in visible:
            return "while it was published"
        if len(records) == self._units:
            return "all units done"
        return f"{'some' if records else 'no'} units done"

    def _check_end(self, name: str) -> None:
        visible = self._target.visible(name)
        self._check_visible(name, visible)
        if OUR_REPORT not in visible:
            self._found(name, "there is no result")
        if left := self._target.left(name):
            self._found(name, f"left: {left[:5]}")
        if left := [str(path) for place in ("scratch", "tmp") for path in (self._work / place).rglob("*")]:
            self._found(name, f"left in scratch: {left[:5]}")


_EMPTY = b'{"run": 0, "source": {"path": 0}, "job": {"model": {"path": 0}}}'


def job_of(options: Options, source: str) -> list[str]:
    return [
        "run", f"model.path={source}", "model.name=model", f"quant={options.quant}", "unit_mb=0.05", "tracking=none",
        "format=json",
    ]  # fmt: skip


def campaign(options: Options, work: Path) -> Tally:
    """Run a campaign, with files in the folder `work`."""
    model = make_source(work / "model", llama_tensors(layers=LAYERS), num_hidden_layers=LAYERS)
    for name in ("scratch", "tmp"):
        (work / name).mkdir()
    environment = {
        "AWS_ACCESS_KEY_ID": "key-of-tests", "AWS_SECRET_ACCESS_KEY": "secret-of-tests", "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "S3_UPLOAD_PART_MIN_SIZE": str(SMALL_PART), "TMPDIR": str(work / "tmp"),
    }  # fmt: skip
    with Process("serve", environment=environment) as server:
        bucket = Bucket(endpoint := server.answer())
        for path, data in snapshot(model).items():
            bucket.put(f"source/{path}", data)
        warm = [*job_of(options, str(model)), f"output.path={work / 'wanted'}"]
        with Watched(endpoint, seed=options.seed) as proxy:
            environment["AWS_ENDPOINT_URL"] = proxy.url
            with Process("fork", *warm, environment=environment) as forks:
                assert forks.answer() == "ready"
                made = Campaign(
                    options, work, proxy, forks,
                    target=bucket if options.to == "s3" else Folder(work / "outputs"),
                    source=bucket.address("source") if options.source == "s3" else str(model),
                    wanted=comparable(snapshot(work / "wanted")),
                )  # fmt: skip
                made.run()
    return made.tally
