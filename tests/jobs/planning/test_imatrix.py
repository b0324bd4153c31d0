"""Jobs by an importance matrix: what a plan says of it, what is refused, and what the output records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers import gguf
from loaders.places import DEMO
from tests.imatrices import Sums, write_gguf
from tests.making import LLAMA, Raw, llama_tensors, write_checkpoint
from tests.reading import files_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a GGUF of floats."""
    from jobs.cli.main import main

    out = tmp_path_factory.mktemp("plain") / "out"
    assert main(["run", "quant=gguf_bf16", f"output.path={out}", "tracking=none"]) == 0
    return out


def sums(plain: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    [path] = plain.glob("*.gguf")
    rng, found = np.random.default_rng(0), {}
    for spec in gguf.read_specs(files_of(plain), path.name):
        if len(spec.shape) == 2 and spec.name != "token_embd.weight":
            found[spec.name] = rng.lognormal(size=(1, spec.shape[1])).astype("f4"), np.full(1, 512, "f4")
    return found


def without(found: Sums, *names: str) -> Sums:
    return {name: each for name, each in found.items() if name not in names}


def moe(folder: Path) -> Path:
    """A Qwen3-MoE of two experts, with the demo's tokenizer."""
    tensors = llama_tensors()
    layers = {name.split(".")[2] for name in tensors if ".mlp." in name}
    for layer in layers:
        at = f"model.layers.{layer}.mlp"
        for part in ("gate", "up", "down"):
            matrix = tensors.pop(f"{at}.{part}_proj.weight")
            tensors |= {f"{at}.experts.{expert}.{part}_proj.weight": matrix for expert in range(2)}
        tensors[f"{at}.gate.weight"] = Raw(
            "BF16", tensors[f"model.layers.{layer}.input_layernorm.weight"].data[None].repeat(2, 0)
        )
        for head in "qk":
            width = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
            tensors[f"model.layers.{layer}.self_attn.{head}_norm.weight"] = Raw("BF16", np.ones(width, np.uint16))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = Raw("BF16", np.resize(tensors[name].data, (1024, 64)))
    config = {
        **LLAMA,
        "vocab_size": 1024,
        "model_type": "qwen3_moe",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "dtype": "bfloat16",
    }
    write_checkpoint(folder, tensors, config=config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def warnings_of(weightmill: Any, *settings: str) -> list[str]:
    ran = weightmill("plan", "format=json", *settings)
    assert ran.status == 0, ran.err
    return [each for each in ran.document["warnings"] if "m.gguf" in each]


def test_what_is_missing_is_named_by_cause(plain: Path, weightmill: Any, tmp_path: Path) -> None:
    found = sums(plain)
    names = [name for name in sorted(found) if name.startswith("blk.0.")]
    other = {"token_embd.weight": (np.ones((1, 7), "f4"), np.ones(1, "f4")), "v.blk.0.attn_q.weight": found[names[0]]}
    write_gguf(tmp_path / "m.gguf", {**without(found, *names), **other})
    said = warnings_of(weightmill, "quant=gguf_q4_k_m", f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert said == [
        f"m.gguf has nothing for {', '.join(names[:4])} and {len(names) - 4} more: quantized without importances, as"
        " llama-quantize does",
        "m.gguf: token_embd.weight has another size there: quantized without importances",
        "m.gguf has importances for v.blk.0.attn_q.weight, which are not quantized here",
    ]


def test_experts_that_saw_nothing_are_counted(weightmill: Any, tmp_path: Path) -> None:
    folder = moe(tmp_path / "moe")
    ran = weightmill("run", f"model.path={folder}", "quant=gguf_bf16", f"output.path={tmp_path / 'plain'}")
    assert ran.status == 0, ran.err
    found = sums(tmp_path / "plain")
    [path] = (tmp_path / "plain").glob("*.gguf")
    for spec in gguf.read_specs(files_of(path.parent), path.name):
        if len(spec.shape) == 3:
            found[spec.name] = np.ones((2, spec.shape[2]), "f4"), np.array([5, 0], "f4")
    write_gguf(tmp_path / "m.gguf", found)
    said = warnings_of(weightmill, f"model.path={folder}", "quant=gguf_q4_0", f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert any("no token went through 6 experts of blk.0.ffn_down_exps.weight (1 of 2), " in each for each in said), (
        said
    )


def test_the_matrix_of_another_model_is_refused(plain: Path, weightmill: Any, tmp_path: Path) -> None:
    one = next(iter(sums(plain).values()))
    write_gguf(tmp_path / "m.gguf", {"encoder.blk.0.attn_q.weight": one})
    ran = weightmill("plan", "quant=gguf_q4_k_m", f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert ran.status == 2
    assert "quant.imatrix: m.gguf has none of this model's tensors: it has encoder.blk.0.attn_q.weight, and" in ran.err
    wrong = {"blk.0.attn_q.weight": (np.ones((1, 4096), "f4"), np.ones(1, "f4"))}
    write_gguf(tmp_path / "m.gguf", wrong)
    ran = weightmill("plan", "quant=gguf_q4_k_m", f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert ran.status == 2
    assert "m.gguf: blk.0.attn_q.weight has 4096 numbers; the model's has" in ran.err
    assert "is this the importance matrix of another model?" in " ".join(ran.err.split())


def test_a_mix_that_needs_importances_is_refused_without(plain: Path, weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill("plan", "quant=gguf_q2_k_s")
    assert ran.status == 2
    assert "quant.imatrix: blk.0." in ran.err
    assert "would be Q2_K, which llama.cpp makes by an importance matrix alone; give the file that" in ran.err
    write_gguf(tmp_path / "m.gguf", without(sums(plain), "blk.1.ffn_up.weight"))
    ran = weightmill("plan", "quant=gguf_q2_k_s", f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert ran.status == 2
    assert "quant.imatrix: blk.1.ffn_up.weight would be Q2_K" in ran.err
    assert "m.gguf has none for them" in " ".join(ran.err.split())
    write_gguf(tmp_path / "m.gguf", sums(plain))
    assert weightmill("plan", "quant=gguf_q2_k_s", f"quant.imatrix={tmp_path / 'm.gguf'}").status == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("rules=[{action: quantize, role: mlp, quant: {imatrix: m.gguf}}]",),
            "one importance matrix is for all tensors",
        ),
        (("quant.imatrix=gone.gguf",), "gone.gguf is not there; give the file of an importance matrix"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: tuple[str, ...], said: str, plain: Path, weightmill: Any, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", sums(plain))
    ran = weightmill("plan", "quant=gguf_q4_k_m", f"quant.imatrix={tmp_path / 'm.gguf'}", *settings)
    assert ran.status == 2
    assert said in " ".join(ran.err.split())


def test_the_output_says_by_which_matrix_it_was_made(plain: Path, weightmill: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", sums(plain))
    out, moved = tmp_path / "out", tmp_path / "moved"
    asked = "quant=gguf_q4_0", f"output.path={out}"
    ran = weightmill("run", *asked, f"quant.imatrix={tmp_path / 'm.gguf'}")
    assert ran.status == 0, ran.err
    report = json.loads((out / "weightmill.json").read_text())
    found = report["imatrix"]
    assert (found["entries"], found["chunks"], found["datasets"]) == (len(sums(plain)), 7, ["made-up"])
    assert f"the importance matrix `m.gguf` ({found['entries']} tensors" in (out / "README.md").read_text()
    [path] = out.glob("*.gguf")
    metadata = gguf.plain(gguf.read_metadata(files_of(out), path.name))
    assert metadata["quantize.imatrix.file"] == "m.gguf"
    # The same numbers from elsewhere are the same work; other numbers are not.
    assert weightmill("verify", f"output.path={out}").status == 0
    assert (
        "done already: the same request made it from the same source"
        in weightmill("run", *asked, f"quant.imatrix={tmp_path / 'm.gguf'}").out
    )
    moved.mkdir()
    changed = {name: (values * 2, counts) for name, (values, counts) in sums(plain).items()}
    shutil.move(tmp_path / "m.gguf", moved / "m.gguf")
    write_gguf(tmp_path / "m.gguf", changed)
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 2
    assert "m.gguf is not the one by which the output was quantized: expected xxh3-128" in " ".join(ran.err.split())
