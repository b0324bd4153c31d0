"""Will llama.cpp load it? Nothing to say of our own GGUFs; of broken ones, what it would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from loaders.specs import StoredSpec, StoredTensor, WeightSpec
from tests.making import make_source
from tests.reading import files_of

Metadata = dict[str, gguf.MetadataValue]
Change = Callable[[Metadata, dict[str, WeightSpec]], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("lint")}


@pytest.fixture
def honest(made: dict[str, Path], weightmill: Any) -> Path:
    if "file" not in made:
        source = make_source(made["folder"] / "model")
        ran = weightmill("run", f"model.path={source}", f"output.path={made['folder'] / 'out'}", "quant=gguf_q8_0",
                         "format=json")  # fmt: skip
        assert ran.document["lint"] == []
        [made["file"]] = (made["folder"] / "out").glob("*.gguf")
    return made["file"]


def changed(file: Path, folder: Path, change: Change) -> Path:
    """A GGUF with other metadata or tensors, whose data do not matter."""
    metadata = gguf.read_metadata(files_of(file.parent), file.name)
    specs = {spec.name: spec for spec in gguf.read_specs(files_of(file.parent), file.name)}
    change(metadata, specs)
    tensors = [StoredTensor(name, StoredSpec(spec.dtype, spec.shape)) for name, spec in specs.items()]
    made = gguf.with_head(gguf.lay_out(file.name, tensors), metadata)
    folder.mkdir()
    (folder / file.name).write_bytes(bytes(made.about) + bytes(made.data_bytes))
    return folder


def set_(key: str, entry: gguf.MetadataValue) -> Change:
    return lambda metadata, specs: metadata.update({key: entry})


def without(*names: str) -> Change:
    return lambda metadata, specs: [(metadata if name in metadata else specs).pop(name) for name in names]


def renamed(name: str, other: str) -> Change:
    return lambda metadata, specs: specs.update({other: specs.pop(name)})


# what is wrong -> what is said; True where llama.cpp fails to load it
CASES: dict[str, tuple[Change, str, bool]] = {
    "no architecture": (without("general.architecture"), "no general.architecture", True),
    "a size": (without("llama.context_length"), "lacks llama.context_length", True),
    "a default": (without("llama.rope.freq_base"), "does not say llama.rope.freq_base", False),
    "no tokenizer": (without("tokenizer.ggml.model"), "no tokenizer.ggml.model", True),
    "no tokens": (without("tokenizer.ggml.tokens"), "no tokenizer.ggml.tokens", True),
    "fewer tokens": (
        set_("tokenizer.ggml.tokens", gguf.texts([f"t{i}" for i in range(90)])),
        "has 90 tokens, token_embd.weight 96 rows", True,
    ),
    "types of others": (set_("tokenizer.ggml.token_type", gguf.int32s([1, 1])), "token_type has 2 entries", False),
    "no merges": (without("tokenizer.ggml.merges"), "no tokenizer.ggml.merges", True),
    "no way to cut": (without("tokenizer.ggml.pre"), "tokenizer.ggml.pre is missing", False),
    "an id of no token": (set_("tokenizer.ggml.bos_token_id", gguf.uint32(700)), "ids of no token", False),
    "no embedding": (without("token_embd.weight"), "not there: token_embd.weight", True),
    "no last norm": (without("output_norm.weight"), "not there: output_norm.weight", True),
    "half a block": (without("blk.1.ffn_up.weight"), "1 tensor is not there: blk.1.ffn_up.weight", True),
    "more blocks": (set_("llama.block_count", gguf.uint32(3)), "9 tensors are not there: blk.2.attn_norm", True),
    "fewer blocks": (set_("llama.block_count", gguf.uint32(1)), "block_count is 1, but there are", True),
    "a stranger": (renamed("blk.1.ffn_up.weight", "blk.1.ffn_sideways.weight"), "1 tensor that llama does not", True),
    "other heads": (set_("llama.attention.head_count_kv", gguf.uint32(4)), "other shapes than the metadata says", True),
    "another architecture": (set_("general.architecture", gguf.text("lama")), "lama is not known here", True),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_llama_cpp_would_stumble_over(name: str, honest: Path, tmp_path: Path, weightmill: Any) -> None:
    change, what, fails = CASES[name]
    ran = weightmill("lint", f"output.path={changed(honest, tmp_path / 'm', change)}", "format=json")
    mine = [found for found in ran.document["findings"] if what in found["what"]]
    assert mine, ran.document
    assert mine[0]["engine"] == "llama.cpp"
    if name != "a stranger":
        assert (ran.document["faults"] > 0) == (fails or mine[0]["level"] == "fault") or name == "another architecture"


def moe(metadata: Metadata, specs: dict[str, WeightSpec]) -> None:
    """Make it an ERNIE 4.5 with a stack of experts."""
    for key in [key for key in metadata if key.startswith("llama.")]:
        metadata[key.replace("llama.", "ernie4_5-moe.")] = metadata.pop(key)
    stack = replace(specs["blk.0.ffn_up.weight"], name="blk.0.ffn_up_exps.weight", shape=(4, 32, 64))
    specs |= {stack.name: stack}
    metadata |= {"general.architecture": gguf.text("ernie4_5-moe"), "ernie4_5-moe.expert_count": gguf.uint32(4),
                 "ernie4_5-moe.expert_used_count": gguf.uint32(2)}  # fmt: skip


ERNIE = "ernie4_5-moe"
OTHERS: dict[str, tuple[Change, str]] = {
    "a stranger": (renamed("blk.1.ffn_up.weight", "blk.1.ssm_a"), f"1 tensor that {ERNIE} does not have: blk.1.ssm_a"),
    "other experts": (set_(f"{ERNIE}.expert_count", gguf.uint32(8)), "1 stacks of experts are not of expert_count 8"),
    "more blocks": (set_(f"{ERNIE}.block_count", gguf.uint32(3)), "1 blocks are not there: blk.2"),
    "fewer blocks": (set_(f"{ERNIE}.block_count", gguf.uint32(1)), "block_count is 1, but there are"),
    "no number of experts": (without(f"{ERNIE}.expert_used_count"), f"lacks {ERNIE}.expert_used_count"),
    "no last norm": (without("output_norm.weight"), "not there: output_norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["", *sorted(OTHERS)])
def test_an_architecture_that_is_not_read_is_checked_by_its_names(
    name: str, honest: Path, tmp_path: Path, weightmill: Any
) -> None:
    change, what = OTHERS.get(name, (lambda metadata, specs: None, ""))

    def both(metadata: Metadata, specs: dict[str, WeightSpec]) -> None:
        moe(metadata, specs)
        change(metadata, specs)

    ran = weightmill("lint", f"output.path={changed(honest, tmp_path / 'm', both)}", "format=json")
    said = [found["what"] for found in ran.document["findings"] if found["engine"] == "llama.cpp"]
    assert any(what in each for each in said) if name else said == []


@pytest.mark.engine
def test_llama_cpp_fails_where_it_is_said_to(honest: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")

    def loads(folder: Path) -> bool:
        [file] = folder.glob("*.gguf")
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if model:
            llama_cpp.llama_model_free(model)
        return bool(model)

    assert loads(changed(honest, tmp_path / "honest", lambda metadata, specs: None))
    for name, (change, _, fails) in CASES.items():
        if name != "types of others":  # which it reads beyond
            assert loads(changed(honest, tmp_path / name, change)) != fails, name


def test_a_shard_that_is_missing_is_a_finding(honest: Path, tmp_path: Path, weightmill: Any) -> None:
    folder = changed(honest, tmp_path / "m", lambda metadata, specs: metadata.update(gguf.split_metadata(0, 2, 30)))
    [file] = folder.glob("*.gguf")
    file.rename(folder / "m-00001-of-00002.gguf")
    ran = weightmill("lint", f"output.path={folder}", "format=json")
    assert any("1 of 2 shards" in found["what"] for found in ran.document["findings"])
