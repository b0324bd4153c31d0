"""What a host does for `cluster`, which sends this file to its Python: say what it has, start Ray, stop it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MARK = "WEIGHTMILL_CLUSTER"  # in the environment of all that is started here, by which it is found again
FOLDER = Path.home() / ".weightmill-cluster" / socket.gethostname()  # homes may be one folder that hosts share
TOKEN = FOLDER / "token"


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the start time of every process."""
    found = {}
    for each in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended
            if each.name.isdigit():
                words = (each / "stat").read_text().rpartition(")")[2].split()
                if words[0] != "Z":
                    found[int(each.name)] = int(words[1]), words[19]
    return found


def ours() -> dict[int, str]:
    """Return the start times of the processes that were started here, by their numbers.

    Some of Ray's overwrite their environment by their title; they are children of others.
    """
    there = processes()
    found = set()
    for number in there:
        with suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}=ssh".encode() in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
                found.add(number)
    while more := {number for number, (parent, _) in there.items() if parent in found} - found:
        found |= more
    return {number: there[number][1] for number in found}


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def about() -> dict[str, Any]:
    is_up = bool(ours())
    return {
        "python": sys.version.split()[0],
        **{name: version_of(name) for name in ("ray", "weightmill", "numpy", "numba")},
        "is_up": is_up,
        "token": TOKEN.read_text() if is_up and TOKEN.exists() else None,
        "token_path": str(TOKEN),
        "ip": os.environ.get("SSH_CONNECTION", "").split()[2:3],  # the address by which SSH came
        "cpus": len(os.sched_getaffinity(0)),
    }


def start(head: bool, address: str, token: str, options: list[str], environment: dict[str, str]) -> dict[str, Any]:
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = FOLDER / secrets.token_hex(8)
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    made.replace(TOKEN)
    folder = Path(sys.executable).parent
    given = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    given |= {**environment, MARK: "ssh", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}
    given["PATH"] = os.pathsep.join([str(folder), given.get("PATH", os.defpath)])
    ran = subprocess.run(
        [folder / "ray", "start", "--head" if head else f"--address={address}", *options],
        env=given, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        stop()
        said = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
        return {"error": f"ray start, exit status {ran.returncode}: " + " / ".join(said[-3:])}
    return {}


def stop() -> dict[str, Any]:
    found = ours()

    def left() -> list[int]:
        there = processes()
        return [number for number, began in found.items() if number in there and there[number][1] == began]

    for how, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        for number in left():
            with suppress(ProcessLookupError):
                os.kill(number, how)
        deadline = time.monotonic() + patience_s
        while left() and time.monotonic() < deadline:
            time.sleep(0.1)
    TOKEN.unlink(missing_ok=True)
    for folder in (FOLDER, FOLDER.parent):
        with suppress(OSError):  # it is not there, or another host's is in it
            folder.rmdir()
    return {"stopped": len(found), "left": len(left())}


def answer(what: str, given: dict[str, Any]) -> str:
    try:
        return json.dumps({"about": about, "start": start, "stop": stop}[what](**given))
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})
