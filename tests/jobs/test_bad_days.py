"""Jobs from bucket to bucket while something goes wrong between: each passes by trying again, or is one clear line,
nothing is visible, and the rerun goes on.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT
from tests.failing import at_first_unit
from tests.jobs.test_over_stores import comparable
from tests.making import make_source, snapshot
from tests.proxy import Cut, Fault, Header, Lengthen, Lose, Proxy, Refuse, Stall, Status, Truncate
from tests.shelf.places import ObjectPlace, Place, contents, fill

WEIGHTS = r"model-0000\d-of-00002\.safetensors"
PATIENT = "store.patience_s=60"
SHORT = "store.patience_s=0.3"


pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def proxy(s3_bucket: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, which requests of this test go through."""
    with Proxy(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


@pytest.fixture
def place(proxy: Proxy, s3_bucket: Address, tmp_path: Path) -> Place:
    return ObjectPlace(s3_bucket / tmp_path.name)


@pytest.fixture
def job(place: Place, model: Path, weightmill: Any) -> Callable[..., Any]:
    """A function that runs the job."""
    source = fill(place, model, "model")

    def run(*settings: str) -> Any:
        given = (f"model.path={source}", f"output.path={place.address / 'out'}", "quant=nf4", "unit_mb=0.05")
        return weightmill("run", *given, *settings)

    return run


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a job from folder to folder makes."""
    folder = tmp_path_factory.mktemp("wanted")
    given = (f"model.path={make_source(folder / 'model')}", f"output.path={folder / 'out'}", "quant=nf4")
    assert main(["run", *given, "unit_mb=0.05", "tracking=none"]) == 0
    return comparable(snapshot(folder / "out"))


PASSES: dict[str, tuple[Fault, dict[str, Any]]] = {
    "bodies that are cut": (Cut(after=3000), {"method": "GET", "path": f"/model/{WEIGHTS}", "times": 6}),
    "truncated bodies": (Truncate(after=3000), {"method": "GET", "path": f"/model/{WEIGHTS}", "times": 4}),
    "429": (Status(429, retry_after_s=0), {"path": WEIGHTS, "times": 5}),
    "a burst of 503": (Status(503), {"times": 5, "skip": 20}),
    "500": (Status(500), {"times": 3, "skip": 15}),
    "connections that are reset": (Refuse(), {"times": 5, "skip": 12}),
    "answers that are lost": (Lose(), {"method": "PUT", "times": 3}),
    "bodies that stall": (Stall(after=1000), {"method": "GET", "path": f"/model/{WEIGHTS}", "times": 2}),
    "everything, by chance": (Refuse(), {"chance": 0.05}),
}


@pytest.mark.parametrize("what", PASSES)
def test_what_passes_by_trying_again(
    what: str, proxy: Proxy, job: Callable[..., Any], place: Place, wanted: Any
) -> None:
    fault, given = PASSES[what]
    rule = proxy.add(fault, **given)
    ran = job(PATIENT, "store.timeout_s=0.5")
    assert ran.status == 0, ran.err
    assert rule.hits > 0
    assert comparable(contents(place.address / "out")) == wanted


def test_a_body_that_is_cut_goes_on_where_it_ended(
    proxy: Proxy, job: Callable[..., Any], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What came of a cut body is handed on in pieces of a size.
    monkeypatch.setattr("loaders.storage.objects.client.CHUNK", 1000)
    monkeypatch.setattr("loaders.storage.objects.store.PROGRESS", 1000)
    rule = proxy.add(Cut(after=3000), method="GET", path=f"/model/{WEIGHTS}")
    assert job(PATIENT).status == 0
    asked = [seen for seen in proxy.seen if seen.method == "GET" and seen.range and re.search(WEIGHTS, seen.target)]
    ends = [tuple(map(int, re.findall(r"\d+", seen.range or ""))) for seen in asked]
    cut = [(start, stop) for (start, stop), seen in zip(ends, asked, strict=True) if seen.sent < stop - start + 1]
    assert len(cut) == rule.hits - sum(stop - start < 3000 for start, stop in ends)
    went_on = {(start + 3000, stop) for start, stop in cut} & set(ends)
    assert len(went_on) > 0.9 * len(set(cut))


FAILS: dict[str, tuple[Fault, dict[str, Any], str]] = {
    "longer bodies": (Lengthen(by=7), {"method": "GET", "path": f"/model/{WEIGHTS}"}, "more than|another range"),
    "another version": (Header("ETag", '"other"'), {"method": "GET", "path": f"/model/{WEIGHTS}"}, "it changed while"),
    "403": (Status(403), {"method": "GET", "path": f"/model/{WEIGHTS}"}, r"reading .*you may not do this \(403"),
    "404": (Status(404), {"method": "GET", "path": f"/model/{WEIGHTS}"}, "it is not there"),
    "500 for ever": (Status(500), {"method": "GET", "path": f"/model/{WEIGHTS}"}, "the store answered 500; tried"),
    "503 for ever": (Status(503), {"method": "GET", "path": f"/model/{WEIGHTS}"}, "the store answered 503; tried"),
    "uploads refused": (Status(403), {"method": "PUT", "path": "/out/.*safetensors"}, r"you may not do this \(403"),
    "uploads failing": (Status(500), {"method": "PUT", "path": "/out/.*safetensors"}, "the store answered 500; tried"),
}


@pytest.mark.parametrize("what", FAILS)
def test_what_does_not_pass_is_one_clear_line(
    what: str, proxy: Proxy, job: Callable[..., Any], place: Place, wanted: Any
) -> None:
    fault, given, message = FAILS[what]
    out = place.address / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_first_unit(patch, lambda: proxy.add(fault, **given))
        ran = job(SHORT)
    check_failed(ran, message, out)
    proxy.clear()
    again = job(PATIENT, "format=json")
    assert again.status == 0, again.err
    assert comparable(contents(out)) == wanted


def check_failed(ran: Any, message: str, out: Address) -> None:
    """Check that a job failed by one clear line, and that nobody would take what is at its output for a checkpoint."""
    assert ran.status == 1, ran.err
    assert re.search(message, ran.err), ran.err
    assert "Traceback" not in ran.err
    names = {entry.name for entry in open_store(out).list()}
    assert not names & {"config.json", OUR_REPORT, "model.safetensors.index.json"}


def test_an_object_replaced_in_the_middle_is_named(
    job: Callable[..., Any], place: Place, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sorted(path.name for path in model.glob("*.safetensors"))[-1]
    at_first_unit(monkeypatch, lambda: place.put(f"model/{name}", (model / name).read_bytes()[::-1]))
    ran = job(SHORT)
    check_failed(ran, f"{name}: it changed while it was read", place.address / "out")


def test_no_network(proxy: Proxy, job: Callable[..., Any], place: Place) -> None:
    with proxy.down():
        ran = job(SHORT)
    assert ran.status == 1
    assert "the host refuses connections; tried" in ran.err
    assert "Traceback" not in ran.err
    assert job(PATIENT).status == 0


def test_a_network_that_goes_in_the_middle(proxy: Proxy, job: Callable[..., Any], place: Place, wanted: Any) -> None:
    proxy.add(Refuse(), method="GET", path=f"/model/{WEIGHTS}", skip=9)
    check_failed(job(SHORT), r"the connection was cut|no connection", place.address / "out")
    proxy.clear()
    again = job(PATIENT, "format=json")
    assert again.status == 0, again.err
    assert comparable(contents(place.address / "out")) == wanted


def test_a_name_that_is_not_resolved(proxy: Proxy, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000")
    ran = job(SHORT)
    assert ran.status == 1
    assert "the host's name is not resolved; is there a network?" in ran.err
    assert "Traceback" not in ran.err


def test_a_disk_of_scratch_that_is_full(proxy: Proxy, job: Callable[..., Any], place: Place, wanted: Any) -> None:
    honest, count = os.pwrite, [0]

    def full(descriptor: int, data: Any, at: int) -> int:
        count[0] += 1
        if count[0] > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(descriptor, data, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        ran = job(SHORT)
    check_failed(ran, "No space left on device; free some space", place.address / "out")
    again = job(PATIENT)
    assert again.status == 0, again.err
    assert comparable(contents(place.address / "out")) == wanted
