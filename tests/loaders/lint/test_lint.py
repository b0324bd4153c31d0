"""Will the engine load it? Nothing to say of our own outputs; of broken ones, what the engine would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.making import LLAMA, llama_tensors, write_checkpoint, write_moe


@pytest.fixture
def output(source: Path, tmp_path: Path, weightmill: Any) -> Path:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "format=json")
    assert ran.document["lint"] == []
    return tmp_path / "out"


def findings(weightmill: Any, folder: Path) -> list[dict[str, str]]:
    ran = weightmill("lint", f"output.path={folder}", "format=json")
    assert ran.status == (1 if ran.document["faults"] else 0)
    assert ran.document["faults"] == sum(found["level"] == "fault" for found in ran.document["findings"])
    found: list[dict[str, str]] = ran.document["findings"]
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def skip(names: list[str]) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].update(llm_int8_skip_modules=names)


@pytest.mark.quick
def test_our_own_outputs_have_none(output: Path, source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert findings(weightmill, output) == []
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'b'}", "quant=ternary").status == 0
    assert findings(weightmill, tmp_path / "b") == []
    assert "no findings" in weightmill("lint", f"output.path={output}").out


@pytest.mark.parametrize("has", [False, True])
def test_sizes_that_stop_bitsandbytes_on_some_cpus_are_doubted(
    has: bool, tmp_path: Path, source: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.lint.transformers.has_avx512_bf16", lambda: has)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant.group_size=128")
    assert ran.status == 0, ran.err
    [found] = findings(weightmill, tmp_path / "out")
    assert (found["level"], found["engine"]) == ("warning", "bitsandbytes on a CPU with AVX512-BF16")
    assert found["what"].startswith("12 layers with a number of rows that is no multiple of 32, or of columns that")
    assert ("so on this machine" in found["happens"]) == has


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (skip([]), "1 linear layer is stored plain and not in llm_int8_skip_modules: lm_head"),
        (skip(["lm_head", "up_proj"]), "2 quantized layers are skipped by llm_int8_skip_modules"),
        (skip("lm_head"), "list of texts as quantization_config.llm_int8_skip_modules"),  # type: ignore[arg-type]
        (skip(["lm_head", "(a+)+b"]), "'(a+)+b' could take very long"),
        (lambda config: config.pop("model_type"), "config.json has no model_type"),
        (lambda config: config.update(model_type="", _class_name="XModel"), "it is a part of a pipeline of diffusers"),
        (lambda config: config.update(auto_map={"AutoModel": "modeling_x.Y"}), "not there: modeling_x.py"),
        (lambda config: config.update(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens"),
        (lambda config: config["quantization_config"].update(quant_method="magic"), "quantized by magic"),
        (lambda config: config.pop("quantization_config"), "config.json has no quantization_config"),
    ],
)
def test_a_config_that_misleads_the_engine(change: Any, what: str, output: Path, weightmill: Any) -> None:
    edit(output / "config.json", change)
    assert any(what in found["what"] for found in findings(weightmill, output)), findings(weightmill, output)


def test_files_that_are_missing_or_do_not_agree(tmp_path: Path, weightmill: Any) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    (folder / "tokenizer.json").unlink()
    assert ["there is no tokenizer" in found["what"] for found in findings(weightmill, folder)] == [True]
    edit(folder / "model.safetensors.index.json", lambda index: index.update(metadata={"total_size": 3}))
    assert any("total_size 3" in found["what"] for found in findings(weightmill, folder))
    (folder / "model.safetensors.index.json").unlink()
    assert any("no index" in found["what"] for found in findings(weightmill, folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    [found] = findings(weightmill, folder)
    assert "1 of 2 shards" in found["what"]


def test_a_head_that_is_missing(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "m", tensors)
    edit(
        folder / "config.json",
        lambda config: config.update(architectures=["LlamaForCausalLM"], tie_word_embeddings=False),
    )
    assert any("no lm_head.weight" in found["what"] for found in findings(weightmill, folder))


def test_experts_quantized_one_by_one(tmp_path: Path, weightmill: Any) -> None:
    folder = write_moe(tmp_path / "m")
    rules = "rules=[{role: expert, action: quantize}]"
    ran = weightmill("run", f"model.path={folder}", f"output.path={tmp_path / 'out'}", rules, "format=json")
    assert any("quantized one by one" in found["what"] for found in ran.document["lint"])


@pytest.mark.parametrize(
    ("quant", "change", "what"),
    [
        ("w8a8", lambda c: c["quantization_config"].update(ignore=[]), "stored plain and not in ignore: lm_head"),
        (
            "w8a8",
            lambda c: c["quantization_config"]["ignore"].append("re:.*up_proj"),
            "2 quantized layers are in ignore",
        ),
        (
            "w8a8",
            lambda c: c["quantization_config"].update(ignore="lm_head"),
            "list of texts as quantization_config.ignore",
        ),
        ("w8a8", lambda c: c["quantization_config"]["ignore"].append("re:(a+)+b"), "'(a+)+b' could take very long"),
        ("w8a8", lambda c: c["quantization_config"]["ignore"].append("re:(a"), "'(a' is no regular expression"),
        ("mlx_int4", lambda c: c.pop("quantization"), "has quantization_config and no quantization"),
        ("mlx_int4", lambda c: c.pop("tie_word_embeddings"), "does not say tie_word_embeddings"),
        (
            "mlx_int4",
            lambda c: c.update(rope_parameters={"rope_theta": 2 * c.pop("rope_theta", 1e4)}),
            "rope_theta stands",
        ),
        (
            "mlx_int4",
            lambda c: c["quantization"].update({"model.norm": {"bits": 8, "group_size": 64}}),
            "1 module that is",
        ),
    ],
)
def test_other_engines(quant: str, change: Any, what: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'o'}", f"quant={quant}", "format=json")
    assert ran.document["lint"] == [], ran.err
    edit(tmp_path / "o" / "config.json", change)
    found = findings(weightmill, tmp_path / "o")
    assert any(what in finding["what"] for finding in found), found


def test_a_group_of_two_schemes_does_not_load_in_vllm(source: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "rules=[{action: keep, name: k_proj}]"
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "quant=w8a8", rules, "format=json")
    [finding] = ran.document["lint"]
    assert "2 fused groups have parts of different schemes" in finding["what"]
    assert finding["engine"] == "vLLM"


def test_names_that_training_gave_are_a_fault(tmp_path: Path, weightmill: Any) -> None:
    root = write_checkpoint(tmp_path / "m", {f"_orig_mod.{name}": raw for name, raw in llama_tensors().items()})
    assert any("names from training, such as '_orig_mod." in each["what"] for each in findings(weightmill, root))


def test_layers_beyond_the_configs_are_a_fault(tmp_path: Path, weightmill: Any) -> None:
    config = {**LLAMA, "dtype": "bfloat16"}
    root = write_checkpoint(tmp_path / "m", llama_tensors(layers=3), config=config)
    assert any("config.json says 2 layers, but 9 tensors" in each["what"] for each in findings(weightmill, root))
