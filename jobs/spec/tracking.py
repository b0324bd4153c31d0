"""The settings of tracking: where metrics are kept."""

from __future__ import annotations

import os
import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, ValidationInfo, field_validator

from jobs.spec.base import Spec
from loaders.missing import absent
from loaders.storage.address import without_secrets

# MLflow's own variables, which its other clients take as well.
URI, NAME = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
EXPERIMENT = "weightmill"
STORE = re.compile(r"https?://.|(?:sqlite|postgresql|mysql|mssql)(?:\+\w+)?://.|databricks|file:.|/")


def lacking(uri: str | None) -> tuple[str, ...]:
    """Return the libraries that MLflow needs for the store at an address and that are not installed here."""
    is_server = uri is not None and uri.startswith("http")
    return absent("mlflow", *(() if is_server else ("sqlalchemy", "alembic")))


with warnings.catch_warnings():
    # pydantic takes what ABCMeta gives classes, `register`, for an attribute that the field would hide.
    warnings.filterwarnings("ignore", message='Field name "register"')

    class TrackingSpec(Spec):
        """conf/tracking: the store of the metrics."""

        kind: Literal["auto", "mlflow", "none"]
        # Where a request is written down, it stands there without its password.
        uri: Annotated[str, PlainSerializer(without_secrets)] | None = Field(
            default=None,
            validate_default=True,
            description="a tracking server or database; by default MLFLOW_TRACKING_URI, else sqlite in output.root",
        )
        experiment: str = Field(
            default="",
            validate_default=True,
            description=f"the MLflow experiment; by default MLFLOW_EXPERIMENT_NAME, else {EXPERIMENT}",
        )
        register: str | None = Field(
            default=None,
            description="the model in MLflow's registry of which the output becomes a version; null: of none",
        )
        price_per_hour: float | None = Field(default=None, ge=0, description="price of a machine, to estimate the cost")

        @property
        def lacks(self) -> tuple[str, ...]:
            """The libraries that MLflow needs for this store and that are not installed here."""
            return lacking(self.uri)

        @property
        def is_on(self) -> bool:
            """Whether runs are tracked; with `auto`, where MLflow is installed."""
            return self.kind == "mlflow" or (self.kind == "auto" and not self.lacks)

        @field_validator("uri")
        @classmethod
        def _uri_is_a_store(cls, uri: str | None) -> str | None:
            named = "" if uri is not None else os.environ.get(URI, "")
            found = uri if uri is not None else named or None
            if found is not None and not STORE.match(found):
                said = f"the environment's {URI} is {without_secrets(named)!r}; " if named else ""
                raise ValueError(
                    f"{said}expected a store such as http://HOST:PORT or sqlite:////ABSOLUTE/PATH/mlflow.db"
                )
            return found

        @field_validator("experiment", mode="before")
        @classmethod
        def _experiment_has_a_name(cls, experiment: Any) -> Any:
            return (os.environ.get(NAME) or EXPERIMENT) if experiment in (None, "") else experiment

        @field_validator("register")
        @classmethod
        def _a_registry_is_mlflows(cls, name: str | None, about: ValidationInfo) -> str | None:
            if name is not None and about.data.get("kind") == "none":
                raise ValueError("it is a model in MLflow's registry, and there is none with tracking=none")
            if name is not None and (not name.strip() or set(name) & {"/", ":"}):
                raise ValueError("expected the name of a model, without / and :")
            return name
