"""Blocks that are larger than a unit are cut; what belongs together stays together, and the tensors are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.execution.merge import content_of
from jobs.planning.build import make_plan
from jobs.planning.plan import Plan
from loaders.checkpoints.checkpoint import open_checkpoint
from tests.making import LLAMA, Raw, llama_tensors, read_safetensors, write_checkpoint
from tests.passes import target

pytestmark = pytest.mark.quick

SMALL_MB = 0.02  # one expert's gate and up are larger, one matrix is smaller


def planned(source: Path, quant: str, unit_mb: float) -> Plan:
    return make_plan(open_checkpoint(source), [replace(target(quant), id="x")], unit_mb)


def write_mixture(folder: Path) -> Path:
    """Write a Qwen3-MoE of two layers with four experts each."""
    tensors = {name: raw for name, raw in llama_tensors().items() if ".mlp." not in name}
    for layer in range(2):
        dense = llama_tensors(seed=layer + 1, layers=1)
        for expert in range(4):
            for part in ("gate", "up", "down"):
                raw = dense[f"model.layers.0.mlp.{part}_proj.weight"]
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                tensors[name] = Raw("BF16", np.roll(raw.data, 64 * expert))
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = Raw("BF16", tensors["lm_head.weight"].data[:4])
    config = {**LLAMA, "model_type": "qwen3_moe", "dtype": "bfloat16", "num_experts": 4}
    return write_checkpoint(folder, tensors, config=config)


@pytest.mark.parametrize(("quant", "stacks"), [("nvfp4a16", 0), ("mlx_int4", 6)])
def test_a_block_is_cut_between_groups_and_stacks(tmp_path: Path, quant: str, stacks: int) -> None:
    source = write_mixture(tmp_path / "m")
    plan = planned(source, quant, SMALL_MB)
    places: dict[str, dict[str, set[str]]] = {"block": {}, "group": {}, "stack": {}}
    for unit in plan.units:
        for tensor in unit.tensors:
            places["block"].setdefault(tensor.block, set()).add(unit.id)
            if tensor.group is not None:
                places["group"].setdefault(tensor.group, set()).add(unit.id)
        for placement in unit.outputs["x"].placements:
            for slot in placement.slots.values():
                if slot.within is not None:
                    places["stack"].setdefault(slot.within[0].rpartition(".")[0], set()).add(unit.id)
    assert any(len(units) > 1 for units in places["block"].values())
    assert all(len(units) == 1 for kind in ("group", "stack") for units in places[kind].values())
    assert len(places["stack"]) == stacks
    whole = planned(source, quant, 1000)
    assert sorted(t.name for u in plan.units for t in u.tensors) == sorted(t.name for t in whole.sources.tensors)


@pytest.mark.parametrize("quant", ["nvfp4a16", "mlx_int4", "none"])
def test_a_cut_block_gives_the_same_tensors(tmp_path: Path, weightmill: Any, quant: str) -> None:
    source, found = write_mixture(tmp_path / "m"), []
    for unit_mb in (SMALL_MB, 1000):
        out = tmp_path / f"out-{unit_mb}"
        ran = weightmill(
            "run", f"model.path={source}", f"quant={quant}", f"unit_mb={unit_mb}", f"output.path={out}", "tracking=none"
        )
        assert ran.status == 0, ran.err
        found.append({name: (raw.dtype, raw.data.tobytes()) for name, raw in read_safetensors(out).items()})
    assert found[0] == found[1]
    index = json.loads((tmp_path / f"out-{SMALL_MB}" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found[0])
    assert len(set(index["weight_map"].values())) > len(planned(source, quant, 0.1).units)


def test_blocks_that_fit_are_never_cut(tmp_path: Path) -> None:
    plan = planned(write_mixture(tmp_path / "m"), "nvfp4a16", 0.2)
    blocks = [{tensor.block for tensor in unit.tensors} for unit in plan.units]
    assert len(blocks) > 1
    assert sum(map(len, blocks)) == len(set.union(*blocks))


def test_units_with_other_experts_of_a_stored_stack_are_other_work(tmp_path: Path) -> None:
    tensors = llama_tensors(layers=1)
    up, down = tensors["model.layers.0.mlp.up_proj.weight"].data, tensors["model.layers.0.mlp.down_proj.weight"].data
    stacks = {"gate_up_proj": up.T, "down_proj": down.T}
    for name, matrix in stacks.items():
        stacked = matrix[None].repeat(4, axis=0)
        tensors[f"model.layers.0.mlp.experts.{name}"] = Raw("BF16", stacked)
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "m", tensors, config=config)
    plan = planned(source, "fp8_dynamic", SMALL_MB)
    experts = [u for u in plan.units if any(".experts." in tensor.name for tensor in u.tensors)]
    assert len(experts) > 2
    assert len({content_of(unit) for unit in plan.units}) == len(plan.units)
    whole = planned(source, "fp8_dynamic", 1000)
    assert all(part is None for _, _, part in content_of(whole.units[0]))
