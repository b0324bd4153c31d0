"""What a model says beside its weights, from transformers' files to a GGUF and back: nothing is lost in silence."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.generation import (
    end_metadata,
    end_tokens,
    generation_file,
    left_out,
    sampling_metadata,
)
from loaders.layouts.gguf.tokenizers.chat_templates import template_metadata, template_setting, templates_of
from loaders.layouts.gguf.tokenizers.pre_tokenizers import form_named
from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata
from tests.making import make_source
from tests.reading import files_of

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [2, 1, 3]}


def read(folder: Path) -> tuple[dict[str, gguf.MetadataValue], dict[str, tuple[str, bytes]]]:
    [file] = folder.glob("*.gguf")
    data, specs = file.read_bytes(), gguf.read_specs(files_of(folder), file.name)
    tensors = {s.name: (s.dtype.name, data[s.offset : s.offset + s.size]) for s in specs}
    return gguf.read_metadata(files_of(folder), file.name), tensors


@pytest.mark.parametrize("config", [
    {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    {"rope_scaling": YARN, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    {"model_type": "mistral", "sliding_window": 16},
], ids=["llama3", "yarn", "linear", "window"])  # fmt: skip
def test_a_gguf_comes_back_the_same(config: dict[str, Any], tmp_path: Path, weightmill: Any) -> None:
    model = make_source(tmp_path / "model", eos_token_id=[2, 1, 3], **config)
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    steps = (("model", "gguf", ["quant=gguf_bf16"]), ("gguf", "hf", ["quant=none", "quant.dtype=bfloat16"]),
             ("hf", "again", ["quant=gguf_bf16"]))  # fmt: skip
    for source, out, settings in steps:
        # Without cards, whose tags would be metadata of the next GGUF.
        given = (f"model.path={tmp_path / source}", f"output.path={tmp_path / out}", "output.card=false", *settings)
        ran = weightmill("run", *given)
        assert ran.status == 0, ran.err
    (metadata, tensors), (again, tensors_again) = read(tmp_path / "gguf"), read(tmp_path / "again")
    names = ("tokenizer.chat_template.tool_use", "general.sampling.top_k", "tokenizer.ggml.eom_token_id")
    assert all(name in metadata for name in names)
    for each in (metadata, again):
        del each["general.name"]
    assert metadata == again
    assert tensors == tensors_again
    assert ("rope_freqs.weight" in tensors) == (config.get("rope_scaling") == LLAMA3)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation.items() >= GENERATION.items()


def test_the_plan_names_what_a_gguf_has_no_place_for(tmp_path: Path, weightmill: Any) -> None:
    model = make_source(tmp_path / "model", rope_scaling={**YARN, "beta_fast": 16.0}, rope_theta=1e6)
    (model / "generation_config.json").write_text('{"max_new_tokens": 9, "eos_token_id": [1, 2, 3, 4]}')
    ran = weightmill("plan", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=gguf_bf16")
    said = " ".join(ran.out.split())
    assert "give it --yarn-beta-fast 16" in said
    assert "no place for generation_config.json's max_new_tokens=9" in said
    assert "eos_token_id 4: a GGUF holds three" in said


@pytest.mark.parametrize(("model_type", "rope", "message"), [
    ("qwen2", LLAMA3, "llama.cpp's qwen2 loads no rope_freqs.weight"),
    ("llama", {**YARN, "truncate": False}, "truncate is false here"),
])  # fmt: skip
def test_a_scaling_that_llama_cpp_does_not_compute_is_refused(
    model_type: str, rope: dict[str, Any], message: str, tmp_path: Path, weightmill: Any
) -> None:
    model = make_source(tmp_path / "model", rope_scaling=rope, model_type=model_type)
    ran = weightmill("plan", f"model.path={model}", f"output.path={tmp_path / 'out'}", "quant=gguf_bf16")
    assert ran.status != 0
    assert message in " ".join(ran.err.split())


def test_llama_cpp_is_told_the_factor_by_which_yarn_differs_from_the_usual(tmp_path: Path, weightmill: Any) -> None:
    model = make_source(tmp_path / "model", rope_scaling=YARN)
    assert weightmill("run", f"model.path={model}", f"output.path={tmp_path / 'o'}", "quant=gguf_bf16").status == 0
    found = read(tmp_path / "o")[0]
    assert found["llama.rope.scaling.yarn_attn_factor"].value == pytest.approx(1.3)
    assert found["llama.rope.scaling.attn_factor"].value == pytest.approx(1.3 / 1.1386294)  # 1 + 0.1 ln 4


def tekken(**more: Any) -> dict[str, Any]:
    """A tekken.json of two special tokens, the 256 bytes, and "th", "the", "he"."""
    words = [bytes([n]) for n in range(256)] + [b"th", b"the", b"he", b"beyond"]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(word).decode()} for n, word in enumerate(words)]
    form = form_named("tekken")
    assert form is not None
    [pattern] = form.steps
    config = {"pattern": pattern, "default_vocab_size": 261, "default_num_special_tokens": 2}
    specials = [{"rank": 1, "token_str": "<s>", "is_control": True}]
    return {"config": config, "vocab": vocab, "special_tokens": specials, **more}


def test_mistrals_own_file_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    found = gguf.plain(tokenizer_metadata(files_of(tmp_path), {}, 261)[0])
    assert found["tokenizer.ggml.tokens"][:2] == ("<SPECIAL_0>", "<s>")
    assert found["tokenizer.ggml.tokens"][258:] == ("th", "the", "he")
    assert found["tokenizer.ggml.token_type"][:3] == (3, 3, 1)
    assert found["tokenizer.ggml.merges"] == ("t h", "t he", "th e", "h e")
    assert (found["tokenizer.ggml.pre"], found["tokenizer.ggml.bos_token_id"]) == ("tekken", 1)
    assert found["tokenizer.ggml.add_bos_token"] is True
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(vocab=[{"rank": "x"}])))
    with pytest.raises(BadCheckpoint, match=r"tekken.json: not as mistral-common writes it"):
        tokenizer_metadata(files_of(tmp_path), {}, 261)


def test_tiktokens_file_is_told_from_sentencepieces(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(BadCheckpoint, match=r"but tiktoken's, .* fetch the model's tokenizer.json"):
        tokenizer_metadata(files_of(tmp_path), {}, 2)


def test_named_templates_have_keys_of_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
    templates = templates_of(files_of(tmp_path), {"chat_template": named})
    assert templates == {"default": "d", "tool use": "t"}
    found = gguf.plain(template_metadata(templates))
    assert found == {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ("tool_use",),
    }
    back = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    assert template_setting(found) == back
    assert template_setting({"tokenizer.chat_template": "d"}) == "d"
    with pytest.raises(BadSpec, match="two have the name a_b"):
        template_metadata({"a b": "1", "a-b": "2"})


def test_a_template_of_its_own_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    assert templates_of(files_of(tmp_path), {}) == {"default": "older"}
    assert templates_of(files_of(tmp_path), {"chat_template": "setting"}) == {"default": "setting"}
    (tmp_path / "chat_template.jinja").write_text("own")
    assert templates_of(files_of(tmp_path), {"chat_template": "setting"}) == {"default": "own"}


def test_sampling_goes_both_ways() -> None:
    made = gguf.plain(sampling_metadata({**GENERATION, "repetition_penalty": 1.1, "min_p": "none"}))
    assert set(made) == {f"general.sampling.{key}" for key in ("temp", "top_k", "top_p", "penalty_repeat")}
    back = generation_file(made, {"eos_token_id": [2, 1, 3]})
    assert back == {**GENERATION, "repetition_penalty": 1.1}
    greedy = gguf.plain(sampling_metadata({"do_sample": False, "temperature": 0.6}))
    assert generation_file(greedy, {}) == {"do_sample": False}


def test_tokens_that_end_a_text_take_the_places_that_are_free() -> None:
    tokens = gguf.texts(["a", "b", "<|eom_id|>", "c", "d"])
    made = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": gguf.uint32(1)}
    assert end_tokens({}, {"eos_token_id": 4}) == [4]
    ends = end_tokens({"eos_token_id": [1, 2, 3, 0]}, {"eos_token_id": 4})
    assert ends == [1, 2, 3, 0]
    found = end_metadata(made, ends)
    assert {key.split(".")[2]: value.value for key, value in found.items()} == {"eom_token_id": 2, "eot_token_id": 3}
    assert left_out({"num_beams": 4, "use_cache": True}, ends, made | found) == [
        "eos_token_id 0: a GGUF holds three (eos, eot, eom)",
        "generation_config.json's num_beams=4",
    ]
