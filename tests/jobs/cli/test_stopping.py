"""A signal to stop is answered while code runs that does not listen to any."""

from __future__ import annotations

import signal
import time

import pytest

from tests.processes import start

CODE = """
import hashlib, signal, sys, time
from jobs.cli import stopping
stopping.SAY_S, stopping.DEAF_S = 0.2, {deaf}
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    with stopping.answering():
        print("ready", flush=True)
        try:
            {work}
        finally:
            time.sleep({tidy})
except KeyboardInterrupt:
    sys.exit(7)
"""
SAID = "weightmill: stopping; what is finished is kept\n"
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 1_000_000_000)"  # minutes, of one call


@pytest.mark.quick
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("work", "tidy", "status", "said"),
    [
        (
            DEAF,
            0,
            130,
            f"{SAID}weightmill: stopped: interrupted in code that does not listen; the same command goes on\n",
        ),
        ("time.sleep(100)", 0.6, 7, SAID),
        ("time.sleep(100)", 0, 7, ""),
    ],
    ids=["deaf", "long to tidy up", "at once"],
)
def test_a_signal_is_answered(work: str, tidy: float, status: int, said: str, number: signal.Signals) -> None:
    code = CODE.format(work=work, tidy=tidy, deaf=1 if work == DEAF else 60)
    process = start("-c", code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, said)
