"""Lists of module names in a config: each tool's spelling."""

from __future__ import annotations

import pytest

from loaders.checkpoints.name_patterns import Named, fault_of, is_quick
from loaders.errors import BadCheckpoint

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*b", "(?:.*)*b", "(a?){30}b", "((ab)*c)+", ".*.*.*.*.*.*b"])
def test_patterns_on_which_an_engine_would_hang_are_known(pattern: str) -> None:
    assert not is_quick(pattern)
    assert "could take very long" in (fault_of(pattern, "here") or "")


@pytest.mark.parametrize(
    "pattern",
    [r".*mlp\.(gate|up|gate_up|down)_proj.*", r"^(?!.*visual).*$", r"model\.layers\.(?:[0-9]|1[0-9])\..*", "[+*]+x"],
)
def test_patterns_that_tools_write_are_taken(pattern: str) -> None:
    assert fault_of(pattern, "here") is None


@pytest.mark.parametrize(
    ("entry", "is_in"),
    [
        ("model.layers.1.mlp", True),
        ("layers.1.mlp.gate_proj", True),
        ("model.layers.*.gate_proj", True),
        ("model.layers.1*", True),
        ("re:.*gate_proj$", True),
        ("gate", False),
        ("model.layers.11", False),
        ("re:gate_proj", False),
    ],
)
def test_an_entry_names_whole_parts_of_a_name(entry: str, is_in: bool) -> None:
    assert ("model.layers.1.mlp.gate_proj" in Named([entry], "here")) == is_in


def test_a_list_of_names_that_no_module_has_is_looked_through_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.checkpoints.name_patterns.SCANNED", 100_000)
    modules = [f"model.layers.{number}.mlp" for number in range(1000)]
    assert Named(modules, "here").unused(modules) == []
    with pytest.raises(BadCheckpoint, match=r"here: a list of 1000 names, most of which no module has"):
        Named([f"x{number}" for number in range(1000)], "here").unused(modules)


def test_an_entry_is_unused_if_no_tool_could_mean_anything_by_it() -> None:
    entries = ["gate", "vision", "other.layers.1.mlp", "re:.*experts", "model.layers.*.attn", "model.tower.fc1"]
    named = Named(entries, "here")
    assert named.unused(["model.layers.1.mlp.gate_proj"]) == [*entries[1:2], *entries[3:]]
