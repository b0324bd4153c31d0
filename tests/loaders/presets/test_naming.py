"""The words that settings have in the names of outputs."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.spec.job import JobSpec
from jobs.spec.names import USUAL
from loaders.layouts import LAYOUTS
from loaders.presets.catalog import preset, preset_names
from loaders.presets.naming import LONGEST, joined, words_of


def name_of(*settings: str) -> str:
    return compose("run", JobSpec, take_apart("run", JobSpec, [*settings, "tracking=none"])).output_address.name


def test_no_default_of_the_output_has_a_word() -> None:
    for layout in ("auto", *LAYOUTS):
        assert name_of("quant=none", f"output={layout}") == ("demo-none" if layout == "auto" else f"demo-none-{layout}")


def test_presets_have_no_words() -> None:
    for name in preset_names():
        assert words_of(preset(name)) == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ("", "demo-nf4"),
        ("quant.group_size=64", "demo-nf4"),
        ("quant.group_size=128 quant.double_quant=true", "demo-nf4-g128-dq"),
        ("quant.storage_dtype=bfloat16 quant.compute_dtype=float16", "demo-nf4-storage_bf16-compute_f16"),
        ("quant.compute_dtype=float16 output.dtype=float16", "demo-nf4-compute_f16-kept_f16"),
        ("output.dtype=source", "demo-nf4-kept_source"),
        ("output.max_shard_size=5GB", "demo-nf4-max_shard_size-5GB"),
        ("quant=none quant.dtype=bfloat16", "demo-none-bf16"),
        ("quant=mlx_int4 quant.bits=3 quant.group_size=32", "demo-mlx_int4-b3-g32"),
        ("quant=hqq4 quant.axis=0", "demo-hqq4-axis-0"),
        ("quant=w4a16 quant.group_size=32", "demo-w4a16-g32"),
        ("quant=gguf_q4_k_m quant.pure=true quant.output_type=Q8_0", "demo-gguf_q4_k_m-pure-output_type-Q8_0"),
        ("quant=ternary quant.linear_class=autobitlinear", "demo-ternary-autobitlinear"),
        ("quant=auto quant.engine=mlx quant.target_bits=4.25", "demo-auto-mlx-4.25bits"),
        ("quant=auto quant.engine=gguf quant.target_gb=24 quant.keep=false", "demo-auto-gguf-24gb-no-keep"),
        ("quant=auto quant.among=[mlx_int4,mlx_int8] quant.target_bits=5", "demo-auto-mlx-5bits-mlx_int4-mlx_int8"),
        ("quant=auto quant.engine=mlx quant.target_bits=5 quant.calibration=self", "demo-auto-mlx-5bits-by-self"),
        ("quant=none output=gguf", "demo-none-gguf"),
        ("quant=gguf_q8_0 output=gguf output.split=true", "demo-gguf_q8_0-split"),
        ("quant=none output.container=pytorch", "demo-none-pytorch"),
        ("source=safetensors mtp=keep", "demo-nf4-from-safetensors-mtp-keep"),
        ("transform=block_expansion transform.num_blocks=1 quant.group_size=32", "demo-plus1-nf4-g32"),
        ("output.suffix=-mine", "demo-nf4-mine"),
    ],
)
def test_what_differs_from_the_preset_is_in_the_name(settings: str, name: str) -> None:
    assert name_of(*settings.split()) == name


def test_rules_are_told_apart() -> None:
    names = {name_of(f"rules=[{{name: {part}, action: keep}}]") for part in ("q_proj", "k_proj")}
    assert len(names) == 2
    assert all(name.startswith("demo-nf4-rules-") for name in names)


def test_a_model_of_any_name_gives_a_name_that_every_store_takes() -> None:
    assert name_of("model.path=/x/a=b [c], 'd'") == "a_b_c_d_-nf4"


def test_a_name_stays_short() -> None:
    some, more = (joined([f"setting-{n}" for n in range(count)]) for count in (20, 21))
    assert len(some) <= LONGEST + 1
    assert some != more


@pytest.mark.parametrize("value", ["a--b", "..", "-x-", "a=b", "ü", ""])
def test_words_have_the_characters_of_the_hubs_names(value: str) -> None:
    name = f"demo-nf4{joined([value, 'end'])}"
    assert "--" not in name
    assert ".." not in name
    assert name.endswith("-end")


def test_the_container_of_each_layout_is_its_usual_one() -> None:
    assert {name: layout.containers[0] for name, layout in layouts().items()} == USUAL


def layouts() -> dict[str, Any]:
    return dict(LAYOUTS)
