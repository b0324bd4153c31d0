"""GGUF as a job's output and source: names, types by rules, copies, what is refused in the plan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers import gguf
from loaders.places import DEMO
from tests.making import llama_tensors, make_source, read_safetensors, values_of, weights
from tests.reading import files_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


def arguments(model: Path, out: Path) -> list[str]:
    return [f"model.path={model}", f"output.path={out}", "unit_mb=0.02", "quant=gguf_q8_0"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("where", ["header", "tensor", "last"])
def test_one_flipped_bit_fails_verification(
    where: str, split: bool, model: Path, tmp_path: Path, weightmill: Any
) -> None:
    out = tmp_path / "out"
    assert weightmill("run", *arguments(model, out), f"output.split={split}".lower()).status == 0
    assert weightmill("verify", f"output.path={out}").status == 0
    files = sorted(out.glob("*.gguf"))
    file = files[0] if where == "header" else files[-1]
    specs = gguf.read_specs(files_of(out), files[-1].name)
    offset = {"header": 200, "tensor": specs[0].offset + 5, "last": specs[-1].offset + specs[-1].size - 1}[where]
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    assert weightmill("verify", f"output.path={out}").status != 0


def test_a_source_that_moved_is_still_the_source(model: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", *arguments(model, tmp_path / "out")).status == 0
    shutil.move(model, tmp_path / "elsewhere")
    moved = f"model.path={tmp_path / 'elsewhere'}"
    assert weightmill("verify", f"output.path={tmp_path / 'out'}", moved).status == 0


@pytest.mark.parametrize("kind", ["gguf_q8_0", "gguf_bf16"])
def test_a_gguf_is_a_source_as_any_other(kind: str, model: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", *arguments(model, tmp_path / "gguf"), f"quant={kind}").status == 0
    back = ["quant=none", "quant.dtype=bfloat16", f"output.path={tmp_path / 'back'}"]
    assert weightmill("run", f"model.path={tmp_path / 'gguf'}", *back).status == 0
    assert weightmill("verify", f"output.path={tmp_path / 'back'}").status == 0
    before, after = read_safetensors(model), read_safetensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, raw in before.items():
        if kind == "gguf_bf16":
            assert np.array_equal(raw.data, after[name].data), name
        assert np.allclose(values_of(raw), values_of(after[name]), atol=2e-3), name
    nf4 = weightmill("run", f"model.path={tmp_path / 'gguf'}", "quant=nf4", f"output.path={tmp_path / 'nf4'}")
    assert nf4.status == 0, nf4.err


def test_rules_give_some_tensors_another_type(model: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "rules=[{name: v_proj, action: quantize, quant: {type: F16}}, {role: head, action: keep}]"
    assert weightmill("run", *arguments(model, tmp_path / "out"), rules).status == 0
    types = {s.name: s.dtype.name for s in gguf.read_specs(files_of(tmp_path / "out"), "model-Q8_0.gguf")}
    assert types["blk.0.attn_v.weight"] == "F16"
    assert types["output.weight"] == "BF16"
    assert types["blk.0.attn_k.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def with_extra(name: str, shape: tuple[int, ...] = (4, 64)) -> Any:
    return {**llama_tensors(), name: weights(np.ones(shape, np.float32), "BF16")}


REFUSALS: dict[str, tuple[dict[str, Any], Any, list[str], str]] = {
    "an unknown architecture": ({"model_type": "mamba"}, None, [], "knows no architecture for model_type 'mamba'"),
    "a tensor without a place": ({}, with_extra("model.vision.weight"), [], "no place for 1 tensor .*vision"),
    "another activation": ({"hidden_act": "gelu"}, None, [], "computes llama with silu, not with gelu"),
    "another rope": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, None, [],
        "rope scaling 'longrope' is not converted",
    ),
    "a size that is missing": ({"rms_norm_eps": None}, None, [], "expected rms_norm_eps"),
    "heads that do not divide": ({"num_attention_heads": 5}, None, [], "do not divide into 5 heads"),
    "a foreign quant": ({}, None, ["quant=nf4", "output=gguf"], "GGUF holds ggml's types, not bnb4"),
    "blocks in safetensors": ({}, None, ["output=hf"], "Q8_0, which safetensors cannot hold; use gguf"),
    "a type that rows do not divide into": (
        {}, None, ["rules=[{name: q_proj, action: quantize, quant: {type: Q4_K}}]"],
        "rows of 64 weights do not divide into Q4_K's blocks of 256",
    ),
    "split elsewhere": ({}, None, ["quant=nf4", "output.split=true"], "only gguf can be one file or several"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_what_cannot_be_done_is_refused_in_the_plan(name: str, tmp_path: Path, weightmill: Any) -> None:
    config, tensors, settings, message = REFUSALS[name]
    model = make_source(tmp_path / "model", tensors, **config)
    ran = weightmill("plan", *arguments(model, tmp_path / "out"), *settings)
    assert ran.status != 0
    assert re.search(message, " ".join(ran.err.split())), ran.err


def test_a_tokenizer_that_cannot_be_told_is_refused(model: Path, tmp_path: Path, weightmill: Any) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    ran = weightmill("plan", *arguments(model, tmp_path / "out"))
    assert "its model is WordLevel" in ran.err
    (model / "tokenizer.json").unlink()
    ran = weightmill("plan", *arguments(model, tmp_path / "out"))
    assert "has no tokenizer.json" in ran.err


def _with_token(model: Path, text: str) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"][text] = document["model"]["vocab"].pop(next(reversed(document["model"]["vocab"])))
    path.write_text(json.dumps(document))


def _with_merge(model: Path, text: str) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] += [[text, "a"]]
    path.write_text(json.dumps(document))


def _with_added(model: Path, text: str) -> None:
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"][0]["content"] = text
    path.write_text(json.dumps(document))


def _with_template(model: Path, text: str) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))


def _with_card(model: Path, text: str) -> None:
    (model / "README.md").write_text(f"---\nlicense: {json.dumps(text)}\n---\n")


HALVES = {
    "token": (_with_token, "tokenizer.json"),
    "merge": (_with_merge, "tokenizer.json"),
    "added": (_with_added, "tokenizer.json"),
    "template": (_with_template, "the chat template"),
    "card": (_with_card, "README.md"),
}


@pytest.mark.parametrize("half", [0xD800, 0xDCFF], ids=hex)
@pytest.mark.parametrize("where", HALVES)
def test_half_a_character_is_refused_in_the_plan(where: str, half: int, tmp_path: Path, weightmill: Any) -> None:
    """JSON can name it, and UTF-8 cannot hold it."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    put, file = HALVES[where]
    put(model, f"x{chr(half)}y")
    ran = weightmill("plan", f"model.path={model}", "quant=gguf_q8_0")
    assert ran.status == 1
    assert file in ran.err
    assert "half of a character" in " ".join(ran.err.split())


def test_blocks_are_quantized_again_and_the_plan_says_so(model: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", *arguments(model, tmp_path / "q8")).status == 0
    again = [f"model.path={tmp_path / 'q8'}", "quant=gguf_q4_0", f"output.path={tmp_path / 'q4'}"]
    assert "tensors are quantized already in the source (Q8_0) and quantized again" in weightmill("plan", *again).out
    assert weightmill("run", *again).status == 0
    assert weightmill("verify", f"output.path={tmp_path / 'q4'}").status == 0
    plain = [f"model.path={tmp_path / 'q8'}", "quant=none", "quant.dtype=float32", f"output.path={tmp_path / 'f32'}"]
    assert weightmill("run", *plain, "output=gguf").status == 0
    # as if from what the blocks decode to
    direct = [f"model.path={tmp_path / 'f32'}", "quant=gguf_q4_0", f"output.path={tmp_path / 'direct'}"]
    assert weightmill("run", *direct).status == 0
    [one], [other] = (sorted((tmp_path / name).glob("*.gguf")) for name in ("q4", "direct"))
    assert one.read_bytes() == other.read_bytes()


def test_a_copy_of_a_gguf_is_the_same_file(model: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", *arguments(model, tmp_path / "q8")).status == 0
    copy = [f"model.path={tmp_path / 'q8'}", "quant=none", "output=gguf", f"output.path={tmp_path / 'copy'}"]
    assert weightmill("run", *copy).status == 0
    [one], [other] = (sorted((tmp_path / name).glob("*.gguf")) for name in ("q8", "copy"))
    assert one.read_bytes() == other.read_bytes()


def test_a_chosen_mix_is_named_after_its_most_common_type(weightmill: Any, tmp_path: Path) -> None:
    given = ("quant=auto", "quant.engine=gguf", "quant.target_bits=5.2")
    ran = weightmill("run", f"output.root={tmp_path}", f"output.path={tmp_path / 'out'}", *given)
    assert ran.status == 0, ran.err
    [file] = (tmp_path / "out").glob("*.gguf")
    assert re.fullmatch(r"demo-Q\d_K(_M)?\.gguf", file.name)


def test_a_gguf_from_a_gguf_has_roles(tmp_path: Path, weightmill: Any) -> None:
    q8 = tmp_path / "q8"
    assert weightmill("run", "quant=gguf_q8_0", f"output.path={q8}").status == 0
    asked = (f"model.path={q8}", "quant=gguf_q4_0", f"output.path={tmp_path / 'q4'}", "format=json")
    found = {row["name"]: row["role"] for row in weightmill("plan", *asked).document["tensors"]}
    wanted = {"token_embd": "embedding", "blk.0.attn_q": "attention", "blk.0.ffn_up": "mlp", "blk.0.attn_norm": "norm"}
    assert {name: found[f"{name}.weight"] for name in wanted} == wanted
