"""What a person reads when a store cannot be used: one line, and the right exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.storage.address import Address
from loaders.storage.objects import client as object_client
from tests import object_servers
from tests.making import make_source
from tests.object_servers import Files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


@pytest.fixture
def served(model: Path) -> Iterator[tuple[Address, type[Files]]]:
    with object_servers.http(model.parent) as (address, server):
        yield address / model.name, server


def test_a_model_is_read_from_a_web_server(
    served: tuple[Address, type[Files]], model: Path, tmp_path: Path, weightmill: Any
) -> None:
    for source, out in ((served[0], "far"), (model, "near")):
        ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / out}", "quant=nf4")
        assert ran.status == 0, ran.err
    for file in (tmp_path / "near").glob("*.safetensors"):
        assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes()


def test_an_output_is_verified_over_http(tmp_path: Path, model: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=nf4").status == 0
    with object_servers.http(tmp_path) as (address, _):
        ran = weightmill("verify", f"output.path={address}/out")
        assert ran.status == 0, ran.err
        ran = weightmill("run", f"model.path={model}", f"output.path={address}/other", "quant=nf4")
        assert ran.status == 2
        assert "http:// can be read, not written; choose a folder, or one of hf://, s3://, gs://, az://" in ran.err


def test_a_server_that_stays_busy_fails_the_job(
    served: tuple[Address, type[Files]], tmp_path: Path, weightmill: Any
) -> None:
    address, server = served
    server.fails[:] = [(503, "SlowDown")] * 1000
    ran = weightmill(
        "run", f"model.path={address}", f"output.path={tmp_path / 'out'}", "quant=nf4", "store.patience_s=0"
    )
    assert ran.status == 1
    assert "the store answered 503" in ran.err
    assert "run the same command again later" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_said(s3_bucket: Address, tmp_path: Path, weightmill: Any) -> None:
    out = f"output.path={tmp_path / 'out'}"
    ran = weightmill("run", f"model.path={s3_bucket}/none", out, "quant=nf4")
    assert ran.status == 2
    assert f"expected a folder of weights at {s3_bucket}/none, found nothing there" in ran.err
    ran = weightmill("run", "model.path=s3://no-such-bucket/none", out, "quant=nf4")
    assert ran.status == 1
    assert "there is no such bucket" in ran.err


def test_a_host_that_is_not_reached_is_named(tmp_path: Path, weightmill: Any) -> None:
    out = f"output.path={tmp_path / 'out'}"
    place = "model.path=http://me:secret@127.0.0.1:1/model"
    ran = weightmill("run", place, out, "quant=nf4", "store.patience_s=0")
    assert ran.status == 1
    assert "check the network, and whether 127.0.0.1:1 is the host that you mean" in ran.err
    assert "secret" not in ran.err


def test_an_output_with_a_slip_in_its_url_is_refused(model: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={model}", "output.path=s3:/bucket/out", "quant=nf4")
    assert ran.status == 2
    assert "output.path: expected a path or a URL, as s3://bucket/out; found s3:/" in ran.err
    assert not Path("s3:").exists()


def test_an_output_in_a_bucket_that_is_not_there(s3_bucket: Address, model: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={model}", "output.path=s3://no-such-bucket/out", "quant=nf4")
    assert ran.status == 1
    assert "there is no such bucket" in ran.err
    assert "Traceback" not in ran.err


def test_missing_libraries_are_named(weightmill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    object_client._client.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    ran = weightmill("run", "model.path=s3://bucket/m", f"output.path={tmp_path / 'out'}", "quant=nf4")
    assert ran.status == 2
    assert "pip install 'weightmill[stores]'" in ran.err


def test_a_plan_says_how_pieces_are_joined(s3_bucket: Address, model: Path, tmp_path: Path, weightmill: Any) -> None:
    out = s3_bucket / tmp_path.name / "out"
    ran = weightmill("plan", f"model.path={model}", f"output.path={out}", "quant=gguf_q8_0", "unit_mb=0.05")
    assert ran.status == 0
    assert "the store copies them into it" in ran.out.replace("\n", " ")
