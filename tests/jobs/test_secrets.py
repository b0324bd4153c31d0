"""No key, token, password or signature of a run is written, printed, tracked or shown in the list of processes."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from loaders.storage.address import Address
from loaders.storage.base import Entry
from loaders.storage.objects.client import client_of
from loaders.storage.objects.store import read_object
from tests import object_servers
from tests.hub.server import Hub
from tests.jobs.execution.ray.test_cluster import MARK
from tests.making import make_source
from tests.object_servers import Files
from tests.processes import start
from tests.proxy import Cut, Proxy, Status
from tests.tracking_server import tracking_server

pytestmark = pytest.mark.usefixtures("short_pauses")
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "AKIDHUSH4AWSKEY",
    "AWS_SECRET_ACCESS_KEY": "hush+aws/secret",
    "AWS_SESSION_TOKEN": "hush-aws-session",
    "HF_TOKEN": "hf_hushhubtoken",
    "AZURE_STORAGE_ACCOUNT_NAME": "someone",
    "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"hush azure key").decode(),
}
READER, SIGNATURE, TRACKER = "reader:hushhttp", "hushsignature", "bob:hushtracking"
SECRETS = (
    *(value for name, value in VARIABLES.items() if name != "AZURE_STORAGE_ACCOUNT_NAME"),
    READER.partition(":")[2], SIGNATURE, TRACKER.partition(":")[2],
)  # fmt: skip
FORMS = {  # of each secret: as it is, as it stands in URLs, and in headers
    *(secret.encode() for secret in SECRETS),
    *(quote(secret, safe="").encode() for secret in SECRETS),
    *(base64.b64encode(pair.encode()) for pair in (READER, TRACKER)),
}


def leaks(where: str, data: bytes | str) -> list[str]:
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return [f"{where}: {form.decode()}" for form in FORMS if form in data]


def leaks_in(folder: Path) -> list[str]:
    """Secrets in all files of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [leak for path in paths for leak in leaks(str(path), f"{path}".encode() + path.read_bytes())]


def leaks_at(address: Address) -> list[str]:
    """Secrets in all objects below an address, journals included."""
    client, prefix = client_of(address)
    return [
        leak
        for row in client.list(prefix)
        for leak in leaks(row.key, bytes(read_object(client, row.key, Entry(row.key, row.size, row.tag), 0, row.size)))
    ]


def url(host: str | Address, path: str, who: str = READER) -> str:
    """A URL with a password and a signature."""
    return f"http://{who}@{str(host).removeprefix('http://')}/{path}?X-Amz-Signature={SIGNATURE}&X-Amz-Expires=9"


@pytest.fixture
def bucket(s3_bucket: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Address:
    """A place in a bucket; all secrets are in the environment."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return s3_bucket / tmp_path.name


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Address, type[Files]]]:
    """A web server with a model."""
    (tmp_path / "www").mkdir()
    make_source(tmp_path / "www" / "model")
    with object_servers.http(tmp_path / "www") as made:
        yield made


class Watch:
    """Looks at the arguments of a run's processes, but for those that the user gave to the first.

    A fork has them, too, until it becomes another program.
    """

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self.found: set[bytes] = set()
        self.driver = 0

    def look(self) -> None:
        for folder in Path("/proc").iterdir():
            try:
                given = Path(f"/proc/{self.driver}/cmdline").read_bytes()
                is_ours = folder.name.isdigit() and self._mark in (folder / "environ").read_bytes()
                arguments = (folder / "cmdline").read_bytes()
                if is_ours and arguments != given:
                    self.found.add(arguments + (folder / "comm").read_bytes())
            # It has ended meanwhile, or another user's.
            except OSError:
                continue


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "ray"])
def test_a_run_keeps_its_secrets(
    cluster: str, served: tuple[Address, type[Files]], bucket: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, about = served
    # The path of the temporary folder must be short, for Ray's sockets.
    ray = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(ray))
    watch, ended = Watch(mark := os.urandom(8).hex()), threading.Event()
    with tracking_server(tmp_path / "tracking") as tracking:
        given = (
            f"model.path={url(server, 'model')}", f"output.path={bucket / 'out'}", "quant=nf4", "unit_mb=0.05",
            f"tracking.uri=http://{TRACKER}@{tracking}", f"cluster={cluster}", f"store.cache={tmp_path / 'cache'}",
        )  # fmt: skip
        process = start("-m", "jobs.run", *given, environment={MARK: mark, "XDG_CACHE_HOME": str(tmp_path / "xdg")})
        watch.driver = process.pid

        def look() -> None:
            while not ended.wait(0.05):
                watch.look()

        looking = threading.Thread(target=look)
        looking.start()
        out, err = process.communicate()
        ended.set()
        looking.join()
    assert process.returncode == 0, err
    try:
        assert "runs/" in out + err  # it was tracked
        assert any(SIGNATURE in path and authorization for _, path, _, authorization in about.asked)
        assert leaks("output", out) + leaks("errors", err) == []
        assert leaks_in(tmp_path) == []
        assert leaks_at(bucket) == []
        assert leaks("processes", b"\n".join(watch.found)) == []
        assert cluster == "local" or any(b"ray::" in each for each in watch.found)
        assert cluster == "local" or list(ray.glob("ray-*/*/session_*/logs/*"))
        assert leaks_in(ray) == []
    finally:
        shutil.rmtree(ray)


# A store's answers may quote what was sent.
QUOTED = "".join(f"<AWSAccessKeyId>{s}</AWSAccessKeyId><StringToSign>AWS4\n{s}</StringToSign>" for s in SECRETS)


def answer(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>no: {SECRETS}</Message>{QUOTED}</Error>".encode()


S3_FAULTS = {
    "a wrong key": Status(403, body=answer("SignatureDoesNotMatch")),
    "no such key": Status(403, body=answer("InvalidAccessKeyId")),
    "an expired token": Status(400, body=answer("ExpiredToken")),
    "not allowed": Status(403, body=answer("AccessDenied")),
    "not there": Status(404, body=answer("NoSuchBucket")),
    "busy": Status(503, body=answer("SlowDown")),
    "what nobody expected": Status(418, body=answer("Teapot")),
    "cut": Cut(after=20),
}
SHORT = "store.patience_s=0.2"


@pytest.fixture
def check(weightmill: Callable[..., Any], tmp_path: Path, bucket: Address) -> Callable[..., None]:
    """A function that runs a verb, which must end with a status (None: any), and without secrets."""

    def run(verb: str, *given: str, status: int | None = 1) -> None:
        for form in ("text", "json"):
            ran = weightmill(verb, *given, f"format={form}")
            assert status is None or ran.status == status, ran.err
            assert "Traceback" not in ran.err
            assert leaks("output", ran.out) + leaks("errors", ran.err) == []
        assert leaks_in(tmp_path) == []

    return run


@pytest.mark.parametrize("fault", S3_FAULTS)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_what_s3_refuses(
    fault: str, method: str, check: Callable[..., None], bucket: Address, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = make_source(tmp_path / "model")
    monkeypatch.setattr("loaders.storage.objects.client.RENEW_S", 0.0)
    with Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.add(S3_FAULTS[fault], method=method)
        proxy.add(Status(403, body=answer("AccessDenied")), method="HEAD")
        source = f"{bucket}/model" if method == "GET" else model
        check("run", f"model.path={source}", f"output.path={bucket}/out", "quant=nf4", SHORT)
        proxy.clear()
        assert leaks_at(bucket) == []


def test_what_a_web_server_refuses(
    check: Callable[..., None], served: tuple[Address, type[Files]], tmp_path: Path
) -> None:
    server, about = served
    out = f"output.path={tmp_path / 'out'}"
    for spoil in ("cut", "short", "long", "tag", "range", "page"):
        about.spoil = spoil
        again = f"output.path={tmp_path / spoil}", "output.overwrite=true"
        check("run", f"model.path={url(server, 'model')}", *again, "quant=nf4", SHORT, status=None)
    about.spoil = None
    for code in (400, 401, 403, 404, 418, 429, 500):
        about.fails[:] = [(code, f"No: {SECRETS}")] * 1000
        check("run", f"model.path={url(server, 'model')}", out, "quant=nf4", SHORT, status=None)
    about.fails[:] = []
    about.has_ranges = False
    check("plan", f"model.path={url(server, 'model')}", "quant=nf4", status=None)
    about.has_ranges = True
    nothing = url(server, "nothing")
    check("run", f"model.path={nothing}", out, "quant=nf4", SHORT, status=2)
    check("run", f"model.path={url(server, 'model')}", f"output.path={url(server, 'out')}", "quant=nf4", status=2)
    for verb in ("inspect", "lint", "recommend"):
        check(verb, f"model.path={nothing}", status=None)
    check("verify", f"output.path={nothing}", status=None)
    check("diff", nothing, nothing, status=None)


def test_a_sweep_over_addresses(
    check: Callable[..., None], served: tuple[Address, type[Files]], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "www" / "model", tmp_path / "www" / "other")
    both = ",".join(f"'{url(served[0], name)}'" for name in ("model", "other"))
    stores = ",".join(f"'http://{TRACKER}@127.0.0.1:{port}'" for port in (8, 9))
    given = "run", "-m", "quant=nf4", f"output.root={tmp_path / 'root'}"
    check(*given, f"model.path={both}", "tracking=none", status=0)
    check(*given, f"model.path='{url(served[0], 'model')}'", f"tracking.uri={stores}", status=1)
    check(*given, f"model.path={both}", "quant.group_size=7", status=2)


def test_what_nobody_answers(check: Callable[..., None], tmp_path: Path, bucket: Address) -> None:
    model, out = make_source(tmp_path / "model"), f"output.path={tmp_path / 'out'}"
    tracked = f"tracking.uri=http://{TRACKER}@127.0.0.1:9"
    check("run", f"model.path={url('127.0.0.1:9', 'model')}", out, SHORT)
    check("run", f"model.path={url('no-such-host.invalid', 'model')}", out, SHORT)
    check("run", f"model.path={model}", out, "tracking=mlflow", tracked)
    check("run", "-m", f"model.path={model}", f"output.root={tmp_path / 'root'}", "quant=nf4,fp4", tracked)
    check("compare", f"output.root={tmp_path}", tracked, "sweep=last", status=None)
    check("run", "model.path=models:/m/1", tracked, status=None)


def test_what_is_no_address(check: Callable[..., None], tmp_path: Path, bucket: Address) -> None:
    model, out = make_source(tmp_path / "model"), f"output.path={tmp_path / 'out'}"
    for uri in (f"ftp://{TRACKER}@host", f"http://{TRACKER}@host:port/", f"postgresql://{TRACKER}@127.0.0.1:9/db"):
        check("run", f"model.path={model}", out, f"tracking.uri={uri}", status=None)
    check("run", f"model.path={model}", out, f"tracking.uri=[http://{TRACKER}@host", status=2)
    check("run", f"model.path=ftp://{READER}@host/model?sig={SIGNATURE}", out, status=2)
    check("run", f"model.path={url('host:port', 'model')}", out, SHORT, status=None)
    check("run", f"http://{TRACKER}@host", SHORT, status=None)
    check("run", f"modle.path={url('host', 'model')}", status=2)
    check("run", f"model.path={model}", f"output.path=s3://{READER}@bucket/out?{SIGNATURE}", SHORT, status=None)
    check("run", f"model.path={model}", out, f"store.endpoint=http://{READER}@host", status=2)


def test_a_token_that_the_hub_refuses(
    check: Callable[..., None], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", VARIABLES["HF_TOKEN"])
    out = f"output.path={tmp_path / 'out'}"
    with Proxy(hub.url) as proxy:
        monkeypatch.setenv("HF_ENDPOINT", f"http://{READER}@{proxy.host}")
        for code in (400, 401, 403, 404, 418, 500, 503):
            rule = proxy.add(Status(code, body=f"{SECRETS}".encode()))
            check("run", "model.path=hf://org/model", out, SHORT, status=None)
            assert rule.hits > 0
            proxy.clear()
        model = make_source(tmp_path / "model")
        proxy.add(Status(403, body=f"{SECRETS}".encode()), method="POST")
        check("run", f"model.path={model}", "output.path=hf://org/new", SHORT, status=None)
    check("run", "model.path=hf://org/model", out, SHORT)


def test_a_key_that_azure_does_not_get(check: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("azure.storage.blob", reason="azure-storage-blob is not installed")
    model = make_source(tmp_path / "model")
    check(
        "run",
        "model.path=az://models/model",
        f"output.path={tmp_path / 'out'}",
        "store.endpoint=http://127.0.0.1:9",
        SHORT,
    )
    check("run", f"model.path={model}", "output.path=az://models/out", "store.endpoint=http://127.0.0.1:9", SHORT)
