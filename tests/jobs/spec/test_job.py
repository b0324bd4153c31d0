"""What can be chosen is what there is."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from jobs.spec.job import OutputSpec, SourceSpec
from loaders.containers import CONTAINERS
from loaders.layouts import LAYOUTS
from loaders.places import CONF

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("spec", "field", "known"),
    [(SourceSpec, "container", CONTAINERS), (OutputSpec, "container", CONTAINERS), (OutputSpec, "layout", LAYOUTS)],
)
def test_every_container_and_layout_can_be_chosen(spec: Any, field: str, known: dict[str, Any]) -> None:
    choices = get_args(spec.model_fields[field].annotation)
    assert choices == ("auto", *known), (
        f"{spec.__name__}.{field} of jobs/spec/job.py, in the order in which they are there"
    )


def test_a_source_can_be_of_every_container() -> None:
    folder = CONF / "source"
    assert {path.stem for path in folder.glob("*.yaml")} == {"auto", *CONTAINERS}
    assert ", ".join(CONTAINERS) in (folder / "auto.yaml").read_text(), "the order in which they are looked for"


def test_an_output_can_be_of_every_layout() -> None:
    assert {path.stem for path in (CONF / "output").glob("*.yaml")} >= {*LAYOUTS}
