"""The wheel: it holds every file that git has, and works, installed read-only, for a user without a name."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from loaders.places import ROOT
from tests.other_users import as_nobody

PACKAGES = ("conf", "hydra_plugins", "jobs", "loaders", "weightmill")
BESIDE = ("deploy", "docs")  # in a release's source, and not in the wheel


def tracked() -> list[str]:
    """Return the paths of the checkout that belong to a build."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own is private."""
    with tempfile.TemporaryDirectory(prefix="wheel-", dir="/tmp", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """The wheel of this checkout, built from a copy, which keeps what other builds left out of it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout, whose files git lists")
    for name in tracked():
        if name.split("/")[0] in (*PACKAGES, *BESIDE) or "/" not in name:
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / "source" / name)
    # Of setuptools, pip would fetch another one for the build if it were not told to take this.
    is_new = int(metadata.version("setuptools").partition(".")[0]) >= 77
    command = ["wheel", "--no-deps", *(["--no-build-isolation"] if is_new else []), "--wheel-dir", str(place / "made")]
    pip(*command, str(place / "source"))
    [made] = (place / "made").glob("*.whl")
    return made


def pip(*arguments: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_it_holds_every_file_of_its_packages(wheel: Path) -> None:
    ours = {name for name in tracked() if name.split("/")[0] in PACKAGES and "/" in name}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == ours


def test_the_source_of_a_release_has_the_recipes(wheel: Path, place: Path) -> None:
    code = "import setuptools.build_meta as build; build.build_sdist('released')"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=place / "source", capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    [made] = (place / "source" / "released").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {
            name.partition("/")[2]: file.mode & 0o111 for name, file in zip(archive.getnames(), archive, strict=True)
        }
    wanted = {name for name in tracked() if name.startswith("deploy/") or name == "docs/clusters.md"}
    assert wanted <= {*held}
    assert held["deploy/ssh/cluster"]


def test_it_works_read_only_from_an_empty_folder_for_a_user_without_a_name(wheel: Path, place: Path) -> None:
    site, here, temporary = place / "site", place / "here", place / "tmp"
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    for folder in (here, temporary):
        folder.mkdir()
        folder.chmod(0o777)
    given = {
        "cwd": here,
        "environment": {"PYTHONPATH": str(site), "TMPDIR": str(temporary), "HOME": "/root"},
        "mounts": f"mount --bind {site} {site} && mount -o remount,bind,ro {site}",
    }
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    where = as_nobody(
        "-c", "import conf, jobs, loaders; print(conf.__path__, jobs.__path__, loaders.__path__)", **given
    )
    assert where.stdout.count(f"'{site}/") == 3, where.stderr
    for words in (
        ("run", "tracking=none", "cluster=local", "output.path=out"),
        ("verify", "out"),
        ("plan", "quant=gguf_q4_k_m"),
    ):
        ran = as_nobody(site / "bin" / "weightmill", *words, **given)
        assert ran.returncode == 0, ran.stderr
        assert "Traceback" not in ran.stderr + ran.stdout
    assert (here / "out" / "report.html").is_file()
    assert {each.name for each in here.iterdir()} == {"out"}
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before
    assert not [each for each in site.rglob("*") if each.is_file() and each.stat().st_mode & stat.S_IWOTH]
