"""Nothing of a scheme or its engine is forgotten: every place that must know of it does."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from loaders.layouts import ENGINES, LAYOUTS, compressed_tensors, hf
from loaders.lint import BY_METHOD
from loaders.presets.auto import AutoQuant
from loaders.presets.catalog import preset, preset_names
from loaders.presets.settings import COMPRESSED_TENSORS, CompressedTensorsQuant, OneQuant, Quant
from loaders.quantization.schemes.ggml import Ggml
from loaders.quantization.schemes.plain import Plain
from loaders.rules.defaults import DEFAULTS
from loaders.tensors.quantized_sources import FINDERS
from tests.loaders.quantization.test_schemes import SCHEMES

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", preset_names())
def test_everything_knows_of_a_presets_engine(name: str) -> None:
    quant = preset(name)
    scheme = quant.scheme
    assert scheme.engine in ENGINES, "a row for the engine in loaders/layouts/engines.py"
    engine = ENGINES[scheme.engine]
    assert engine.layout in LAYOUTS, "its layout in LAYOUTS of loaders/layouts/__init__.py"
    assert isinstance(scheme, Plain) or quant.mix is not None or scheme.engine in DEFAULTS, (
        "which tensors it quantizes: DEFAULTS of loaders/rules/defaults.py, or a mix of its settings"
    )
    if engine.method is not None:
        assert engine.method in FINDERS, "how it is read again: FINDERS of loaders/tensors/quantized_sources"
        assert engine.method in {*BY_METHOD, "gguf"}, "what it stumbles over: BY_METHOD of loaders/lint"
    tried = {type(each) for each in SCHEMES.values()} | {Ggml}  # Ggml's types are tried in test_ggml.py
    assert type(scheme) in tried, "a line in SCHEMES of tests/loaders/quantization/test_schemes.py"


@pytest.mark.parametrize("name", preset_names())
def test_the_config_of_a_layout_of_transformers_knows_the_scheme(name: str) -> None:
    scheme = preset(name).scheme
    engine = ENGINES[scheme.engine]
    if scheme.engine == compressed_tensors.ENGINE:
        assert compressed_tensors.weights_of(scheme)["num_bits"] in (4, 8)
    elif engine.layout == "hf" and not isinstance(scheme, Plain):
        block = hf.quantization_config(scheme, None, "bfloat16")
        assert block["quant_method"] == engine.method, "quantization_config of loaders/layouts/hf.py"


def test_schemes_of_compressed_tensors_have_names_of_their_own() -> None:
    names = {preset: compressed_tensors.name_of(scheme) for preset, scheme in COMPRESSED_TENSORS.items()}
    assert len(set(names.values())) == len(names), f"name_of of loaders/layouts/compressed_tensors.py: {names}"


def test_presets_of_compressed_tensors_are_those_of_its_settings() -> None:
    annotation: Any = CompressedTensorsQuant.model_fields["preset"].annotation
    assert get_args(annotation) == tuple(COMPRESSED_TENSORS), "the Literal of CompressedTensorsQuant.preset"


def test_settings_of_every_kind_can_be_given() -> None:
    made = {each for each in Quant.__subclasses__() if each.__module__.startswith("loaders.")}
    assert {*get_args(OneQuant), AutoQuant} == made, "OneQuant of loaders/presets/settings.py"
