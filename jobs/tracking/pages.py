"""The addresses of MLflow's pages, and what they open on.

The page that compares runs (#/compare-runs) shows every parameter, and keeps no setting in its address or in a tag (as
of 3.17). The experiment's charts do: a view that is kept as a tag of the experiment, and opened by its key, has error
over size first and then a table of what differs. Which workflow a page is for is decided by its address alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.text import Text

from jobs.report.tables import whole
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.mlflow_run import TRAINING, default_uri
from jobs.tracking.sweep_tag import of_sweep
from loaders.storage.address import without_secrets

COMPARED = 20  # runs that MLflow's compare page shows side by side; more are listed
SECTION = "weightmill"
SERVED_BY = ("flask", "graphene")  # what MLflow's pages are served by, which its client alone does without


def compare_page(spec: TrackingSpec, root: Path, runs: Sequence[str], experiment: str, sweep: str | None = None) -> str:
    """Return the page on which MLflow compares runs: the view of a sweep, else side by side, or listed if many.

    For a store that no server serves, it is the command that does, and what finds the sweep's view there.
    """
    uri = without_secrets(spec.uri or default_uri(root))
    listed = f"#/experiments/{experiment}/runs?{TRAINING}"
    if not uri.startswith("http"):
        filtered = f"\n  the sweep is {of_sweep(sweep)}" if sweep else ""
        return f"compare: {how_to_open(uri, listed)}{filtered}"
    if sweep is not None:
        page = f"{listed}&compareRunsMode=CHART&viewStateShareKey={quote(sweep)}"
    elif len(runs) > COMPARED:
        page = listed
    else:
        ids, of = quote(json.dumps(list(runs))), quote(json.dumps([experiment]))
        page = f"#/compare-runs?runs={ids}&experiments={of}&{TRAINING}"
    return f"compare: {uri.rstrip('/')}/{page}"


def how_to_open(uri: str, page: str = "") -> str:
    """Say how the page of a store is opened that no server serves yet; a database below here is named from here."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and path.is_relative_to(Path.cwd()):
        uri = f"sqlite:///{path.relative_to(Path.cwd())}"
    install = "" if all(map(find_spec, SERVED_BY)) else "pip install 'weightmill[ui]', then "
    return f"{install}mlflow ui --backend-store-uri {uri}, and then http://127.0.0.1:5000/{page}"


def run_lines(address: str | None, page: str | None) -> list[Text]:
    """Say where a run is: its page, or of a store that no server serves yet its id, and how its page is opened."""
    if not address or address.startswith("http"):
        return [whole(f"run: {address}")] if address else []
    served, found = how_to_open(address.partition(" run ")[0], page or "").rsplit(" ", 1)
    # A command and an address are pasted one after the other.
    return [whole(f"run: {address}"), whole(f"its page: {served}"), whole(f"  {found}")]


def registered_lines(registered: str | None) -> list[Text]:
    """Say what an output is in MLflow's registry (models:/NAME/VERSION), and how it is read from there."""
    if registered is None:
        return []
    name, _, version = registered.removeprefix("models:/").rpartition("/")
    return [whole(f"registered: {name} version {version}; model.path={shlex.quote(registered)}")]


def sweep_view(sweep: str, size: str, error: str) -> Mapping[str, Any]:
    """Return a view of an experiment's runs: a sweep's jobs by size, their errors over sizes, and what differs.

    The keys are those of MLflow's own saved views (ExperimentPageUIState, RunsChartsCardConfig).
    """
    chart = {"deleted": False, "isGenerated": False, "metricSectionId": SECTION, "runsCountToCompare": 100}
    axes = {axis: {"key": metric, "type": "METRIC"} for axis, metric in (("xaxis", size), ("yaxis", error))}
    differs = {
        "compareGroups": ["Parameters", "Model metrics"],
        "chartName": "What differs",
        "showDifferencesOnly": True,
        "showChangeFromBaseline": False,
        "baselineColumnUuid": "",
    }
    return {
        "searchFilter": f"{of_sweep(sweep)} and tags.`weightmill.kind` = 'job'",
        "orderByKey": f"metrics.`{size}`",
        "orderByAsc": True,
        "selectedColumns": [f"metrics.`{size}`", f"metrics.`{error}`", "params.`quant`", "params.`engine`"],
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": [
            {
                "uuid": SECTION,
                "name": "The sweep",
                "display": True,
                "isReordered": True,
                "columns": 1,
                "cardHeight": 420,
            }
        ],
        "compareRunCharts": [
            {**chart, "uuid": f"{SECTION}-size-error", "type": "SCATTER", **axes},
            {**chart, "uuid": f"{SECTION}-differs", "type": "DIFFERENCE", **differs},
        ],
    }
