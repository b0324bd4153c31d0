"""requirements.lock has the versions of constraints.txt, and hashes for all of them; .ci/lock writes it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"^([A-Za-z0-9_.\-]+)==([^\s;]+)", re.MULTILINE)
# Of other systems and Pythons than those of constraints.txt.
ELSEWHERE = {"colorama", "httpx2-jsfetch"}


def _pins(name: str) -> dict[str, str]:
    return {_plain(package): version for package, version in PINNED.findall((ROOT / name).read_text())}


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_it_has_the_versions_that_are_tested() -> None:
    locked, tested = _pins("requirements.lock"), _pins("constraints.txt")
    assert {package: tested.get(package) for package in locked.keys() - ELSEWHERE} == {
        package: version for package, version in locked.items() if package not in ELSEWHERE
    }


def test_it_has_hashes_for_all_that_a_job_needs() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert all(PINNED.match(entry) and "--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        each for name in ("mlflow", "plots", "ray", "hub", "stores") for each in project["optional-dependencies"][name]
    ]
    wanted = [each for each in (*project["dependencies"], *extras) if not each.startswith("weightmill[")]
    needed = {_plain(re.match(r"[\w.\-]+", each)[0]) for each in wanted}  # type: ignore[index]
    assert needed <= _pins("requirements.lock").keys()
