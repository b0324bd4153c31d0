"""Merging an adapter of peft as a job; tests/parity/test_merge_lora.py holds the sums against peft's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.execution.unit
from loaders.checkpoints.adapter import open_adapter
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.quantization.kernels.low_rank import CHAIN, add_product, tiled
from loaders.tensors.merge_lora import merge_adapter
from loaders.tensors.sources import tensors_of
from tests.conftest import Ran
from tests.failing import fail_at
from tests.making import (
    LLAMA,
    Raw,
    llama_tensors,
    make_source,
    read_safetensors,
    snapshot,
    values_of,
    weights,
    write_checkpoint,
    write_moe,
    write_safetensors,
)

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/base",
}
REPORT = "weightmill.json"  # which tells how long the run took
PAGE = "report.html"  # which tells the command


def normal(*shape: int, seed: int = 7) -> Raw:
    return weights(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1, "F32")


def factors(module: str = MODULE, rank: int = 4, inputs: int = 64, outputs: int = 64) -> dict[str, Raw]:
    name = f"base_model.model.{module}"
    a, b = normal(rank, inputs, seed=1), normal(outputs, rank, seed=2)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def adapter(folder: Path, tensors: Mapping[str, Raw] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder / "adapter_model.safetensors", factors() if tensors is None else tensors)
    return folder


def tiny(folder: Path, tensors: Mapping[str, Raw] | None = None, **config: Any) -> Path:
    return write_checkpoint(folder, tensors, config={**LLAMA, "dtype": "bfloat16", **config}, shards=2)


def chain(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """A product by fused multiply-adds, in float64, where products of float32 are exact."""
    total = np.zeros((len(b), a.shape[1]), np.float32)
    for k in range(b.shape[1]):
        total = (b[:, k : k + 1].astype(np.float64) * a[k].astype(np.float64) + total).astype(np.float32)
    return total


def merged(base: Path, folder: Path) -> Any:
    checkpoint = open_checkpoint(base)
    return merge_adapter(checkpoint, tensors_of(checkpoint, decode=True), open_adapter(folder))


# --- the sum


@pytest.mark.quick
@pytest.mark.parametrize("rank", [1, 4, 64, CHAIN])
def test_a_range_of_the_product_is_the_chain_of_fused_steps(rank: int) -> None:
    rng = np.random.default_rng(rank)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, 150), (9, rank)))
    whole = (chain(b, a) * np.float32(1.5)).reshape(-1)
    for start, stop in ((0, 9 * 150), (1, 2), (140, 460)):
        values = np.zeros(stop - start, np.float32)
        add_product(b, tiled(a[None]), 9, 150, np.float32(1.5), start, values)
        assert np.array_equal(values, whole[start:stop])


def test_the_sum_is_rounded_once(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    base, out = tiny(tmp_path / "m"), tmp_path / "out"
    ran = weightmill(
        "run", f"model.path={base}", "transform=merge_lora", f"transform.path={adapter(tmp_path / 'a')}", "quant=none",
        f"output.path={out}", "format=json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    old, new = read_safetensors(base), read_safetensors(out)
    a, b = (raw.data for raw in factors().values())
    wanted = weights(values_of(old[f"{MODULE}.weight"]) + chain(b, a) * np.float32(6 / 4), "BF16")
    assert np.array_equal(new[f"{MODULE}.weight"].data, wanted.data)
    assert all(np.array_equal(new[n].data, old[n].data) for n in old if n != f"{MODULE}.weight")
    assert ran.document["adapter"]["tensors"] == 1
    assert ran.document["warnings"] == [
        f"merged into 1 tensor: {tmp_path / 'a'} (LoRA; rank 4 (1); scaling 1.5), as the float32 sum, rounded once (it"
        " was trained on org/base)"
    ]


@pytest.mark.parametrize("quant", ["nf4", "mlx_int4", "gguf_q8_0"])
def test_any_quant_gives_what_it_gives_of_the_merged_model(
    quant: str, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    base, given = make_source(tmp_path / "m"), ("transform=merge_lora", f"transform.path={adapter(tmp_path / 'a')}")
    assert (
        weightmill(
            "run", f"model.path={base}", *given, "quant=none", f"output.path={tmp_path / 'plain'}", "output.card=false"
        ).status
        == 0
    )
    common = (f"quant={quant}", "model.name=m", "unit_mb=0.05", "output.card=false")  # which says what was merged
    ran = weightmill("run", f"model.path={base}", *given, *common, f"output.path={tmp_path / 'one'}")
    assert ran.status == 0, ran.err
    assert weightmill("run", f"model.path={tmp_path / 'plain'}", *common, f"output.path={tmp_path / 'two'}").status == 0
    assert snapshot(tmp_path / "one", [REPORT, PAGE]) == snapshot(tmp_path / "two", [REPORT, PAGE])
    verified = weightmill("verify", f"output.path={tmp_path / 'one'}")
    assert verified.status == 0, verified.err


def test_one_experts_factors_are_cut_from_those_of_the_stack(tmp_path: Path) -> None:
    base = write_moe(tmp_path / "moe")
    [outputs, inputs] = read_safetensors(base)["model.layers.0.mlp.experts.0.up_proj.weight"].data.shape
    both = factors("model.layers.0.mlp.experts", 2 * 4, inputs, 2 * outputs)
    made = merged(base, adapter(tmp_path / "a", both, target_parameters=["mlp.experts.gate_up_proj"]))
    products = {r.name: r.merge.product for r in made.sources.tensors if r.merge is not None}
    assert sorted(products) == [
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up")
    ]
    last = products["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert (last.left.offset, last.left.stride[1:]) == (1 + outputs * 8, (8, 2))
    assert last.right.offset == 4 * inputs


def test_decoded_bases_are_merged_as_their_decoded_weights_are(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    given = ("transform=merge_lora", f"transform.path={adapter(tmp_path / 'a')}", "quant=none", "quant.dtype=bfloat16")
    assert (
        weightmill("run", f"model.path={tiny(tmp_path / 'm')}", "quant=nf4", f"output.path={tmp_path / 'q'}").status
        == 0
    )
    decoded = ("quant=none", "quant.dtype=bfloat16", f"output.path={tmp_path / 'd'}")
    assert weightmill("run", f"model.path={tmp_path / 'q'}", *decoded).status == 0
    for name, source in (("one", "q"), ("two", "d")):
        ran = weightmill("run", f"model.path={tmp_path / source}", *given, f"output.path={tmp_path / name}")
        assert ran.status == 0, ran.err
    one, two = (read_safetensors(tmp_path / name) for name in ("one", "two"))
    assert all(np.array_equal(one[name].data, two[name].data) for name in two)
    refused = weightmill("run", f"model.path={tmp_path / 'q'}", *given[:3], f"output.path={tmp_path / 'x'}")
    assert "a part of a quantized weight that is copied as it is stored" in refused.err


# --- names


@pytest.mark.quick
def test_names_fit_without_the_modules_that_hold_the_others(tmp_path: Path) -> None:
    bare = {n.removeprefix("model."): raw for n, raw in llama_tensors().items()}
    made = merged(tiny(tmp_path / "m", bare), adapter(tmp_path / "a"))
    assert [r.name for r in made.sources.tensors if r.merge is not None] == ["layers.0.self_attn.q_proj.weight"]


@pytest.mark.quick
def test_the_first_pattern_that_fits_a_module_gives_its_rank_and_alpha(tmp_path: Path) -> None:
    folder = adapter(
        tmp_path / "a", use_rslora=True, rank_pattern={"k_proj": 2, r"layers\.\d\.self_attn\.q_proj": 3, "q_proj": 5},
        alpha_pattern={"0.self_attn.q_proj": 9, "self_attn.q_proj": 1},
    )  # fmt: skip
    settings = open_adapter(folder).settings
    assert [settings.rank_of(f"model.layers.1.self_attn.{each}_proj") for each in "kqv"] == [2, 3, 4]
    assert settings.scaling(MODULE, 4) == 9 / math.sqrt(4)


@pytest.mark.quick
def test_a_saved_head_is_no_longer_tied(tmp_path: Path) -> None:
    base = tiny(tmp_path / "m", llama_tensors(tied=True), tie_word_embeddings=True)
    [rows, columns] = read_safetensors(base)["model.embed_tokens.weight"].data.shape
    head = {"base_model.model.lm_head.weight": normal(rows, columns)}
    made = merged(base, adapter(tmp_path / "a", head, modules_to_save=["lm_head"]))
    assert made.checkpoint.config["tie_word_embeddings"] is False
    [found] = [r for r in made.sources.tensors if r.name == "lm_head.weight"]
    assert found.role == "head"
    assert found.merge.replaced.name == "base_model.model.lm_head.weight"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; expected LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changed the base"),
        ({"init_lora_weights": "soon"}, "init_lora_weights='soon' is not known"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
        ({"alora_invocation_tokens": [1]}, "it acts on some tokens only"),
        ({"layer_replication": [[0, 2]]}, "it repeats layers of the base"),
        ({"r": "8"}, "r: expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
        ({"r": 8}, "its rank is 4, and adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "its rank is 4, and adapter_config.json says 2"),
        ({"alpha_pattern": {"q_proj(": 1}}, "is no regular expression"),
        ({"use_dora": True}, "says use_dora=true, and there is no lora_magnitude_vector"),
        ({"layers_to_transform": [1]}, "its layers_to_transform names only 1"),
    ],
)
def test_a_config_that_cannot_be_merged_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    base = tiny(tmp_path / "m")
    with pytest.raises((BadSpec, BadCheckpoint), match=said):
        merged(base, adapter(tmp_path / "a", **config))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors("model.layers.7.self_attn.q_proj"), r"2 of its tensors belong to no tensor of .*org/base"),
        (factors(inputs=32), r"\[4, 32\] and .* \[64, 4\] do not fit .*q_proj.weight \[64, 64\]"),
        (dict(list(factors().items())[:1]), "expected lora_A and lora_B in the adapter"),
        ({"base_model.model.model.embed_tokens.weight": normal(99, 64)}, "the vocabulary was resized"),
        ({"base_model.model.score.weight": normal(2, 64)}, "1 of its tensors belongs to no tensor"),
        ({**factors(), f"base_model.model.{MODULE}.lora_diag": normal(4)}, "1 tensor of a kind that is not merged"),
        ({**factors(), f"base_model.model.{MODULE}.lora_B.bias": normal(64)}, "has no bias of the base to be added to"),
        ({f"{MODULE}.lora_A.weight": normal(4, 0)}, "its shards were not gathered"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, Raw], said: str) -> None:
    base = tiny(tmp_path / "m")
    with pytest.raises((BadSpec, BadCheckpoint), match=said):
        merged(base, adapter(tmp_path / "a", tensors))


# --- the file under the job


def test_another_adapter_never_resumes_the_work_of_the_first(
    tmp_path: Path, weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder, out = tiny(tmp_path / "m"), adapter(tmp_path / "a"), tmp_path / "out"
    given = (
        f"model.path={base}", "transform=merge_lora", f"transform.path={folder}", "quant=nf4", "unit_mb=0.05",
        f"output.path={out}", "cluster.units_at_once=1", "cluster=local", "format=json",
    )  # fmt: skip

    with monkeypatch.context() as patch:
        fail_at(patch, 3, KeyboardInterrupt())
        assert weightmill("run", *given).status == 130
    adapter(folder, {name: normal(*raw.data.shape, seed=9) for name, raw in factors().items()})
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    assert ran.document["run"]["units_resumed"] == 0
    adapter(folder)
    verified = weightmill("verify", f"output.path={out}")
    assert "is not the file that was merged into the output" in verified.err


def test_an_adapter_that_changes_under_the_job_fails_it(
    tmp_path: Path, weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tiny(tmp_path / "m"), adapter(tmp_path / "a")
    honest = jobs.execution.unit.run_unit

    def changing(task: Any, on_bytes: Any, stop: Any) -> Any:
        adapter(folder, {name: normal(*raw.data.shape, seed=9) for name, raw in factors().items()})
        return honest(task, on_bytes, stop)

    monkeypatch.setattr(jobs.execution.unit, "run_unit", changing)
    ran = weightmill(
        "run", f"model.path={base}", "transform=merge_lora", f"transform.path={folder}", "cluster=local",
        f"output.path={tmp_path / 'out'}",
    )  # fmt: skip
    assert ran.status != 0
    assert "adapter_model.safetensors: it changed while it was read" in ran.err
    assert not (tmp_path / "out").exists()


def test_jobs_of_a_sweep_may_merge_different_adapters(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    base = tiny(tmp_path / "m")
    for name, alpha in (("one", 6), ("two", 9)):
        adapter(tmp_path / name, lora_alpha=alpha)
    paths = ",".join(str(tmp_path / name) for name in ("one", "two"))
    ran = weightmill(
        "run", "-m", f"model.path={base}", "transform=merge_lora", f"transform.path={paths}", "quant=none",
        f"output.root={tmp_path / 'outs'}",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    made = [
        read_safetensors(report.parent)[f"{MODULE}.weight"].data for report in (tmp_path / "outs").glob(f"*/{REPORT}")
    ]
    assert len(made) == 2
    assert not np.array_equal(*made)


def test_an_original_that_is_not_merged_judges_nothing(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    given = (f"model.path={tiny(tmp_path / 'm')}", "transform=merge_lora", f"transform.path={adapter(tmp_path / 'a')}")
    refused = weightmill("plan", *given, "verify=logits")
    assert "verify=logits runs the model at model.path, which is not the merged one" in refused.err
