"""Results of kernels on a CPU with nothing beyond the baseline (SSE2, NEON), for which they have portable forms."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loaders.places import ROOT

CODE = """
import pickle, sys
from {module} import {name}
from loaders.quantization.kernels.lanes import host_has
assert not host_has("avx2")
sys.stdout.buffer.write(pickle.dumps({name}()))
"""


def differing(results: Callable[[], dict[str, bytes]], cache: Path) -> list[str]:
    """Return the names of the results that a process finds otherwise if it is told that its CPU is a plain one.

    `results` is a function of a module; `cache` is a folder for what numba compiles.
    """
    code = CODE.format(module=results.__module__, name=results.__name__)
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(cache),
    }
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    plain, here = pickle.loads(ran.stdout), results()
    assert plain.keys() == here.keys()
    return [name for name in here if here[name] != plain[name]]
