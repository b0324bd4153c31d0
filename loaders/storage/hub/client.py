"""Requests to the Hugging Face Hub, and what it refuses as errors in one line.

huggingface_hub finds the token, and its session (proxies, certificates, HF_HUB_OFFLINE) carries all requests.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from loaders.errors import BadSpec, StorageError
from loaders.missing import needed_for
from loaders.storage.address import without_secrets
from loaders.storage.patience import Passing, patiently
from loaders.storage.settings import current
from loaders.storage.traffic import Traffic, traffic

log = logging.getLogger("weightmill")
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSING = (408, 429, 500, 502, 503, 504)
BUSY = (429, 503)
REACH_S = 2.0  # seconds to try for a connection where the cache would do
UNREACHED = "check the network and HF_ENDPOINT, or fetch the model elsewhere and give its folder"
LOG_IN = "log in (hf auth login), or set HF_TOKEN"
T = TypeVar("T")


class NotThere(BadSpec):
    """The Hub has no such repository, revision or file, or not for this account: `absence`, without the place."""

    def __init__(self, where: str, found: str) -> None:
        super().__init__(f"{where}: {found}")
        self.absence = found


class NoRevision(NotThere):
    """A repository is there, and has no such branch, tag or commit."""


class Closed(NotThere):
    """A repository is there, and this account may not read its files."""


class HubClient:
    """The Hub at one endpoint, for one account."""

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        self.endpoint = endpoint
        self.headers = dict(headers)
        self._is_out_of_reach = False

    @property
    def shown(self) -> str:
        """The endpoint without a password."""
        return without_secrets(self.endpoint)

    @property
    def traffic(self) -> Traffic:
        return traffic(urlsplit(self.endpoint).netloc)

    @property
    def is_logged_in(self) -> bool:
        return "authorization" in self.headers

    # --- what the Hub says

    def is_out_of_reach(self, where: str, path: str) -> bool:
        """Whether the Hub never answered this process, nor a request now; it is asked no more than once in vain."""
        if not self.traffic.was_reached and not self._is_out_of_reach:
            try:
                self.ask(where, "GET", path, patience_s=REACH_S)
            except (StorageError, BadSpec):
                self._is_out_of_reach = not self.traffic.was_reached
            if self._is_out_of_reach:
                log.warning("%s: the Hub at %s is out of reach; what its cache has is read", where, self.shown)
        return self._is_out_of_reach

    def ask(
        self, where: str, method: str, path: str, *, also: Collection[int] = (), patience_s: float | None = None,
        **sent: Any,
    ) -> Any:  # fmt: skip
        """Send a request until it does not fail in passing, and return the answer.

        `where` begins messages; answers of a status in `also` are returned, too. `patience_s`: None is the settings'.

        Raises:
            NotThere: there is no such repository, revision or file, or not for this account.
            StorageError: the Hub refuses the request, or cannot be reached for too long.
        """
        given = {**sent, "headers": {**self.headers, **sent.get("headers", {})}}

        def once() -> Any:
            with self.failures():
                answer = session().request(method, self.endpoint + path, timeout=current().timeout_s, **given)
            if answer.status_code not in also:
                self.check(where, answer)
            return answer

        return self.patient(where, once, patience_s)

    def patient(self, where: str, call: Callable[[], T], patience_s: float | None = None) -> T:
        """Call as `patiently` does, whose errors say what to do if the Hub never answered."""
        return patiently(where, call, self.traffic, patience_s=patience_s, if_unreached=UNREACHED)

    def value(self, where: str, answer: Any) -> Any:
        """Return the JSON of an answer.

        Raises:
            StorageError: it is something else.
        """
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise StorageError(f"{where}: the Hub at {self.shown} answers something else than JSON") from None

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn what the HTTP library raises into what may pass, and what cannot."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled:
            raise StorageError(
                "HF_HUB_OFFLINE is set, and this is not in the Hub's cache: fetch it while there is a network"
                " (hf download), or unset HF_HUB_OFFLINE"
            ) from None
        except http_error() as error:
            name = type(error).__name__
            if name.startswith("Connect"):
                raise Passing(f"no connection to the Hub at {self.shown} ({name})", is_unreached=True) from None
            raise Passing(f"{self.shown}: {name}", is_busy="Timeout" in name) from None

    def check(self, where: str, answer: Any) -> None:
        """Turn an answer that is no success into its error.

        Raises:
            Passing: it may pass.
            NotThere, StorageError: as `ask`.
        """
        status, code = answer.status_code, answer.headers.get("X-Error-Code")
        if status < 400:
            return
        said = self._said(answer)
        if status in PASSING:
            raise Passing(f"the Hub answers {status}{said}", pause_s=_pause_s(answer.headers), is_busy=status in BUSY)
        found = re.match(r"(?:reading )?hf://([^/@:\s]+/[^/@:\s]+)", where)
        repo = found[1] if found else ""
        if code == "GatedRepo":
            then = "this account was not given it yet" if self.is_logged_in else f"then {LOG_IN}"
            raise Closed(where, f"a gated repository: ask for access at {self.shown}/{repo}; {then}")
        if code == "RevisionNotFound":
            raise NoRevision(where, "no such branch, tag or commit in that repository: check the name after the @")
        if code == "EntryNotFound":
            raise NotThere(where, "no such file in that repository")
        if status == 401 and self.is_logged_in and code is None:
            raise BadSpec(f"{where}: the Hub refuses the token: it is wrong or has expired; {LOG_IN}")
        if code == "RepoNotFound" or status == 401:
            who = "that this account may not read" if self.is_logged_in else f"(then {LOG_IN})"
            raise NotThere(where, f"no such repository, or a private one {who}: check the name")
        if status == 403:
            raise StorageError(
                f"{where}: the Hub forbids it to this account{said}; use a token with the permission (write, for"
                f" uploads): {LOG_IN}"
            )
        raise StorageError(f"{where}: the Hub answers {status}{said}")

    def _said(self, answer: Any) -> str:
        """Return the server's own words about a failure, for a message."""
        words = re.sub(r"\s+", " ", answer.headers.get("X-Error-Message", ""))[:200]
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        return f" ({words})" if words.isprintable() and words and (not token or token not in words) else ""

    def info(self, repo: str, revision: str | None, where: str) -> Mapping[str, Any]:
        """Return what the Hub says of a repository; `sha` is the commit of the revision, by default of `main`."""
        found = self.value(where, self.ask(where, "GET", about(repo, revision)))
        if not isinstance(found, dict) or not COMMIT.fullmatch(str(found.get("sha"))):
            raise StorageError(f"{where}: the Hub at {self.shown} does not say which commit that is")
        return found


def about(repo: str, revision: str | None) -> str:
    """Return the path under which the Hub tells of a repository's revision, by default `main`."""
    return f"/api/models/{repo}/revision/{quote(revision or 'main', safe='')}"


def _pause_s(headers: Mapping[str, str]) -> float | None:
    """Return the pause that a server asks for: Retry-After in seconds, or the Hub's own `t=` of its rate limit."""
    if (after := headers.get("Retry-After", "")).isdigit():
        return float(after)
    found = re.search(r"\br=0;t=(\d{1,6})\b", headers.get("RateLimit", ""))
    return float(found[1]) if found else None


# --- huggingface_hub


def hub() -> HubClient:
    """Return the Hub of this process' environment (HF_ENDPOINT), for the account whose token huggingface_hub finds.

    Raises:
        BadSpec: huggingface_hub is not installed, or HF_ENDPOINT is no URL.
    """
    _check_endpoint(os.environ.get("HF_ENDPOINT", ""))  # first: huggingface_hub fails on some when it is imported
    with needed_for("hf://"):
        from huggingface_hub import constants, utils
    library: Any = utils
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    headers = library.build_hf_headers(library_name="weightmill")
    return _client(endpoint, tuple(sorted((name.lower(), value) for name, value in headers.items())))


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number
        is_url = False
    if endpoint and not is_url:
        raise BadSpec("HF_ENDPOINT: expected a URL such as https://huggingface.co, or http://HOST:PORT")


@lru_cache(maxsize=8)
def _client(endpoint: str, headers: tuple[tuple[str, str], ...]) -> HubClient:
    return HubClient(endpoint, dict(headers))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    hub()
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def session() -> Any:
    """Return huggingface_hub's HTTP client, which all threads share."""
    from huggingface_hub import utils

    library: Any = utils
    return library.get_session()


def http_error() -> type[Exception]:
    """Return the base of what that client raises: which HTTP library it is of has changed between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
