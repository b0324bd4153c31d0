"""The processes of a campaign of kills: S3's server, and one that forks the jobs which are killed."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.processes import start

SMALL_PART = 8 << 10  # bytes of an upload's part, so that files of this small model are uploaded in parts


def serve() -> None:
    """Run moto's S3 until standard input ends; prints its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()
    server.stop()


def fork(warm: Sequence[str]) -> None:
    """Run a first job, then each job that a line of standard input describes, in a fork: prints its pid and status."""
    import botocore.session
    import obstore.store  # noqa: F401

    from jobs.cli.main import main
    from loaders.storage import patience
    from loaders.storage.objects import assembly, upload

    patience.FIRST_PAUSE_S = 0.02
    upload.PART = assembly.PART = SMALL_PART
    assembly.SMALLEST_PART = SMALL_PART
    upload.part_size = lambda _: SMALL_PART
    botocore.session.Session().get_service_model("s3")  # read from its files once
    with _instead("/dev/null"):
        assert main(warm) == 0
    assert threading.active_count() == 1, "a fork would have only one of the threads"
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with _instead(log):
                sys.exit(main(arguments))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@contextmanager
def _instead(path: str) -> Iterator[None]:
    """Let this process's output go to PATH.out and PATH.err, or all of it to /dev/null."""
    sys.stdout.flush()
    before = os.dup(1), os.dup(2)
    for number, suffix in ((1, ".out"), (2, ".err")):
        to = os.open(path if path == os.devnull else path + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, number)
        os.close(to)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)


class Process:
    """One of the functions above in a process of its own, which answers by lines."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]) -> None:
        given = {"stdin": subprocess.PIPE, "stderr": None}
        self._process = start("-m", "tests.kills", *arguments, environment=environment, **given)

    def answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"it ended with status {self._process.wait()}"
        return line

    @property
    def has_answered(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
