"""Addresses: a local path or a URL as one type, so that no caller uses a URL as a path by mistake."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from loaders.errors import BadSpec

LOCAL = "file"
IN_MLFLOW = ("models", "runs")  # schemes of what MLflow knows the address of
# MLflow writes its two schemes with one slash.
SCHEME = re.compile(r"([a-z][a-z0-9+.\-]+)://|(models|runs):/")
# A URL but for a slash that was forgotten, or that pathlib took away, or a scheme in capitals: s3:/BUCKET, S3://BUCKET.
SLIP = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):/+(.*)", re.DOTALL)
HIDDEN = "***"  # what stands for a secret where an address is shown
URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.\-]*://)([^\s/?#]*@)?([^\s?#;]*)(;[^\s?#]+)?(\?[^\s#]*)?(#[^\s]*=[^\s]*)?")
# A user and password where a host is expected, wherever that is in a text, and however its slashes were written; what
# follows the colon is no port.
LOGIN = re.compile(r"([/\\]{2,}|\b[A-Za-z][A-Za-z0-9+.\-]+:[/\\]+)[^\s/\\:@]*:(?!\d+[/\\])[^\s@]*@")


def without_secrets(text: str) -> str:
    """Return a text, such as a library's message, without users, passwords, parameters and queries of URLs in it."""

    def shown(found: re.Match[str]) -> str:
        scheme, user, where, *hidden = found.groups()
        kept = "".join(f"{part[0]}{HIDDEN}" for part in hidden if part)
        return f"{scheme}{HIDDEN + '@' if user else ''}{where}{kept}"

    return LOGIN.sub(rf"\g<1>{HIDDEN}@", URL.sub(shown, text))


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A path on this machine or the URL of a store, without a trailing slash.

    A URL may have secrets in it: a password, a signature. Only `text` has them, which is for opening the store; every
    other way to show an address (str, repr, f-strings, messages) leaves them out.
    """

    text: str = field(repr=False)

    @staticmethod
    def of(where: str | os.PathLike[str] | Address) -> Address:
        """Make an address from what a user gives: a path, file://PATH, or SCHEME://...

        Raises:
            BadSpec: it is empty, or a URL with a slip that would make it a path.
        """
        if isinstance(where, Address):
            return where
        text = os.fspath(where)
        if not text:
            raise BadSpec("expected a path, found an empty one")
        _check_login(text)
        if text.startswith(f"{LOCAL}://"):
            text = text.removeprefix(f"{LOCAL}://")
        elif SCHEME.match(text) is None and (slip := SLIP.match(text)) is not None:
            meant = Address(f"{slip[1].lower()}://{'/' if slip[1].lower() == LOCAL else ''}{slip[2]}")
            raise BadSpec(
                f"expected a path or a URL, as {meant}; found {slip[1]}:/ (a folder of that name is ./{slip[1]}:)"
            )
        return Address(text.rstrip("/") or "/")

    @property
    def scheme(self) -> str:
        """The URL's scheme; "file" for a path."""
        found = SCHEME.match(self.text)
        return (found[1] or found[2]) if found else LOCAL

    @property
    def is_local(self) -> bool:
        return self.scheme == LOCAL

    @property
    def path(self) -> Path:
        """The address as a path on this machine.

        Raises:
            BadSpec: the address is a URL.
        """
        if not self.is_local:
            raise BadSpec(f"{self}: expected a path of this machine")
        return Path(self.text)

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.name if self.is_local else PurePosixPath(urlsplit(self.text).path).name

    @property
    def title(self) -> str:
        """What is there is called so: `name` without a revision of the Hub, and without the suffix of a weight file."""
        name = self.name.partition("@")[0] if self.scheme == "hf" else self.name
        return re.sub(r"\.(?:gguf|safetensors|bin|pth?)$", "", name)

    @property
    def parent(self) -> Address:
        """The folder or prefix above this address; the address itself at the root."""
        if self.is_local:
            return Address(str(self.path.parent))
        parts = urlsplit(self.text)
        if self.scheme == "hf" and parts.path.count("/") <= 1:  # a repository, above which is no folder but its owner
            return self
        above = str(PurePosixPath(parts.path or "/").parent).rstrip("/")
        return Address(urlunsplit(parts._replace(path=above)))

    @property
    def parents(self) -> tuple[Address, ...]:
        """All folders or prefixes above this address, the nearest first."""
        found: list[Address] = []
        here = self
        while (above := here.parent) != here:
            found.append(above)
            here = above
        return tuple(found)

    @property
    def real(self) -> Address:
        """The address with symbolic links resolved; a URL has none and stays as it is."""
        # Not Path.resolve, which raises for a link to itself.
        return Address(os.path.realpath(self.path)) if self.is_local else self

    def __truediv__(self, name: str) -> Address:
        if self.is_local:
            return Address(str(self.path / name))
        parts = urlsplit(self.text)
        return Address(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")))

    @property
    def shown(self) -> str:
        """The address without user, password, query and fragment, which may be secrets."""
        if self.is_local:
            return self.text
        parts = urlsplit(self.text)
        user, _, host = parts.netloc.rpartition("@")
        netloc, (path, parameters, _) = f"{HIDDEN}@{host}" if user else host, parts.path.partition(";")
        path = f"{path};{HIDDEN}" if parameters else path
        return urlunsplit(parts._replace(netloc=netloc, path=path, query=HIDDEN if parts.query else "", fragment=""))

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"

    def __fspath__(self) -> str:
        return str(self.path)


def _check_login(text: str) -> None:
    """Check that what looks like a user and password stands where a URL has them, and nowhere is taken for a path."""
    found = SCHEME.match(text)
    is_url = found is not None and found[1] != LOCAL
    rest = text.split("://", 1)[-1] if is_url else text
    if found is not None and not is_url and "@" in urlsplit(text).netloc:
        raise BadSpec(f"{found[0]} has no user and password; give file:///PATH")
    if LOGIN.search(rest) is not None and (is_url or SLIP.match(text) is None):
        raise BadSpec(
            f"expected a path or a URL, as https://{HIDDEN}@HOST/PATH; found a user and password within it, which are"
            " not shown: look for a blank before it, for slashes, or for a second URL"
        )
