"""Stacked experts, held against the parameters of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint
from loaders.tensors.sources import tensors_of
from tests.loaders.architectures.test_family import text_model
from tests.making import LLAMA, Raw, llama_tensors, read_safetensors, values_of, weights, write_checkpoint
from tests.reading import values

pytestmark = pytest.mark.engine
GPT_OSS, LLAMA4 = "model.layers.1.mlp.experts.", "model.layers.1.feed_forward.experts."


def saved(model_type: str, root: Path) -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = text_model(model_type)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(root)
    return model


def split(root: Path) -> dict[str, Any]:
    return {r.name: r for r in tensors_of(open_checkpoint(root), decode=True, split=True).tensors}


@pytest.mark.parametrize("step", [None, 7, 100])
def test_gpt_oss_experts_are_every_second_column_transposed(
    step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:  # fmt: skip
    experts = saved("gpt_oss", tmp_path).model.layers[1].mlp.experts
    found = split(tmp_path)
    assert not any(name.endswith(("gate_up_proj", "down_proj", "proj_bias")) for name in found)
    for expert in range(2):
        wanted = {
            "gate_proj.weight": experts.gate_up_proj[expert, :, 0::2].T,
            "up_proj.weight": experts.gate_up_proj[expert, :, 1::2].T,
            "down_proj.weight": experts.down_proj[expert].T,
            "gate_proj.bias": experts.gate_up_proj_bias[expert, 0::2],
            "up_proj.bias": experts.gate_up_proj_bias[expert, 1::2],
            "down_proj.bias": experts.down_proj_bias[expert],
        }
        for name, tensor in wanted.items():
            logical = found[f"{GPT_OSS}{expert}.{name}"]
            assert np.array_equal(values(tmp_path, logical, work, step), tensor.detach().numpy()), name
            assert logical.block == "model.layers.1.mlp"
            assert logical.role == ("bias" if name.endswith("bias") else "expert")
    assert found[GPT_OSS + "0.gate_proj.weight"].group == found[GPT_OSS + "0.up_proj.weight"].group is not None
    assert sum(r.source_bytes for r in found.values()) == open_checkpoint(tmp_path).size


def test_an_expert_computes_what_the_models_class_computes(tmp_path: Path, work: ThreadedWork) -> None:
    """gpt-oss' formula over our matrices gives what the class gives: orientation and parts are right."""
    torch = pytest.importorskip("torch")
    experts = saved("gpt_oss", tmp_path).model.layers[1].mlp.experts
    found = split(tmp_path)
    gate, up, down, gate_bias, up_bias, down_bias = (
        torch.from_numpy(values(tmp_path, found[f"{GPT_OSS}1.{part}_proj.{kind}"], work))
        for kind in ("weight", "bias") for part in ("gate", "up", "down")
    )  # fmt: skip
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.functional.linear
    gated = linear(x, gate, gate_bias).clamp(max=experts.limit)
    raised = linear(x, up, up_bias).clamp(-experts.limit, experts.limit)
    mine = linear((raised + 1) * gated * torch.sigmoid(gated * experts.alpha), down, down_bias)
    with torch.no_grad():
        theirs = experts(x, torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert torch.allclose(mine, theirs, atol=1e-5)  # sums of 64 float32 products of about 1


@pytest.mark.parametrize("step", [None, 33])
def test_llama4_experts_are_halves_transposed(
    step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:  # fmt: skip
    experts = saved("llama4_text", tmp_path).model.layers[1].feed_forward.experts
    found = split(tmp_path)
    for expert in range(2):
        gate, up = experts.gate_up_proj[expert].chunk(2, dim=-1)
        for name, tensor in {"gate": gate, "up": up, "down": experts.down_proj[expert]}.items():
            logical = found[f"{LLAMA4}{expert}.{name}_proj.weight"]
            assert np.array_equal(values(tmp_path, logical, work, step), tensor.T.detach().numpy()), name
            assert logical.role == "expert"


@pytest.mark.quick
@pytest.mark.parametrize("model_type", ["granitemoe", "granitemoehybrid", "step3p7", "new"])
def test_stacks_of_other_names_are_cut_as_vllm_cuts_them(model_type: str, tmp_path: Path, work: ThreadedWork) -> None:
    """vLLM's loaders halve a stack's outputs into gate and up; as wide as it is high, its shape does not tell how."""
    rng = np.random.default_rng(0)
    shapes = {"input_linear": (2, 16, 16), "output_linear": (2, 16, 8)}
    layer = "model.layers.0.block_sparse_moe."
    if model_type == "step3p7":
        shapes, layer = {"gate_proj": (2, 8, 16), "up_proj": (2, 8, 16), "down_proj": (2, 16, 8)}, "model.layers.0.moe."
    stacks = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {**llama_tensors("F32"), **{f"{layer}{name}.weight": Raw("F32", data) for name, data in stacks.items()}}
    found = split(write_checkpoint(tmp_path, tensors, config={**LLAMA, "model_type": model_type}))
    if model_type == "new":  # whoever reads that one by one is not known
        assert {f"{layer}{name}.weight" for name in stacks} <= set(found)
        return
    if model_type != "step3p7":
        stacks = {"gate_proj": stacks["input_linear"][:, :8], "up_proj": stacks["input_linear"][:, 8:],
                  "down_proj": stacks["output_linear"]}  # fmt: skip
    for name, data in stacks.items():
        for expert in range(2):
            logical = found[f"{layer}experts.{expert}.{name}.weight"]
            assert logical.role == "expert"
            assert np.array_equal(values(tmp_path, logical, work, None), data[expert])


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 50])
def test_mxfp4_is_what_transformers_dequantizes(
    step: int | None, tmp_path: Path, work: ThreadedWork
) -> None:  # fmt: skip
    """The stack as the class holds it, and every second row of it an expert's gate."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    root, packed = mxfp4(tmp_path)
    whole = {r.name: r for r in tensors_of(open_checkpoint(root), decode=True).tensors}
    found = split(root)
    for name in ("gate_up_proj", "down_proj"):
        parts = [torch.from_numpy(np.array(packed[f"{GPT_OSS}{name}_{part}"].data)) for part in ("blocks", "scales")]
        wanted = convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()
        tensor = whole[GPT_OSS + name]
        assert tensor.shape == wanted.shape
        assert np.array_equal(values(root, tensor, work, step), wanted)
        for expert in range(2):
            if name == "down_proj":
                cut = {"down": wanted[expert].T}
            else:
                cut = {"gate": wanted[expert, :, 0::2].T, "up": wanted[expert, :, 1::2].T}
            for part, matrix in cut.items():
                piece = found[f"{GPT_OSS}{expert}.{part}_proj.weight"]
                assert np.array_equal(values(root, piece, work, step), matrix)
    assert sum(r.source_bytes for r in found.values()) == open_checkpoint(root).size


def mxfp4(root: Path, dtype: str = "float32") -> tuple[Path, dict[str, Raw]]:
    """A gpt-oss with random blocks and scales for experts, inputs of 32 and 64."""
    saved("gpt_oss", root / "plain")
    tensors = {n: raw for n, raw in read_safetensors(root / "plain").items() if not n.endswith("_proj")}
    rng = np.random.default_rng(0)
    for layer in range(2):
        for name, shape in (("gate_up_proj", (2, 128, 1)), ("down_proj", (2, 32, 2))):
            stack = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[stack + "_blocks"] = Raw("U8", rng.integers(0, 256, (*shape, 16), dtype=np.uint8))
            tensors[stack + "_scales"] = Raw("U8", rng.integers(110, 130, shape, dtype=np.uint8))
    if dtype == "bfloat16":
        tensors = {n: weights(values_of(raw), "BF16") if raw.dtype == "F32" else raw for n, raw in tensors.items()}
    import json

    config = json.loads((root / "plain" / "config.json").read_text())
    config |= {"dtype": dtype, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    return write_checkpoint(root / "mxfp4", tensors, config=config, shards=3), tensors


def test_mxfp4_comes_back_as_the_checkpoint_that_transformers_loads(tmp_path: Path, weightmill: Any) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    root, packed = mxfp4(tmp_path, "bfloat16")
    ran = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'out'}", "quant=none",
                     "quant.dtype=bfloat16")  # fmt: skip
    assert ran.status == 0, ran.err
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = [torch.from_numpy(np.array(packed[f"{GPT_OSS}gate_up_proj_{part}"].data)) for part in ("blocks", "scales")]
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj, convert_moe_packed_tensors(*parts))
    for quant in ("nf4", "int8"):
        ran = weightmill("run", f"model.path={root}", f"output.path={tmp_path / quant}", f"quant={quant}")
        assert ran.status == 0, ran.err
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / quant, output_loading_info=True, device_map={"": "cpu"}
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    refused = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'no'}", "quant=nf4",
                         "rules=[{role: expert, action: quantize}]")  # fmt: skip
    assert refused.status == 2
    assert "is a stack of experts, which transformers loads as one parameter and bitsandbytes does not" in refused.err
    assert weightmill("diff", root, tmp_path / "out", "format=json").document["different"] == 0


def test_mxfp4_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    tensors = {
        **llama_tensors("F32"),
        "model.layers.0.mlp.experts.x_blocks": Raw("U8", np.zeros((1, 2, 1, 16), np.uint8)),
        "model.layers.0.mlp.experts.x_scales": Raw("U8", np.zeros((1, 2, 1), np.uint8)),
    }
    config = {**LLAMA, "model_type": "new", "quantization_config": {"quant_method": "mxfp4"}}
    root = write_checkpoint(tmp_path, tensors, config=config)
    with pytest.raises(BadCheckpoint, match=r"experts.x: whether experts of model_type 'new' are stored transposed"):
        split(root)


@pytest.mark.parametrize(
    ("part", "raw", "message"),
    [
        ("scales", None, r"down_proj: it is quantized, but .*down_proj_scales is missing"),
        ("blocks", None, r"down_proj: it is quantized, but .*down_proj_blocks is missing"),
        ("scales", Raw("U8", np.ones((2, 32, 3), np.uint8)), r"_scales: expected U8/F8_E8M0 \[2, 32, 2\] "),
        ("blocks", Raw("U8", np.ones((2, 32, 2, 8), np.uint8)), r"_blocks: expected U8 \[experts, rows, groups, 16\]"),
    ],
)  # fmt: skip
def test_mxfp4_that_is_not_whole_is_refused(part: str, raw: Raw | None, message: str, tmp_path: Path) -> None:
    root, tensors = mxfp4(tmp_path)
    tensors[f"{GPT_OSS}down_proj_{part}"] = raw  # type: ignore[assignment]
    import json

    config = json.loads((root / "config.json").read_text())
    broken = {n: t for n, t in tensors.items() if t is not None}
    with pytest.raises(BadCheckpoint, match=message):
        split(write_checkpoint(tmp_path / "broken", broken, config=config))


def test_an_unknown_stack_stays_whole_and_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {**llama_tensors(), name: weights(np.ones((2, 64, 64), np.float32), "BF16")}
    root = write_checkpoint(tmp_path, tensors, config={**LLAMA, "model_type": "new"})
    found = tensors_of(open_checkpoint(root), decode=True, split=True)
    assert {r.name: r.role for r in found.tensors}[name] == "expert"
    assert any("1 stack of experts stays whole and unquantized, " + name in note for note in found.notes)


def test_a_stack_whose_shape_does_not_tell_is_cut_as_the_other_of_its_layer(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    tensors = {
        **llama_tensors(),
        f"{experts}.gate_up_proj": weights(np.ones((2, 64, 64), np.float32), "BF16"),
        f"{experts}.down_proj": weights(np.ones((2, 64, 32), np.float32), "BF16"),
    }
    root = write_checkpoint(tmp_path, tensors, config={**LLAMA, "model_type": "new"})
    found = {r.name: r.shape for r in tensors_of(open_checkpoint(root), decode=True, split=True).tensors}
    assert found[f"{experts}.1.up_proj.weight"] == (32, 64)
    assert found[f"{experts}.1.down_proj.weight"] == (64, 32)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_stack_whose_shape_does_not_tell_is_as_the_other_of_its_layer(is_transposed: bool, tmp_path: Path) -> None:
    """Experts as large as the model: only the stack of gate and up tells inputs from outputs."""
    shapes = {"gate_up_proj": (4, 64, 128) if is_transposed else (4, 128, 64), "down_proj": (4, 64, 64)}
    tensors = {
        f"model.layers.0.mlp.experts.{name}": weights(np.arange(np.prod(shape)).reshape(shape) % 251, "F32")
        for name, shape in shapes.items()
    }
    write_checkpoint(tmp_path, tensors, config={"model_type": "qwen3_vl_moe", "hidden_size": 64})
    found = split(tmp_path)
    down = found["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert down.window is not None
    assert down.window.stride == ((1, 64) if is_transposed else (64, 1))
    assert {name.rpartition("experts.")[2] for name in found} == {
        f"{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up", "down")
    }
