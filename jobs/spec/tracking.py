"""The settings of tracking: where metrics are kept."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, field_validator

from jobs.spec.base import Spec
from loaders.storage.address import without_secrets

STORE = re.compile(r"https?://.|(?:sqlite|postgresql|mysql|mssql)(?:\+\w+)?://.|databricks|file:.|/")


class TrackingSpec(Spec):
    """conf/tracking: the store of the metrics."""

    kind: Literal["mlflow", "none"]
    # Where a request is written down, it stands there without its password.
    uri: Annotated[str, PlainSerializer(without_secrets)] | None = Field(
        default=None, description="a tracking server or database; sqlite in output.root by default"
    )
    experiment: str = Field(default="weightmill", description="the MLflow experiment")
    price_per_hour: float | None = Field(default=None, ge=0, description="price of a machine, to estimate the cost")

    @field_validator("uri")
    @classmethod
    def _uri_is_a_store(cls, uri: str | None) -> str | None:
        if uri is not None and not STORE.match(uri):
            raise ValueError("expected a store such as http://HOST:PORT or sqlite:////ABSOLUTE/PATH/mlflow.db")
        return uri
