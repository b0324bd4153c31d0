"""SentencePiece vocabularies in GGUF, held against gguf-py's, sentencepiece's and llama.cpp's own."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.containers import gguf
from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata
from loaders.places import ROOT
from tests.llama_log import load_model
from tests.making import LLAMA, llama_tensors, tokenizer, weights, write_checkpoint
from tests.reading import files_of

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.engine

ROWS = 420
TEXTS = (
    "The file's 12345 bytes  are\n\nread, aren't they?", " Grüße, 世界! é", "a", "", "x = f(1)\n    return x", "   ",
    "quantized blocks of weights", "</s> after <s>",
)  # fmt: skip


def trained(**options: Any) -> bytes:
    """A tokenizer.model of 400 pieces, as Llama 2's was made."""
    lines = [line for line in (ROOT / "loaders" / "specs.py").read_text().splitlines() if line.strip()]
    model = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "split_digits": True, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, character_coverage=0.99, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        **settings,
    )  # fmt: skip
    return model.getvalue()


def checkpoint(folder: Path) -> Path:
    tensors = llama_tensors(tied=True)
    tensors["model.embed_tokens.weight"] = weights(np.zeros((ROWS, 64), np.float32), "BF16")
    write_checkpoint(folder, tensors, config={**LLAMA, "dtype": "bfloat16", "tie_word_embeddings": True,
                                              "vocab_size": ROWS})  # fmt: skip
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tokenizer as SentencePiece's file, as both files (with added tokens), and as tokenizer.json alone."""
    root = tmp_path_factory.mktemp("sentencepiece")
    found = {kind: checkpoint(root / kind) for kind in ("model", "both", "json", "old", "prepend")}
    (found["model"] / "tokenizer.model").write_bytes(trained())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "add_eos_token": False}  # fmt: skip
    (found["model"] / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(found["model"])
    tokenizer.add_tokens(["<|x|>", "over there"])
    for kind in ("both", "json"):
        tokenizer.save_pretrained(found[kind])
    shutil.copy(found["json"] / "tokenizer_config.json", found["prepend"])
    older = json.loads((found["json"] / "tokenizer.json").read_text())  # as Llama 2 is published
    older["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    (found["prepend"] / "tokenizer.json").write_text(json.dumps({**older, "pre_tokenizer": None}))
    shutil.copy(found["model"] / "tokenizer.model", found["both"])
    shutil.copy(found["model"] / "tokenizer.model", found["old"])
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "401": {"content": "over▁there", "special": False},
        "999": {"content": "beyond", "special": True},
    }
    (found["old"] / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))
    (found["old"] / "added_tokens.json").write_text('{"over there": 401, "and here": 402, "beyond": 999}')
    return found


@pytest.fixture
def made(sources: dict[str, Path], weightmill: Any, tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        ran = weightmill("run", f"model.path={sources[kind]}", f"output.path={tmp_path / 'out'}", "quant=gguf_q8_0")
        assert ran.status == 0, ran.err
        [file] = (tmp_path / "out").glob("*.gguf")
        return file

    return make


def metadata_of(path: Path) -> dict[str, Any]:
    return gguf.plain(gguf.read_metadata(files_of(path.parent), path.name))


@pytest.mark.parametrize("kind", ["model", "both", "old"])
def test_a_tokenizer_model_is_told_as_gguf_py_and_sentencepiece_tell_it(
    kind: str, sources: dict[str, Path], made: Any
) -> None:
    vocab = pytest.importorskip("gguf.vocab")
    found = metadata_of(made(kind))
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert len(tokens) == len(scores) == len(types) == ROWS
    folder = sources["model"]  # gguf-py refuses added tokens that leave a gap
    theirs = list(vocab.SentencePieceVocab(folder).all_tokens())
    assert len(theirs) == 400
    for number, (text, score, kind_of) in enumerate(theirs):
        if kind == "old" and number < 2:
            assert (types[number], scores[number]) == (3, -1000.0)
            continue
        assert (tokens[number].encode(), np.float32(scores[number]), types[number]) == (
            text,
            np.float32(score),
            kind_of,
        )
    added = {"model": {}, "both": {400: ("<|x|>", 3), 401: ("over there", 4)},
             "old": {401: ("over there", 4), 402: ("and here", 4)}}[kind]  # fmt: skip
    for number in range(400, ROWS):
        text, kind_of = added.get(number, (f"[PAD{number}]", 5))
        assert (tokens[number], types[number]) == (text, kind_of)
        assert scores[number] == (-1000.0 if number in added else -10000.0)
    special = vocab.SpecialVocab(folder, n_vocab=ROWS)
    assert special.add_special_token == {"bos": True, "eos": False}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found.get("tokenizer.ggml.add_eos_token", False) is False  # llama.cpp's default, told where a file says it
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
    # Without tokenizer.json the converter does not tell it; it is llama.cpp's default.
    assert found.get("tokenizer.ggml.unknown_token_id") == (0 if kind == "both" else None)


def test_a_tokenizer_json_alone_gives_the_same_vocabulary(sources: dict[str, Path], made: Any, tmp_path: Path) -> None:
    vocab = pytest.importorskip("gguf.vocab")
    found = metadata_of(made("json"))
    theirs = list(vocab.LlamaHfVocab(sources["json"]).all_tokens())
    assert list(found["tokenizer.ggml.tokens"][:402]) == [text.decode() for text, _, _ in theirs]
    types = [int(kind) for _, _, kind in theirs]
    types[400] = 3  # <|x|>: a control token to the converter's other ways, by its looks
    assert list(found["tokenizer.ggml.token_type"][:402]) == types
    # unlike there, scores are those of SentencePiece itself
    own = [score for _, score, _ in vocab.SentencePieceVocab(sources["model"]).all_tokens()]
    assert list(found["tokenizer.ggml.scores"][:400]) == [0.0 if score == 0 else score for score in own]


@pytest.mark.parametrize("kind", ["model", "both", "json", "prepend"])
def test_llama_cpp_cuts_text_as_transformers_does(kind: str, sources: dict[str, Path], made: Any) -> None:
    model = load_model(made(kind), vocab_only=True)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sources["model"] / "tokenizer.model"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(sources["prepend"] / "tokenizer.json"))
    if kind != "prepend":
        tokenizer = transformers.AutoTokenizer.from_pretrained(sources[kind])
    for text in TEXTS:
        found = model.tokenize(text.encode(), special=True)
        if "<s>" not in text and text:
            assert found == [1, *own.encode(text)], text
        # Metaspace, unlike SentencePiece, puts no space before one, and none after a special token
        if kind == "prepend" or not (text.startswith(" ") or "<s>" in text):
            assert found == tokenizer(text).input_ids, text
    model.close()


def test_what_llama_cpp_would_cut_otherwise_is_refused(
    sources: dict[str, Path], weightmill: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(sources["model"], tmp_path / "m")
    arguments = ["plan", f"model.path={folder}", f"output.path={tmp_path / 'o'}", "quant=gguf_q8_0"]
    (folder / "tokenizer.model").write_bytes(trained(model_type="unigram", vocab_size=360))
    assert "its model_type is 1" in " ".join(weightmill(*arguments).err.split())
    (folder / "tokenizer.model").write_bytes(trained(vocab_size=430))
    assert "it has 430 tokens, but the embedding has 420 rows" in " ".join(weightmill(*arguments).err.split())
    (folder / "tokenizer.model").write_bytes(trained()[:-7])
    assert "not a model of SentencePiece, or damaged" in " ".join(weightmill(*arguments).err.split())


def to_gguf_and_back(weightmill: Any, source: Path, tmp_path: Path) -> Path:
    """To GGUF and back to a checkpoint of transformers."""
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'gguf'}", "quant=gguf_bf16")
    assert ran.status == 0, ran.err
    arguments = [f"model.path={tmp_path / 'gguf'}", f"output.path={tmp_path / 'back'}", "quant=none"]
    ran = weightmill("run", *arguments, "quant.dtype=bfloat16", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["lint"] == []
    return tmp_path / "back"


@pytest.mark.parametrize("kind", ["prepend", "both", "demo"])
def test_a_tokenizer_comes_back_from_a_gguf(
    kind: str, sources: dict[str, Path], weightmill: Any, tmp_path: Path
) -> None:
    source = ROOT / "jobs" / "demo" if kind == "demo" else sources[kind]
    folder = to_gguf_and_back(weightmill, source, tmp_path)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (folder, source))
    [file] = (tmp_path / "gguf").glob("*.gguf")
    peer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if kind == "prepend":
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    for text in (*TEXTS, "<|eos|> of"):
        found = ours(text).input_ids
        assert ours.decode(found) == theirs.decode(found)
        if kind == "both" and (text.startswith(" ") or "<" in text):
            continue  # where LlamaTokenizer and SentencePiece differ
        assert found == theirs(text).input_ids, text
        if kind != "prepend" and "<" not in text:
            assert found == peer(text).input_ids, text
    assert (ours.bos_token, ours.eos_token) == (peer.bos_token, peer.eos_token)
    # and again
    ran = weightmill("run", f"model.path={folder}", f"output.path={tmp_path / 'again'}", "quant=gguf_bf16")
    assert ran.status == 0, ran.err
    [again] = (tmp_path / "again").glob("*.gguf")
    one, other = metadata_of(again), metadata_of(file)
    rounded = {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}  # of added tokens they may differ
    told = {key for key in one if key.startswith("tokenizer.") and key not in rounded}
    assert {key: one[key] for key in told} == {key: other[key] for key in told}
    if kind != "demo":
        assert normal_scores(one) == normal_scores(other)


def normal_scores(metadata: dict[str, Any]) -> list[float]:
    """Of the tokens that merges make."""
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    return [score for score, kind in zip(scores, types, strict=True) if kind == 1]


def added(*tokens: tuple[int, str, bool]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {str(number): {"content": text, "special": special, **flags} for number, text, special in tokens}


BOS = added((39, "<|bos|>", True))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"added_tokens_decoder": BOS | added((40, "<|tool|>", True))}, {}),
        ({"added_tokens_decoder": BOS | added((90, "<b>", False), (60, "<a>", False))}, {"<z>": 40}),
        ({"added_tokens_decoder": BOS | added((41, "t3", False))}, {}),
        ({"pad_token": "<pad>", "extra_special_tokens": ["<|x|>"], "mask_token": "<mask>"}, {"<z>": 41, "<y>": 40}),
        ({"extra_special_tokens": {"image_token": "<|image|>"}, "eos_token": "<|eos|>"}, {}),
    ],
)
def test_tokens_that_other_files_add_have_the_ids_of_transformers(
    settings: dict[str, Any], numbers: dict[str, int], tmp_path: Path
) -> None:
    """An added token takes the next free id, whatever the file says; one that has no row is left out."""
    made = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", **settings}
    own = {**tokenizer(40), "added_tokens": [{"id": 39, **BOS["39"]}]}
    own["model"]["vocab"] = {f"t{number}": number for number in range(39)}
    own["pre_tokenizer"]["trim_offsets"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(made))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if numbers:
        (tmp_path / "added_tokens.json").write_text(json.dumps(numbers))
    by_id = {n: text for text, n in transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab().items()}
    for rows in (64, max(40, max(by_id))):
        tokens = list(tokenizer_metadata(files_of(tmp_path), {}, rows)[0]["tokenizer.ggml.tokens"].value)
        assert tokens == [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
