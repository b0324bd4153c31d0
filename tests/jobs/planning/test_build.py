"""Plans: units are whole blocks, the same for every target; every output byte has its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.planning.build import make_plan
from jobs.planning.cut import cut_units
from jobs.planning.targets import Target
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.containers import CONTAINERS
from loaders.errors import BadSpec
from loaders.quantization.schemes.bitnet import Ternary
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Rule
from loaders.tensors.sources import tensors_of
from tests.making import LLAMA, llama_tensors, write_checkpoint

pytestmark = pytest.mark.quick

TARGETS = [
    Target(id="a", scheme=Bnb4("nf4")),
    Target(id="b", scheme=Bnb4("fp4", double_quant=True)),
    Target(id="c", scheme=Ternary()),
    Target(id="d", scheme=Plain()),
]


def test_units_are_whole_blocks_and_the_same_for_every_set_of_targets(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    plans = [make_plan(checkpoint, TARGETS[:count], 0.05) for count in (1, 4)]
    names = [[[r.name for r in unit.tensors] for unit in plan.units] for plan in plans]
    assert names[0] == names[1]
    assert len(names[0]) > 2
    blocks = [{r.block for r in unit.tensors} for unit in plans[0].units]
    assert sum(len(b) for b in blocks) == len(set.union(*blocks))
    assert sorted(n for unit in names[0] for n in unit) == sorted(llama_tensors())


def test_a_single_job_and_a_sweep_make_the_same_records(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    alone = make_plan(checkpoint, TARGETS[:1], 0.05)
    together = make_plan(checkpoint, TARGETS, 0.05)
    assert [u.key("a") for u in alone.units] == [u.key("a") for u in together.units]


def test_a_unit_is_as_large_as_asked_or_one_block(source: Path) -> None:
    tensors = tensors_of(open_checkpoint(source), decode=False).tensors
    assert len(cut_units(tensors, 1e12)) == 1
    for unit in cut_units(tensors, 60_000):
        assert sum(r.source_bytes for r in unit) <= 60_000 or len({r.block for r in unit}) == 1


def test_every_byte_of_every_file_has_one_place(source: Path) -> None:
    plan = make_plan(open_checkpoint(source), TARGETS, 0.05)
    for target in plan.targets.values():
        for file in target.files:
            offset = 0
            for slot in file.slots:
                assert slot.offset == offset
                offset += slot.size
            assert offset == file.data_bytes


def test_a_plan_of_other_content_has_other_keys(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", shards=2)
    keys = []
    for target in (
        Target(id="x", scheme=Bnb4("nf4")),
        Target(id="x", scheme=Bnb4("nf4", 128)),
        Target(id="x", scheme=Bnb4("fp4")),
    ):
        keys.append([u.key("x") for u in make_plan(open_checkpoint(source), [target], 0.05).units])
    assert len({tuple(each) for each in keys}) == 3
    path = source / "model-00001-of-00002.safetensors"
    path.touch()
    assert [
        u.key("x") for u in make_plan(open_checkpoint(source), [Target(id="x", scheme=Bnb4("nf4"))], 0.05).units
    ] != keys[0]


def test_memory_does_not_grow_with_the_model(source: Path) -> None:
    for unit in make_plan(open_checkpoint(source), TARGETS, 1000).units:
        assert unit.memory_bytes(2) < 100_000_000


def test_dropping_everything_is_refused(source: Path) -> None:
    with pytest.raises(BadSpec, match="every tensor is dropped"):
        make_plan(
            open_checkpoint(source),
            [Target(id="x", scheme=Plain(), rules=(Rule(action="drop", why="test", name=".", label="rules[0]"),))],
            100,
        )


def test_files_of_a_container_without_an_index_are_refused_where_one_is_needed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTAINERS, "pytorch", replace(CONTAINERS["pytorch"], index=None))
    target, checkpoint = Target(id="a", scheme=Plain(), container_name="pytorch"), open_checkpoint(source)
    with pytest.raises(BadSpec, match=r"output\.container: layout hf lists its \d+ files in an index"):
        make_plan(checkpoint, [target], 0.05)
    assert len(make_plan(checkpoint, [target], 1000).targets["a"].files) == 1


def test_a_quantized_source_can_only_be_copied(tmp_path: Path) -> None:
    config = {**LLAMA, "dtype": "bfloat16", "quantization_config": {"quant_method": "aqlm"}}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", config=config))
    with pytest.raises(BadSpec, match=r"already quantized \(aqlm\)"):
        make_plan(checkpoint, [Target(id="x", scheme=Bnb4("nf4"))], 100)
    make_plan(checkpoint, [Target(id="x", scheme=Plain())], 100)


def test_weights_are_cast_as_the_engine_would_before_they_are_quantized(tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": "float16"}
    plan = make_plan(
        open_checkpoint(write_checkpoint(tmp_path / "m", config=config)), [Target(id="x", scheme=Bnb4("nf4"))], 100
    )
    casts = {p.name: p.encoding.cast for p in plan.units[0].outputs["x"].placements}
    assert str(casts["model.layers.0.mlp.up_proj.weight"]) == "F16"
    assert casts["model.norm.weight"] is None


def test_layers_that_config_json_does_not_have_are_left_out_of_all_but_a_copy(tmp_path: Path) -> None:
    config = {**LLAMA, "dtype": "bfloat16"}
    root = write_checkpoint(tmp_path / "m", llama_tensors(layers=3), config=config)
    plan = make_plan(open_checkpoint(root), TARGETS, 1)
    left_out = {name for name in llama_tensors(layers=3) if ".layers.2." in name}
    for target, expected in (("a", left_out), ("d", set())):
        dropped = {d.tensor.name for d in plan.targets[target].decisions if d.action == "drop"}
        assert dropped == expected
    assert any("layers beyond (2)" in note for note in plan.sources.notes)
    rule = Rule(action="keep", why="mine", name="layers.2", label="rules[0]")
    kept = make_plan(open_checkpoint(root), [Target(id="a", scheme=Bnb4("nf4"), rules=(rule,))], 1)
    assert {d.action for d in kept.targets["a"].decisions if d.tensor.name in left_out} == {"keep"}
