"""The fixtures that all tests share."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.storage import patience
from loaders.storage.address import Address
from loaders.storage.settings import current, use
from tests import object_servers
from tests.hub.server import Hub
from tests.hub.server import serving as serving_hub
from tests.making import write_checkpoint
from tests.shelf import serving
from tests.shelf.places import KINDS, FolderPlace, ObjectPlace, Place, ShelfPlace


@dataclass(frozen=True)
class Ran:
    """The result of a command: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def weightmill(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """A function that runs a verb in this process, in an empty folder, as the console script does."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)  # readline, which pytest imports, sets it

    def run(verb: str, *arguments: Any) -> Ran:
        from jobs.cli.main import main

        capsys.readouterr()
        given: Sequence[str] = [str(a) for a in arguments]
        if verb == "run" and not any(a.startswith("tracking") for a in given):
            given = [*given, "tracking=none"]
        status = main([verb, *given])
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return run


@pytest.fixture(autouse=True)
def _store_settings() -> Iterator[None]:
    """Give each test the settings of stores that the process had before, whatever it makes of them."""
    before = current()
    yield
    use(before)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts at a request."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.005)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Disable torch.compile: transformers 5.23 compiles BitNet's unpacking, which needs a C++ compiler and 20 s."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small sharded Llama in bfloat16."""
    return write_checkpoint(tmp_path / "source", shards=3)


@pytest.fixture(scope="session")
def shelves() -> Iterator[Address]:
    """The address of a server of the second kind of store, which all tests of a process share."""
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[Address]:
    """A bucket of an S3 server, which all tests of a process share."""
    pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")
    with object_servers.s3() as address:
        yield address


@pytest.fixture(scope="session")
def gs_bucket() -> Iterator[Address]:
    """A bucket of a server that imitates Google's, which all tests of a process share."""
    pytest.importorskip("moto", reason="moto[server], which imitates S3, is not installed")
    with object_servers.gs() as address:
        yield address


@pytest.fixture(scope="session")
def az_bucket() -> Iterator[Address]:
    """A container of an Azure server, which all tests of a process share."""
    command = object_servers.azurite()
    if command is None:
        pytest.skip("azurite, which imitates Azure's blobs, is not installed: npm install -g azurite")
    with object_servers.az(command) as address:
        yield address


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, which huggingface_hub in this process and its children asks; nobody is logged in."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    with serving_hub() as made:
        # It reads the environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in (("HF_ENDPOINT", made.url), ("HF_HOME", str(home)), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        yield made


@pytest.fixture
def mine(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The Hub, where the account `me` is logged in; journals are in a folder of the test."""
    hub.tokens["hf_mine"] = "me"
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("WEIGHTMILL_CACHE", str(tmp_path / "cache"))
    return hub


@pytest.fixture
def place_of(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Place]:
    """A function that makes an empty place of a kind."""
    numbers = itertools.count()

    def make(kind: str) -> Place:
        name = f"place{next(numbers)}"
        if kind == "folder":
            return FolderPlace(tmp_path / name)
        if kind == "shelf":
            shelves: Address = request.getfixturevalue("shelves")
            return ShelfPlace(shelves / tmp_path.name / name)
        bucket: Address = request.getfixturevalue(f"{kind}_bucket")
        return ObjectPlace(bucket / tmp_path.name / name)

    return make


@pytest.fixture(params=KINDS)
def place(place_of: Callable[[str], Place], request: pytest.FixtureRequest) -> Place:
    """An empty place of each kind."""
    return place_of(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `cluster` out, unless they are asked for by their mark, their place or their name.

    Slow tests are run first: those left at the end are short, so no process of pytest-xdist waits long for another.
    """
    marks = config.option.markexpr
    by_name = any("tests/cluster" in argument or "::" in argument for argument in config.args)
    if "cluster" not in marks and (marks or not by_name):
        left_out = [item for item in items if item.get_closest_marker("cluster")]
        items[:] = [item for item in items if not item.get_closest_marker("cluster")]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="module")
def work() -> Iterator[ThreadedWork]:
    with Crew(2) as crew:
        yield ThreadedWork(kernels_of("cpu"), crew, threading.Event())
