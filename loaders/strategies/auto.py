"""`auto`: which strategy fits the files, by where they lie and what of them is in memory already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loaders.storage import local

MOSTLY = 0.5
SAMPLE = 8  # files looked at


def choose(root: Path, files: Sequence[str]) -> tuple[str, str]:
    """The name of a strategy, and the reason in a few words."""
    kind = local.filesystem(root)
    if local.is_network(kind):
        return "read", f"the files lie on a network filesystem ({kind}), where a map fetches page by page"
    looked_at = files[:: max(1, len(files) // SAMPLE)]
    shares = [local.cached_share(root / file) for file in looked_at]
    known = [share for share in shares if share is not None]
    if not known:
        return "lazy", "the files are local"
    share = sum(known) / len(known)
    if share >= MOSTLY:
        return "lazy", f"{share:.0%} of the files are in the page cache, which a map uses in place"
    return "read", f"{share:.0%} of the files are in the page cache; large reads are steadier on a cold disk"
