"""Family files are held against the engines' own code, and a section is proposed from it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from loaders.architectures import mlx
from loaders.architectures.family_files import section
from tests import families, mlx_reference
from tests.engines import mlx_lm_or_skip
from tests.quick import some_quick

mlx_lm_or_skip()
pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

KINDS = [
    kind for kind, of in families.kinds().items() if section(of, "mlx") is not None and kind not in mlx_reference.APART
]


@pytest.mark.parametrize("kind", some_quick(KINDS, "kimi_k25"))
def test_a_family_file_says_what_mlx_lm_does(kind: str) -> None:
    assert families.checked(kind) == []


def test_a_family_file_that_says_something_else_is_found() -> None:
    mlx._model.cache_clear()
    said = {**(section("qwen3_next", "mlx") or {}), "forms": []}
    try:
        with patch.object(mlx, "section", lambda model_type, engine: said):
            found = families.checked("qwen3_next")
    finally:
        mlx._model.cache_clear()
    assert any("layers.0.linear_attn.conv1d.weight: the family file gives [256, 1, 4] of" in each for each in found)
    assert any("input_layernorm.weight, plus 1" in each for each in found)


@pytest.mark.parametrize("kind", ["qwen3_5", "kimi_k2", "step3p5"])
def test_what_is_proposed_is_what_the_file_says(kind: str, tmp_path: Path) -> None:
    """But for what a person writes shorter: patterns, reasons, and experts that are cut before."""
    proposed = yaml.safe_load(families.propose(kind, tmp_path))["mlx"]
    said = section(kind, "mlx") or {}
    assert proposed.get("names", []) == said.get("names", [])
    views = [[row["view"] for row in rows.get("forms", ()) if "view" in row] for rows in (proposed, said)]
    assert kind == "step3p5" or views[0] == views[1]
    assert ("plus_one" in str(proposed)) == ("plus_one" in str(said))
    assert len(proposed.get("uncast", ())) == len(said.get("uncast", ()))
    assert [".share_expert.", ".mlp.share_expert."] in proposed.get("inside", []) or kind != "step3p5"
