"""What object stores and HTTP servers answer, as a few exceptions: obstore tells most of them apart by text alone.

No text of obstore is ever shown, since the URLs in it may be signed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from loaders.errors import StorageError
from loaders.storage.patience import Passing

STATUS = re.compile(r"non-2xx status code: (\d{3})")
CODE = re.compile(r"<Code>(\w{1,60})</Code>")
BUSY = ("SlowDown", "ServerBusy", "TooManyRequests", "RequestLimitExceeded")
# Codes with which a store refuses a request that would be right a moment later, or by another connection.
BRIEF = ("RequestTimeout", "InternalError", "OperationTimedOut", "ServiceUnavailable", "IncompleteBody", *BUSY)
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
# Of credentials that end: they can be fetched again, while those that are wrong stay so.
ENDED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired")


class Missing(Exception):
    """The object does not exist."""


class Unmet(Exception):
    """A condition of the request does not hold: the object exists, or is another version."""


class NoRanges(Exception):
    """The server sends whole files only."""


class Elsewhere(Exception):
    """The bucket is in another region than the one that was asked."""


class NotOffered(StorageError):
    """The store does not know the request (501)."""


class Denied(Exception):
    """The store refuses the credentials (401), or what they ask for (403). `code` is its own word for it, if any."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(f"{status} {code}".strip())
        self.status = status
        self.code = code

    @property
    def may_be_renewed(self) -> bool:
        return self.status == 401 or self.code in ENDED


@contextmanager
def answers(what: str, timeout_s: float) -> Iterator[None]:
    """Turn obstore's exceptions inside the block into those above; `what` begins messages and names the object.

    Raises:
        Missing, Unmet, NoRanges, Elsewhere, Denied: as their docstrings say.
        Passing: the failure may pass.
        StorageError: anything else that a store answers.
    """
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        NotSupportedError,
        PreconditionError,
    )  # fmt: skip

    try:
        yield
    except FileNotFoundError as error:
        code = CODE.search(str(error))
        raise_for(what, 404, code[1] if code else "", "", timeout_s)
    except (AlreadyExistsError, PreconditionError) as error:
        raise Unmet(what) from error
    except NotSupportedError as error:
        raise NoRanges(what) from error
    except BaseError as error:
        _raise(what, str(error), timeout_s)


def _raise(what: str, text: str, timeout_s: float) -> NoReturn:
    status, code = STATUS.search(text), CODE.search(text)
    raise_for(what, int(status[1]) if status else None, code[1] if code else "", text, timeout_s)


def raise_for(
    what: str, status: int | None, code: str, text: str, timeout_s: float, retry_after: str | None = None
) -> NoReturn:
    """Raise what a status and a store's own code mean; without a status, what the text of the failure says.

    `retry_after` is the header of that name. obstore shows no headers, so that its pauses are our own.
    """
    if code == "AuthorizationHeaderMalformed" or "BareRedirect" in text or status == 301:
        raise Elsewhere(what)
    if status in (401, 403) or code in ENDED:
        raise Denied(status or 403, code)
    if code in NO_BUCKET:
        raise StorageError(f"{what}: there is no such bucket; check its name, and the endpoint")
    if status == 404:
        raise Missing(what)
    if status == 412:
        raise Unmet(what)
    if status in (408, 425, 429, 500, 502, 503, 504) or code in BRIEF:
        is_busy = status in (429, 503) or code in BUSY
        pause_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
        raise Passing(f"the store answered {_words(status, code)}", is_busy=is_busy, pause_s=pause_s)
    if status == 501 or code == "NotImplemented":
        raise NotOffered(f"{what}: the store does not offer this")
    if status == 416:
        raise StorageError(f"{what}: the store says that the file is shorter than it said before; run it again")
    if status is not None:
        raise StorageError(f"{what}: the store answered {_words(status, code)}, which was not expected")
    if re.search(r"token request|[Cc]redential|metadata/v1|identity", text.partition("Debug source")[0][:300]):
        raise Denied(401, "no credentials")
    _raise_unanswered(what, text, timeout_s)


def _words(status: int | None, code: str) -> str:
    return " ".join(str(each) for each in (status, code) if each)


def _raise_unanswered(what: str, text: str, timeout_s: float) -> NoReturn:
    if "UnexpectedRange" in text or "Requested" in text[:60]:
        raise StorageError(f"{what}: the store sent another range than it was asked for; do not trust it")
    if "Content-Length" in text or "Content-Range" in text:
        raise StorageError(f"{what}: the store does not say how long the file is, which is needed to read parts of it")
    if "invalid path" in text or "InvalidPath" in text:
        raise StorageError(f"{what}: names with empty parts (a//b) are not read; copy the files under other names")
    if "certificate" in text or "UnknownIssuer" in text:
        raise StorageError(f"{what}: the server's certificate is not trusted; add it to the system's certificates")
    if "kind: Connect" in text:
        raise Passing(_unconnected(text), is_unreached=True)
    if "kind: Timeout" in text or "TimedOut" in text or "timed out" in text:
        raise Passing(f"no byte came within {timeout_s:g} s", is_busy=True)
    if "HttpError" in text or "reqwest" in text or "hyper" in text:
        raise Passing("the connection was cut")
    raise StorageError(f"{what}: {_first_line(text)}")


def _unconnected(text: str) -> str:
    if "dns error" in text:
        return "the host's name is not resolved; is there a network?"
    return "the host refuses connections" if "ConnectionRefused" in text else "no connection to the host"


def _first_line(text: str) -> str:
    """Return what a library says, without any URL."""
    return re.sub(r"\b\w+://\S+", "URL", text.strip().partition("\n")[0])[:300] or "it failed"
