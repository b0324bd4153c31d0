"""Checkpoints and files of rules with odd names, types and values: one sentence for each, before anything is done."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers.gguf_types import check_metadata
from loaders.containers.pytorch_unpickle import Refused, unpickle
from loaders.containers.safetensors import _spec
from loaders.errors import BadCheckpoint
from tests.making import weights, write_checkpoint

pytestmark = pytest.mark.quick


def test_a_tensor_called_as_the_key_of_metadata_is_refused_in_the_plan(tmp_path: Path, weightmill: Any) -> None:
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"__metadata__": torch.ones(2, 2), "a": torch.ones(2)}, source / "pytorch_model.bin")
    (source / "config.json").write_text('{"model_type": "odd"}')
    ran = weightmill("plan", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none", "lint=warn")
    assert ran.status == 2
    assert "a tensor is called __metadata__" in ran.err


def test_a_parameter_of_the_whole_model_is_refused_by_hqq(tmp_path: Path, weightmill: Any) -> None:
    tensors = {
        "logit_scale": weights(np.ones(1, np.float32), "BF16"),
        "m.weight": weights(np.ones((64, 64), np.float32), "BF16"),
    }
    source = write_checkpoint(tmp_path / "source", tensors)
    ran = weightmill("plan", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=hqq4", "lint=warn")
    assert ran.status == 2
    assert "logit_scale is a parameter of the whole model" in ran.err


@pytest.mark.parametrize("quant", ["none", "mlx_int4"])
def test_a_tensor_without_numbers_is_a_job_like_another(quant: str, tmp_path: Path, weightmill: Any) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": weights(np.ones((0, 5), np.float32), "F32")})
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={tmp_path / 'out'}", f"quant={quant}", "lint=warn", "tracking=none"
    )
    assert ran.status in (0, 2), ran.err
    assert "Traceback" not in ran.err


CONFIGS = {
    "model_type": ["llama"], "num_hidden_layers": "1", "architectures": True, "torch_dtype": [1], "hidden_size": 1e400,
    "rms_norm_eps": 1e308,
    "tie_word_embeddings": "no", "layer_types": [1], "text_config": 5, "quantization_config": {"config_groups": "x"},
    "rope_theta": {"a": 1}, "vocab_size": 1 << 70, "eos_token_id": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_a_value_of_another_type_in_config_json_is_named(key: str, source: Path, weightmill: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: CONFIGS[key]}))
    ran = weightmill("inspect", f"model.path={source}")
    assert ran.status == 1
    assert "config.json: expected" in ran.err
    assert key in ran.err


METADATA = {
    "tokenizer.ggml.tokens": 5, "tokenizer.ggml.merges": (1, 2), "tokenizer.ggml.scores": "x",
    "tokenizer.ggml.token_type": (1.5,), "tokenizer.ggml.bos_token_id": (1,), "llama.block_count": (1,),
    "llama.attention.head_count": "x", "llama.rope.freq_base": "x", "llama.rope.scaling.type": 1,
    "tokenizer.ggml.model": 5, "llama.context_length": 1 << 60,
}  # fmt: skip


@pytest.mark.parametrize("key", METADATA)
def test_a_value_of_another_type_in_a_gguf_is_named(key: str) -> None:
    good = {"general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count": (1, 2)}
    check_metadata(good)
    with pytest.raises(BadCheckpoint, match=f"expected .* as '{key}'"):
        check_metadata(good | {key: METADATA[key]})


@pytest.mark.parametrize(
    "text", ["- &a [*a]\n", "[" * 3000 + "]" * 3000, "- &a [1,1,1,1]\n- &b [*a,*a,*a,*a]\n" * 3000]
)
def test_rules_without_end_are_refused(text: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    ran = weightmill("plan", f"model.path={source}", f"rules={tmp_path / 'rules.yaml'}")
    assert ran.status == 2
    assert "rules: cannot read" in ran.err


def test_an_output_that_is_a_link_to_itself_is_refused(source: Path, tmp_path: Path, weightmill: Any) -> None:
    (tmp_path / "loop").symlink_to("loop")
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'loop'}", "tracking=none")
    assert ran.status in (1, 2)
    assert "loop" in ran.err
    assert "Traceback" not in ran.err


def test_a_config_that_links_out_of_the_folder_is_not_read(source: Path, tmp_path: Path, weightmill: Any) -> None:
    (tmp_path / "secret").write_text('{"model_type": "secret"}')
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "secret")
    ran = weightmill("inspect", f"model.path={source}")
    assert ran.status == 1
    assert "outside the checkpoint" in ran.err


def test_a_long_token_makes_no_merges() -> None:
    from loaders.layouts.gguf.tokenizers.tokenizer_files import NORMAL, _merges

    tokens = {"a": 0, "aa": 1, "a" * 400_000: 2}
    assert _merges(tokens, [NORMAL] * 3, [0.0] * 3) == [("a", "a")]


PICKLES = {
    "a frame, which Python reads at once": b"\x80\x04\x95" + struct.pack("<Q", (2 << 20) + 1) + b"]" * (2 << 20) + b".",
    "keys of one hash": b"\x80\x02}(\x8a\x0a" + ((1 << 61) - 1).to_bytes(10, "little") + b"Nu.",
    "places in the memo of one hash": b"\x80\x02]p" + str((1 << 61) - 1).encode() + b"\n.",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_chooses_neither_time_nor_memory(name: str) -> None:
    with pytest.raises(ValueError, match="more operations than|a key that is 23058|a place in its memo"):
        unpickle(io.BytesIO(PICKLES[name]), len(PICKLES[name]), 1 << 18)


def test_a_pickle_in_frames_is_read() -> None:
    made = pickle.dumps({"a": [1] * 1000, 7: "b" * 100_000}, protocol=4)
    assert unpickle(io.BytesIO(made), len(made), 1 << 18) == {"a": [1] * 1000, 7: "b" * 100_000}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_python_reads_them(protocol: int) -> None:
    rows = [{"é": 1.5, 2: "x\ny\u2028"}, [], (1, 2, 3), (1,), (), None, True, False, b"raw", "t" * 300]
    given = [*rows, 255, 65_536, -1, 1 << 40, -(1 << 2000), float("inf"), (1, (2, [3])), rows[0], ["a"] * 3]
    made = pickle.dumps(given, protocol)
    if protocol > 2:
        found = unpickle(io.BytesIO(made), len(made), 1 << 18)
        assert (found, found[0] is found[17]) == (given, True)
    else:  # which have no bytes, and write them as a call
        with pytest.raises(Refused, match="_codecs.encode"):
            unpickle(io.BytesIO(made), len(made), 1 << 18)
        del given[8]
        made = pickle.dumps(given, protocol)
        assert unpickle(io.BytesIO(made), len(made), 1 << 18) == given


ODD = (
    b"Na.", b"}]a.", b"(N(Ne.", b"]K\x00Ns.", b"](K\x00Nu.", b"}(N1u.", b"}K\x00b.", b"(NK\x00d", b"0.", b"\x85.",
    b"N\x86.", b"h\x00.", b"\xff.", b"K", b"", b"N", b"\x80\x06N.", b"Pa\n.", b"ca\nb\n.", b"\x8e" + b"\xff" * 8,
)  # fmt: skip


@pytest.mark.parametrize("made", ODD)
def test_an_operation_on_what_it_is_not_for_is_refused(made: bytes) -> None:
    """Some of these Python's machine would try: to append to whatever has an `append`, and the like."""
    with pytest.raises((ValueError, IndexError, KeyError, Refused)):
        unpickle(io.BytesIO(made), len(made), 1 << 18)


def test_offsets_of_another_type_are_named() -> None:
    with pytest.raises(BadCheckpoint, match="expected two whole numbers as its data_offsets, found '0' and '1'"):
        _spec("a", {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0, "1": 4}}, "a.safetensors", 8, 4)


def test_heads_of_a_layer_each_are_recommended_for(source: Path, weightmill: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": [16, 8], "num_key_value_heads": [2]}))
    ran = weightmill("recommend", f"model.path={source}")
    assert ran.status == 0, ran.err


def test_experts_that_only_the_config_counts_are_refused(tmp_path: Path, weightmill: Any) -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    source = write_checkpoint(tmp_path / "source", {name: weights(np.ones((1, 1), np.float32), "BF16")})
    (source / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 10**9}))
    ran = weightmill("plan", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=mlx_int4", "lint=warn")
    assert ran.status == 2
    assert "stacks 1000000000 experts, of which 1 are to be written" in ran.err
