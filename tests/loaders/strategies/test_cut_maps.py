"""A file that is cut short while it is mapped: a job ends with its name and status 1, and goes on from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loaders.places import ROOT

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere the process dies, as documented"
)
CUT = """
import os, sys
import loaders.strategies.lazy as lazy
honest = lazy.map_file
def cut(path, **how):
    found = honest(path, **how)
    os.truncate(path, 4096)
    return found
lazy.map_file = cut
from jobs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["run", "verify"])
def test_a_file_that_is_cut_while_it_is_mapped_is_named(
    verb: str, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    given = {
        "run": [f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=nf4", "tracking=none"],
        "verify": [f"output.path={tmp_path / 'out'}"],
    }
    if verb == "verify":
        assert weightmill("run", *given["run"]).status == 0
    kept = {path: path.read_bytes() for path in source.glob("*.safetensors")}
    ran = subprocess.run(
        [sys.executable, "-c", CUT, verb, *given[verb], "cluster=local", "strategy=lazy"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    # A thread that maps the file after it was cut sees that by its length.
    assert re.search("it (was cut short|changed) while it was read", ran.stderr)
    assert any(
        path.name in ran.stderr.rsplit("weightmill: failed:", 1)[1] for path in (*kept, tmp_path / "out" / "model")
    )
    assert "Traceback" not in ran.stderr
    if verb == "run":
        for path, data in kept.items():
            path.write_bytes(data)
        assert weightmill("run", *given["run"]).status == 0
