"""The settings of stores: how what is in no folder of this machine is reached."""

from __future__ import annotations

from pydantic import Field, field_validator

from jobs.spec.base import LocalPath, Spec
from loaders.storage.settings import StoreSettings


class StoreSpec(Spec):
    """conf/store: how stores are reached. There are no secrets here."""

    endpoint: str | None = Field(default=None, description="the URL of an S3, GCS or Azure service of your own")
    region: str | None = Field(default=None, description="the region of a bucket; null: as the environment says")
    profile: str | None = Field(default=None, description="a profile of AWS' config files")
    anonymous: bool = Field(default=False, description="do not sign requests: public buckets")
    at_once: int = Field(default=32, ge=1, le=1024, description="requests in flight, at most")
    patience_s: float = Field(default=300, ge=0, description="seconds to try again what fails in passing")
    timeout_s: float = Field(default=30, gt=0, description="seconds without a byte until a request counts as failed")
    scratch: LocalPath | None = Field(
        default=None, description="the folder of files on their way to a store; null: the temporary folder"
    )
    scratch_mb: float = Field(
        default=256,
        ge=16,
        description="megabytes (1e6 bytes) of another file (a tokenizer) there; larger ones are streamed",
    )
    cache: LocalPath | None = Field(
        default=None, description="a folder that keeps what was fetched, for all jobs that name it"
    )
    cache_gb: float = Field(default=100, gt=0, description="gigabytes (1e9 bytes) in the cache, at most")

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_url_without_secrets(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError("expected a URL such as https://HOST:PORT")
        if endpoint is not None and "@" in endpoint:
            raise ValueError("user and password do not belong here, where they would be kept; the environment has them")
        return endpoint

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(**self.model_dump())
