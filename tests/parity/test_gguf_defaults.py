"""What a family's file says that transformers' class takes for missing keys, held against the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from loaders.architectures.family_files import known_types, section  # noqa: E402

pytestmark = pytest.mark.engine

# Defaults that are not of the config class, but of the code that reads it.
OF_CODE = ("mrope_section", "partial_rotary_factor")


def defaults_of(model_type: str) -> dict[str, Any]:
    """Return what the class of a model type takes, of a model with towers for its text part."""
    config = transformers.CONFIG_MAPPING[model_type]().get_text_config().to_dict()
    rope = config.get("rope_parameters") or {}
    by_kind = {kind: rope.get(kind, rope) for kind in ("full_attention", "sliding_attention")}
    if all(isinstance(settings, Mapping) for settings in by_kind.values()):
        config["rope_theta"] = by_kind["full_attention"].get("rope_theta")
        config["rope_local_base_freq"] = by_kind["sliding_attention"].get("rope_theta")
    return config


@pytest.mark.parametrize("model_type", [t for t in known_types("gguf") if (section(t, "gguf") or {}).get("defaults")])
def test_defaults_are_those_of_the_class(model_type: str) -> None:
    said = (section(model_type, "gguf") or {})["defaults"]
    theirs = defaults_of(model_type)
    # Keys that the class has not are such as the first configs have, or numbers of what a model lacks.
    wanted = {key: value for key, value in said.items() if key not in OF_CODE and key in theirs}
    assert {key: theirs.get(key) for key in wanted} == wanted
