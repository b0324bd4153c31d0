"""Names of pre-tokenizers, tried on real vocabularies: python -m tests.pre_tokenizers [--write] [--more FOLDER]

llama.cpp's source distribution (see tests/converter.py) brings 13 real vocabularies of BPE and one of WordPiece. From
each a tokenizer of the `tokenizers` library is made; the ids that it makes of llama.cpp's own test texts (*.inp) are
those of *.out, and the hash that llama.cpp's converter takes has the name that is expected. `--more` is a folder with a
NAME/tokenizer.json for each further tokenizer, and where it comes from in NAME/source.txt. `--write` keeps what a test
needs in tests/goldens/pre_tokenizers.json, of each vocabulary the tokens and merges that the converter's text can use,
and writes docs/gguf_pre_tokenizers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loaders.containers import gguf
from loaders.layouts.gguf.tokenizers import check_text, pre_tokenizers, tokenizer_files
from loaders.layouts.gguf.tokenizers.byte_letters import byte_letters
from loaders.layouts.gguf.tokenizers.vocabularies import bert_words, wordpiece_name
from loaders.places import ROOT
from tests.gguf_goldens import GOLDENS
from tests.reading import files_of

GOLDEN = GOLDENS.parent / "pre_tokenizers.json"
UNNAMED = {"aquila": "gpt-2", "gpt-neox": "gpt-2"}  # vocabularies without a name: the way in which they cut text
# names that the converter's later lines replace, for the same tokenizer under another name
REPLACED = {"mpt": "olmo", "gpt-neox": "olmo", "bert-bge": "jina-v2-en"}
TABLE = "docs/gguf_pre_tokenizers.md"
HEAD = """# Names of pre-tokenizers in a GGUF

llama.cpp knows by name how a byte-level BPE cuts text into words (`tokenizer.ggml.pre`). The way is read from
tokenizer.json and looked up in `loaders/layouts/gguf/tokenizers/pre_tokenizers.yaml`; of several names for one way,
llama.cpp's converter's hash of the tokenizer decides, and else its special tokens. A tokenizer whose way is none of
these is refused.

*Run* means that a real vocabulary gets the name here (`python -m tests.pre_tokenizers`); *table* that the name is taken
from llama.cpp's table of hashes and its regular expressions, and no vocabulary was at hand to run it.

| Name | Way of | How known |
|---|---|---|
"""
BREAK = "\n__ggml_vocab_test__\n"


def vocabularies(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the name, tokenizer.json's document and the metadata of each vocabulary that has a way of cutting text."""
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        metadata = gguf.plain(gguf.read_metadata(files_of(path.parent), path.name))
        name = path.stem.removeprefix("ggml-vocab-")
        if metadata["tokenizer.ggml.model"] == "gpt2":
            pre = metadata.get("tokenizer.ggml.pre", UNNAMED.get(name))
            told = {"tokenizer.ggml.add_bos_token": pre in pre_tokenizers.ADDS_BOS} | metadata
            document = tokenizer_files.tokenizer_of({**told, "tokenizer.ggml.pre": pre})
            assert document is not None, name
            yield name, document, metadata
        elif metadata["tokenizer.ggml.model"] == "bert":
            yield name, wordpiece(metadata), metadata


def wordpiece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return BERT's tokenizer.json: what begins a word loses ▁, what continues one gets ##."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    texts = [
        token if kind == 3 else token[1:] if token.startswith("▁") else f"##{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    special = {n: {"id": n, "content": texts[n], "special": True, "single_word": False, "lstrip": False,
                   "rstrip": False, "normalized": False} for n, kind in enumerate(types) if kind == 3}  # fmt: skip
    ends = [metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("cls", "seperator")]
    return {
        "version": "1.0", "added_tokens": list(special.values()),
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "cls": [texts[ends[0]], ends[0]],
                           "sep": [texts[ends[1]], ends[1]]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {text: n for n, text in enumerate(texts)}},
    }  # fmt: skip


def texts_of(path: Path) -> list[tuple[str, list[int]]]:
    """Return llama.cpp's test texts with the ids that are expected; none for a vocabulary without."""
    inputs, outputs = (path.with_name(path.name + suffix) for suffix in (".inp", ".out"))
    if not inputs.exists():
        return []
    texts = inputs.read_text(encoding="utf-8").split(BREAK)
    wanted = [[int(number) for number in line.split()] for line in outputs.read_text().splitlines()]
    return list(zip(texts, wanted, strict=False))


def different(document: Mapping[str, Any], texts: Sequence[tuple[str, list[int]]]) -> list[str]:
    """Return the texts of which the `tokenizers` library makes other ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps({"truncation": None, "padding": None, "decoder": None, **document}))
    return [text for text, wanted in texts if tokenizer.encode(text, add_special_tokens=False).ids != wanted]


def name_of(document: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the name by the hash alone; empty if the converter knows none."""
    if document["model"]["type"] == "WordPiece":
        return wordpiece_name(document, settings).replace("default", "")
    return check_text.name_by_hash(document, settings, pre_tokenizers.steps_of(document)) or ""


def reduced(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json with the tokens and merges alone that the converter's text can use."""
    model = document["model"]
    if model["type"] == "WordPiece":
        words = {f"##{word}" for word in bert_words(check_text.TEXT, document["normalizer"])}
    else:
        found = check_text.words(check_text.TEXT, pre_tokenizers.steps_of(document))
        words = {"".join(byte_letters()[byte] for byte in word.encode()) for word in found}
    parts = {word[at:end] for word in words for at in range(len(word)) for end in range(at + 1, len(word) + 1)}
    parts |= {f"##{part}" for part in parts} | {"[UNK]"}
    vocabulary = {token: number for token, number in model["vocab"].items() if token in parts}
    kept = {"type": model["type"], "vocab": vocabulary}
    if "merges" in model:
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        kept |= {
            "merges": [" ".join(pair) for pair in pairs if "".join(pair) in parts],
            "ignore_merges": bool(model.get("ignore_merges")),
        }
    used = {*json.dumps(document.get("post_processor"), ensure_ascii=False).split('"')}
    added = [
        {"id": each["id"], "content": each["content"]}
        for each in document["added_tokens"]
        if each["content"] in check_text.TEXT or each["content"] in used
    ]
    rest = {key: document.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    return {"added_tokens": added, **rest, "model": kept}


def table_of(goldens: Mapping[str, Any]) -> str:
    """Return the documented table of names."""
    run: dict[str, list[str]] = {}
    for golden in goldens.values():
        run.setdefault(golden["name"], []).append(golden["source"])
    same = tokenizer_files.SAME
    told = {*pre_tokenizers.known_names(), *run, *same} - {"llama3", "llama-v3", "glm5", "llada-moe"}
    rows = []
    for name in sorted(told):
        form = pre_tokenizers.form_named(same.get(name, name))
        way = form.names[-1]["name"] if form is not None else "WordPiece, of which the name does not matter"
        rows.append(f"| {name} | {way} | {'run: ' + '; '.join(run[name]) if name in run else 'table'} |\n")
    refused = sorted({*check_text.hashes().values()} - told)
    return (
        HEAD + "".join(rows) + "\nOther names of the converter, which are given only if the hash is known and the "
        f"way is one of these: {', '.join(refused)}.\n"
    )


def main(arguments: Sequence[str]) -> int:
    from tests.converter import fetched

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--more", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    chosen = parser.parse_args(arguments)
    folder = (chosen.llama_cpp or fetched()) / "models"
    goldens: dict[str, Any] = {} if not GOLDEN.exists() else json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, document, metadata in vocabularies(folder):
        settings = {"bos_token": "", "add_bos_token": False}
        found, texts = name_of(document, settings), texts_of(folder / f"ggml-vocab-{name}.gguf")
        wrong = different(document, texts)
        print(
            f"{name:16} hash {found or '-':14} {len(texts) - len(wrong)} of {len(texts)} texts", *map(repr, wrong[:2])
        )
        if found and name != "qwen35":  # Qwen 2's vocabulary, whose hash is another name's
            expected = metadata.get("tokenizer.ggml.pre", name)
            assert found == REPLACED.get(expected, expected), f"{name}: expected {expected}, found {found}"
            goldens[name] = {"name": found, "source": f"ggml-vocab-{name}.gguf", "tokenizer": reduced(document)}
    for path in sorted(chosen.more.glob("*/tokenizer.json")) if chosen.more else ():
        document = json.loads(path.read_text(encoding="utf-8"))
        told = path.with_name("tokenizer_config.json")
        settings = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
        settings = {key: settings[key] for key in ("bos_token", "add_bos_token") if key in settings}
        found = name_of(document, settings)
        print(f"{path.parent.name:16} hash {found or '-'}")
        if found:
            source = path.with_name("source.txt").read_text().strip()
            small = reduced(document)
            if settings.get("add_bos_token"):
                small["added_tokens"] += [
                    {"id": each["id"], "content": each["content"]}
                    for each in document["added_tokens"]
                    if each["content"] == check_text.content_of(settings.get("bos_token"))
                ]
            goldens[path.parent.name] = {"name": found, "source": source, "settings": settings, "tokenizer": small}
    if chosen.write:
        rows = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(goldens[name], ensure_ascii=False)}" for name in sorted(goldens)
        )
        GOLDEN.write_text(f"{{{rows}}}\n", encoding="utf-8")
        (ROOT / TABLE).write_text(table_of(goldens), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
