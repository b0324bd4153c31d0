"""How stores that are not folders of this machine are reached: endpoint, region, patience, local space.

Settings are of a process: a job sets them from its request, and each task carries them to the process that runs it.
They never hold a secret: keys and tokens are where each store's own library looks for them (environment, profiles,
instance metadata).
"""

from __future__ import annotations

from dataclasses import dataclass

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Settings of stores; `conf/store` has the defaults of jobs."""

    endpoint: str | None = None  # the URL of an S3, GCS or Azure service of one's own; null: the environment's
    region: str | None = None
    profile: str | None = None  # of AWS' config files
    anonymous: bool = False  # requests are not signed
    at_once: int = 32  # requests in flight, at most
    patience_s: float = 300.0  # seconds over which a request that fails in passing is tried again
    timeout_s: float = 30.0  # seconds without a byte after which a request counts as failed
    read_limit: float | None = None  # bytes a second that this process reads of weights, at most
    scratch: str | None = None  # the folder of files on their way to a store; null: the temporary folder
    scratch_mb: float = 256.0  # megabytes (1e6 bytes) of another file there; larger ones are streamed
    cache: str | None = None  # a folder where fetched ranges are kept, for all jobs that name it; null: none
    cache_gb: float = 100.0  # gigabytes (1e9 bytes) in it, at most
    # Outputs on the Hub:
    journal: str | None = None  # the address of a folder, or of another store's prefix; null: one of the user's cache
    private: bool = False  # whether a repository that is made is private, and one that is there must be
    commit_message: str | None = None  # the first line of the commit


_current = [StoreSettings()]  # of this process: the last one


def current() -> StoreSettings:
    """Return the settings of this process."""
    return _current[-1]


def use(settings: StoreSettings) -> None:
    """Make settings those of this process, for stores that are opened from now on."""
    _current[-1] = settings
