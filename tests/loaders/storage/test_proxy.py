"""The fault-injecting proxy of the tests: what passes is as the server gave it, and each fault is what it says."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from loaders.storage.address import Address
from tests.proxy import Cut, Fault, Flip, Header, Lag, Lengthen, Lose, Proxy, Refuse, Stall, Status, Trickle, Truncate

BODY = bytes(range(256)) * 1000


@pytest.fixture
def proxy(shelves: Address) -> Iterator[Proxy]:
    host = urlsplit(shelves.text).netloc
    with Proxy(f"http://{host}") as made:
        assert ask(made, "PUT", "/file", BODY)[0] == 200
        made.forget()
        yield made


def ask(
    proxy: Proxy, method: str, path: str, body: bytes | None = None, timeout: float = 30, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection(proxy.host, timeout=timeout)) as connection:
        connection.request(method, path, body, headers)
        found = connection.getresponse()
        return found.status, found.read(), found.headers


def test_what_passes_is_the_servers_own(proxy: Proxy) -> None:
    assert ask(proxy, "PUT", "/other", b"abc")[0] == 200
    status, body, headers = ask(proxy, "GET", "/other")
    assert (status, body) == (206, b"abc")
    assert headers["ETag"].startswith("v")
    assert ask(proxy, "GET", "/file", Range="bytes=10-19")[1] == BODY[10:20]
    assert ask(proxy, "DELETE", "/other")[0] == 204
    assert ask(proxy, "GET", "/other")[0] == 404


def test_requests_and_bytes_are_counted_by_path(proxy: Proxy) -> None:
    ask(proxy, "GET", "/file", Range="bytes=10-19")
    ask(proxy, "GET", "/file", Range="bytes=0-1")
    ask(proxy, "GET", "/none")
    ask(proxy, "PUT", "/more", b"12345")
    assert proxy.count("GET", "/file") == 2
    assert proxy.sent("GET", "/file") == 12
    assert proxy.received("PUT") == 5
    assert [(each.status, each.range) for each in proxy.seen][:2] == [(206, "bytes=10-19"), (206, "bytes=0-1")]


def test_chunked_bodies_pass_both_ways(proxy: Proxy) -> None:
    # The test's server knows no chunks, so a second proxy sends some, and this one answers.
    with Proxy(proxy.url) as second, closing(http.client.HTTPConnection(second.host, timeout=30)) as connection:
        proxy.add(Status(200, body=b"ok"), method="PUT")
        connection.request("PUT", "/chunks", iter((b"abc", b"defg")))
        assert connection.getresponse().read() == b"ok"
    assert proxy.received("PUT", "/chunks") == 7


@pytest.mark.parametrize("fault", [Refuse(), Lose(), Cut(after=1000), Cut(after=0)])
def test_a_connection_that_ends(fault: Fault, proxy: Proxy) -> None:
    rule = proxy.add(fault, times=1)
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(proxy, "GET", "/file")
    assert rule.hits == 1
    assert proxy.sent() == getattr(fault, "after", 0)
    assert ask(proxy, "GET", "/file")[1] == BODY


def test_a_lost_answer_was_work_done(proxy: Proxy) -> None:
    proxy.add(Lose(), method="PUT", times=1)
    with pytest.raises(ConnectionResetError):
        ask(proxy, "PUT", "/written", b"abc")
    assert ask(proxy, "GET", "/written")[1] == b"abc"


def test_bodies_of_another_length(proxy: Proxy) -> None:
    proxy.add(Truncate(after=100), times=1)
    proxy.add(Lengthen(by=3), times=1)
    proxy.add(Flip(at=7), times=1)
    assert ask(proxy, "GET", "/file")[:2] == (206, BODY[:100])
    assert len(ask(proxy, "GET", "/file")[1]) == len(BODY) + 3
    found = ask(proxy, "GET", "/file")[1]
    assert [at for at in range(len(BODY)) if found[at] != BODY[at]] == [7]


def test_answers_of_its_own(proxy: Proxy) -> None:
    proxy.add(Status(429, retry_after_s=2), path="/file", skip=1, times=2)
    proxy.add(Header("ETag", "other"), path="/file")
    statuses = [ask(proxy, "GET", "/file") for _ in range(4)]
    assert [status for status, _, _ in statuses] == [206, 429, 429, 206]
    assert statuses[1][2]["Retry-After"] == "2"
    assert statuses[3][2]["ETag"] == "other"
    proxy.clear()
    assert ask(proxy, "GET", "/file")[2]["ETag"] != "other"


def test_what_stalls_or_trickles(proxy: Proxy) -> None:
    proxy.add(Stall(after=10), times=1)
    with pytest.raises(TimeoutError):
        ask(proxy, "GET", "/file", timeout=0.05)
    proxy.add(Trickle(pause_s=0.001), times=1)
    assert ask(proxy, "GET", "/file", Range="bytes=0-19")[1] == BODY[:20]


def test_a_list_that_lags(proxy: Proxy) -> None:
    proxy.add(Lag(), path=r"\?prefix", times=2)
    before = ask(proxy, "GET", "/?prefix=lagging")[1]
    ask(proxy, "PUT", "/lagging", b"")
    assert ask(proxy, "GET", "/?prefix=lagging")[1] == before
    assert b"lagging" in ask(proxy, "GET", "/?prefix=lagging")[1]


def test_chance_is_the_same_for_the_same_seed(shelves: Address) -> None:
    def statuses(seed: int) -> list[int]:
        with Proxy(f"http://{urlsplit(shelves.text).netloc}", seed=seed) as proxy:
            proxy.add(Status(500), chance=0.5)
            return [ask(proxy, "GET", "/none")[0] for _ in range(12)]

    assert statuses(1) == statuses(1)
    assert set(statuses(1)) == {500, 404}
    assert statuses(1) != statuses(2)


def test_nothing_listens_while_it_is_down(proxy: Proxy) -> None:
    with closing(http.client.HTTPConnection(proxy.host, timeout=30)) as kept:
        kept.request("GET", "/file", headers={"Range": "bytes=0-1"})
        assert kept.getresponse().read() == BODY[:2]
        with proxy.down():
            with pytest.raises(ConnectionRefusedError):
                ask(proxy, "GET", "/file")
            kept.auto_open = 0
            kept.request("GET", "/file")
            with pytest.raises((OSError, http.client.HTTPException)):
                kept.getresponse()
    assert ask(proxy, "GET", "/file")[1] == BODY


def test_a_limited_rate_is_kept(shelves: Address) -> None:
    waits: list[float] = []
    with Proxy(f"http://{urlsplit(shelves.text).netloc}", rate_mb_s=10) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", waits.append)
        ask(proxy, "PUT", "/limited", BODY)
    # 256,000 bytes at 10 MB/s are 25.6 ms, of which 10 ms are the burst; without the sleep each wait adds up.
    assert max(waits) > 0.01
