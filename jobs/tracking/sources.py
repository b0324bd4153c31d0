"""Checkpoints in MLflow: models:/NAME/VERSION and runs:/RUN/PATH are replaced by the addresses of the stores behind.

It happens once, before anything is opened: what is recorded, planned and given to workers is the store's own address.

    models:/NAME/3, models:/NAME/latest, models:/NAME@ALIAS or models:/NAME/ALIAS    a registered model
    models:/m-ID                                                                     a logged model (MLflow 3)
    runs:/RUN/PATH                                                                   artifacts of a run, or its model

MLflow's own flavor of transformers keeps the weights in a folder of its own, or only says whose they are on the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import url2pathname

import yaml
from pydantic import BaseModel

from jobs.cli.validation import fields_of, is_read
from jobs.spec.base import OUTPUTS
from loaders.errors import BadSpec, StorageError
from loaders.storage import kind_of, open_store
from loaders.storage.address import IN_MLFLOW, Address, without_secrets
from loaders.storage.base import PinnedFiles

S = TypeVar("S", bound=BaseModel)
Known = dict[tuple[str, str], Address]  # what was looked up: the MLflow's URI and an address in it -> the checkpoint
ID = re.compile(r"m-[0-9a-f]{32}")  # a logged model's
PROXY = "/api/2.0/mlflow-artifacts/artifacts"  # where a tracking server gives out the artifacts that it keeps
DESCRIPTION, DESCRIPTION_LIMIT = "MLmodel", 1 << 20  # the file beside a model of MLflow's, and its most bytes
# Where checkpoints lie in models of MLflow that have no description, or another than that of transformers.
FOLDERS = ("", "model", "data/model", "components/model")
FORMS = "models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS or runs:/RUN/PATH"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # codes of MLflow's errors about what is not there
OTHER = "tracking.uri=, or MLFLOW_TRACKING_URI in the environment, names another store to look in"
STEPS = 4  # an alias leads to a version, that to a logged model or a run, and that to a store


def located(spec: S, tell: Callable[[str], None], known: Known | None = None) -> S:
    """Return a request in which no source is an address in MLflow; `tell` hears what each of them is.

    What is in `known` is not looked up again; what was looked up is added to it.

    Raises:
        BadSpec: there is no such model, version, alias or run, or no MLflow is named to look in.
        StorageError: MLflow cannot be read.
    """
    found, made = {} if known is None else known, spec
    for key in [place for place, field in fields_of(type(spec)) if is_read(field)]:
        made = _located(made, key.split("."), partial(_found, key, spec, tell, found))
    return made


def _located(part: S, names: Sequence[str], find: Callable[[str], Address]) -> S:
    """Return a part of a request in which the source at `names` is what `find` gives for an address in MLflow."""
    # Of several kinds of a group, only the one that was chosen has its settings.
    value = getattr(part, names[0], None)
    changed: dict[str, Any] = {}
    if len(names) > 1:
        changed = {names[0]: _located(value, names[1:], find)} if isinstance(value, BaseModel) else {}
    elif isinstance(value, str) and Address.of(value).scheme in IN_MLFLOW:
        changed = {names[0]: find(value).text}
        # The output is named after the model, and not after the folder that it happens to lie in.
        if "hub_id" in type(part).model_fields and getattr(part, "name", None) is None:
            changed["name"] = _title(value)
    return part.model_copy(update=changed) if changed else part


def _found(key: str, spec: BaseModel, tell: Callable[[str], None], known: Known, text: str) -> Address:
    """Return where the checkpoint lies that an address in MLflow at the setting `key` means. Errors as `located`."""
    place = _tracking_uri(key, spec), text
    if place not in known:
        known[place] = Lookup(key, place[0]).checkpoint(Address.of(text), tell)
    tell(f"{key}: {text} is {known[place]}")
    return known[place]


def _title(text: str) -> str:
    """Return a name for what an address in MLflow means, of the characters that a folder's name may have."""
    scheme, _, rest = text.partition(":/")
    parts = rest.strip("/").split("/")
    return re.sub(r"[^\w.\-]+", "_", parts[0].partition("@")[0] if scheme == "models" else parts[-1])


class Lookup:
    """The MLflow at a URI, in which the address at the setting `key` is looked up."""

    def __init__(self, key: str, uri: str) -> None:
        from jobs.tracking.reading import OpenedStore  # which need not be loaded for what lies elsewhere

        self.key = key
        self._opened = OpenedStore(key, uri, "it is the MLflow that tracking.uri or MLFLOW_TRACKING_URI names")
        self._client, self._shown = self._opened.client, self._opened.shown

    def checkpoint(self, address: Address, tell: Callable[[str], None]) -> Address:
        """Return where the checkpoint lies that an address in MLflow means. Errors as `located`."""
        return _checkpoint_in(self._behind(address), self.key, tell)

    def _behind(self, address: Address) -> Address:
        text = address.text
        for _ in range(STEPS):
            scheme, _, rest = text.partition(":/")
            parts = [part for part in rest.split("/") if part]
            if not parts or any(part in (".", "..") for part in parts):
                raise BadSpec(f"{self.key}: {address}: expected {FORMS}")

            text = self._model(address, parts) if scheme == "models" else self._run(address, parts)
            if Address(text).scheme not in IN_MLFLOW:
                found = self._store_of(text)
                try:
                    kind_of(found)
                except BadSpec as error:
                    raise BadSpec(f"{self.key}: {address} is {found}: {error}") from None
                return found
        raise BadSpec(f"{self.key}: {address} leads from one address in MLflow to another; give the store's own")

    def _model(self, address: Address, parts: list[str]) -> str:
        """Return what a registered or logged model's artifacts are stored at."""
        if len(parts) == 1 and ID.fullmatch(parts[0]):
            logged = self._asked(self._client.get_logged_model, parts[0])
            if logged is None:
                raise BadSpec(f"{self.key}: no logged model {parts[0]} in {self._shown}; {OTHER}")
            return str(logged.artifact_location)
        name, at, alias = parts[0].partition("@")
        if len(parts) > 2 or (len(parts) == 2) == bool(at):
            raise BadSpec(f"{self.key}: {address}: expected {FORMS}")

        version = self._version(name, alias or parts[1], is_alias=bool(at))
        with self._opened.reading():
            return str(self._client.get_model_version_download_uri(name, version))

    def _version(self, name: str, wanted: str, *, is_alias: bool) -> str:
        """Return the number of a model's version, which is given as such, as `latest`, or by an alias."""
        from jobs.tracking.sweep_tag import quoted  # which need not be loaded for what lies elsewhere

        model = self._asked(self._client.get_registered_model, name)
        if model is None:
            raise BadSpec(f"{self.key}: no model {name!r} is registered in {self._shown}; {OTHER}")
        found = self._asked(self._client.search_model_versions, f"name={quoted(name)}") or ()
        versions = sorted(int(each.version) for each in found)
        if versions and wanted == "latest" and not is_alias:
            return str(versions[-1])
        if wanted.isdecimal() and int(wanted) in versions and not is_alias:
            return wanted
        if wanted in model.aliases:
            return str(model.aliases[wanted])
        known = [*map(str, versions[-8:]), *(f"@{alias}" for alias in sorted(model.aliases))]
        raise BadSpec(
            f"{self.key}: the model {name!r} in {self._shown} has no version or alias {wanted!r};"
            f" it has {', '.join(known) or 'no versions'}"
        )

    def _run(self, address: Address, parts: list[str]) -> str:
        """Return what a run's artifacts at a path are stored at; since MLflow 3, models lie apart from the others."""
        run = self._asked(self._client.get_run, parts[0])
        if run is None:
            raise BadSpec(f"{self.key}: no run {parts[0]} in {self._shown}; {OTHER}")
        path = "/".join(parts[1:])
        for each in getattr(run.outputs, "model_outputs", None) or []:
            model = self._asked(self._client.get_logged_model, each.model_id)
            if model is not None and len(parts) > 1 and model.name == parts[1]:
                return "/".join([str(model.artifact_location).rstrip("/"), *parts[2:]])
        return "/".join([str(run.info.artifact_uri).rstrip("/"), *([path] if path else [])])

    def _asked(self, call: Callable[..., Any], *arguments: str) -> Any:
        """Ask MLflow; None if what is asked for does not exist."""
        try:
            with self._opened.reading():
                return call(*arguments)
        except StorageError as error:
            # MLflow's own error has a code, which other libraries' errors have not.
            if getattr(error.__cause__, "error_code", "") in MISSING:
                return None
            raise

    def _store_of(self, uri: str) -> Address:
        """Return the address of artifacts, of which MLflow gives a path or a URI."""
        parts = urlsplit(uri)
        if parts.scheme == "mlflow-artifacts":
            server = urlsplit(self._opened.uri)
            if not parts.netloc and not server.scheme.startswith("http"):
                raise BadSpec(
                    f"{self.key}: {uri} is kept by a tracking server, and {self._shown} is none; set tracking.uri"
                )
            scheme = server.scheme if server.scheme.startswith("http") else "http"
            netloc = parts.netloc or _with_password(server.netloc)
            prefix = "" if parts.netloc else server.path.rstrip("/")
            return Address(urlunsplit((scheme, netloc, quote(f"{prefix}{PROXY}{parts.path}".rstrip("/")), "", "")))
        if parts.scheme in ("", "file"):
            return Address(os.path.abspath(url2pathname(parts.path) if parts.scheme else uri))
        if "://" not in uri:
            raise BadSpec(f"{self.key}: {uri} is in no store that is read here; fetch it into a folder first")
        return Address.of(uri)


def _with_password(netloc: str) -> str:
    """Return a tracking server's host, with the user and password that MLflow takes from the environment."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if "@" in netloc or not user:
        return netloc
    return f"{quote(user, safe='')}:{quote(password or '', safe='')}@{netloc}"


def _tracking_uri(key: str, spec: BaseModel) -> str:
    """Return the MLflow to look in: `tracking.uri`, MLFLOW_TRACKING_URI, or the store in the folder of outputs."""
    from jobs.tracking.mlflow_run import default_uri
    from jobs.tracking.reading import lacks_file

    given = getattr(getattr(spec, "tracking", None), "uri", None) or os.environ.get("MLFLOW_TRACKING_URI")
    root = getattr(getattr(spec, "output", None), "local_root", None) or Path.cwd() / OUTPUTS
    uri = given or default_uri(root)
    if lacks_file(uri):
        what = f"there is no store {without_secrets(uri)}" if given else "no MLflow is named to look in"
        raise BadSpec(f"{key}: {what}; set tracking.uri, or MLFLOW_TRACKING_URI in the environment")
    return str(uri)


def _checkpoint_in(address: Address, key: str, tell: Callable[[str], None]) -> Address:
    """Return where the checkpoint is in a model's artifacts: there, in a folder, or on the Hub."""
    files = PinnedFiles(open_store(address))
    flavor = _flavor(files)
    weights, hub_id = flavor.get("model_binary"), flavor.get("source_model_name")
    if isinstance(weights, str) and ".." not in weights.split("/") and not weights.startswith("/"):
        if "components" in flavor:
            tell(f"{key}: MLflow keeps the tokenizer apart, in {address}/components, so that it is not copied")
        return address / weights
    if isinstance(hub_id, str):
        revision = flavor.get("source_model_revision")
        return Address.of(f"hf://{hub_id}" + (f"@{revision}" if isinstance(revision, str) else ""))
    for folder in FOLDERS:
        if files.find(f"{folder}/config.json".lstrip("/")) is not None:
            return address / folder if folder else address
    return address


def _flavor(files: PinnedFiles) -> dict[str, Any]:
    """Return what MLflow's description says of a model of transformers; nothing if it is another, or there is none."""
    found = files.find(DESCRIPTION)
    if found is None or found.size > DESCRIPTION_LIMIT:
        return {}
    try:
        described = yaml.safe_load(files.read_all(DESCRIPTION, DESCRIPTION_LIMIT))
        flavor = described["flavors"]["transformers"]
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError):
        return {}
    return flavor if isinstance(flavor, dict) else {}
