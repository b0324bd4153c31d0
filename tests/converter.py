"""What llama.cpp's own converter makes of each tiny model (tests/tiny_models.py), kept as goldens in tests/goldens/gguf.

    python -m tests.converter                    every type, and the vocabularies that come with llama.cpp
    python -m tests.converter --only qwen3 ...   these types
    python -m tests.converter --check            write nothing; print differences, and exit with 1 if there are any
    python -m tests.converter --llama-cpp FOLDER an unpacked llama.cpp, instead of the pinned one

The converter is that of the pinned llama-cpp-python's source distribution, which brings llama.cpp with its own gguf-py.
It is fetched once (76 MB) and unpacked into the user's cache. Each conversion runs in a process of its own, which has the
distribution's gguf-py first on its path.

One thing is not the converter's: it knows a tokenizer's pre-tokenizer by a hash of what the published tokenizer makes of
a text, and a tiny one has no known hash. So `get_vocab_base_pre` is replaced by a function that returns the name of
tests/tiny_configs.py. The hashes are tried on real vocabularies instead: see tests/pre_tokenizers.py.

A golden holds for the transformers version of goldens/gguf/index.json, whose config classes the converter asks for what
config.json leaves out. The index has, too, the types on which the converter itself fails, with its words. Where it fails
on what the class of the installed transformers makes of a config.json, it is run again on the file as it lies, which it
does by itself under the transformers that it pins (4.57, which has no such class); the index says of which.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.gguf_goldens import GOLDENS, differences, dump, golden_path, summary
from tests.tiny_configs import TINY

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
WANTED = ("conversion/", "convert_hf_to_gguf.py", "gguf-py/", "models/ggml-vocab-")
INDEX = GOLDENS / "index.json"


# --- the pinned distribution


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "weightmill" / f"llama-cpp-python-{VERSION}"


def fetched() -> Path:
    """Return the folder of the pinned llama.cpp, which is fetched and unpacked where it is not there yet."""
    folder = cache_folder()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        # pip runs a distribution's build to learn its metadata, so its plain file is asked for by `download` alone.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                   "--no-build-isolation", "--dest", work, f"llama-cpp-python=={VERSION}"]  # fmt: skip
        subprocess.run(command, check=True)
        unpack(Path(work) / f"llama_cpp_python-{VERSION}.tar.gz", Path(work) / "llama.cpp")
        (Path(work) / "llama.cpp").rename(folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack what is needed of the distribution."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive.name}: expected sha256 {SHA256}, found {found}; the pinned file has changed")
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.removeprefix(INSIDE)
            if member.name.startswith(INSIDE) and member.isfile() and inner.startswith(WANTED):
                member.name = inner
                tar.extract(member, folder, filter="data")


# --- one conversion


def convert(root: Path, model: Path, out: Path, pre: str, *, reads_raw: bool = False) -> None:
    """Run the converter in this process, which should be a new one: its classes keep state."""
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    import conversion.base
    import convert_hf_to_gguf
    import gguf

    assert Path(gguf.__file__).is_relative_to(root), f"another gguf-py was imported first: {gguf.__file__}"
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    if reads_raw:

        class Nothing:
            @staticmethod
            def from_pretrained(*_: Any, **__: Any) -> None:
                raise ValueError("no class is asked")

        conversion.base.AutoConfig = Nothing
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(out), "--outtype", "bf16"]
    convert_hf_to_gguf.main()


def _converted(connection: Any, root: Path, kind: str, work: Path, reads_raw: bool) -> None:
    """Make a tiny model, convert it, and send ("done", summary) or ("failed", why)."""
    logging.disable(logging.WARNING)
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # progress bars
    try:
        model = work / kind
        if not (model / "config.json").exists():
            tiny_models.make(kind, model)
        convert(root, model, work / f"{kind}.gguf", TINY[kind].pre, reads_raw=reads_raw)
        connection.send(("done", summary(work / f"{kind}.gguf")))
    except SystemExit:
        connection.send(("failed", "; ".join(said) or "it exits without a word"))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        connection.send(("failed", f"{type(error).__name__}: {error} ({Path(place.filename).name}, {place.name})"))


def converted(root: Path, kind: str, work: Path, *, reads_raw: bool = False) -> tuple[str, Any]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_converted, args=(there, root, kind, work, reads_raw))
    process.start()
    there.close()
    try:
        found: tuple[str, Any] = here.recv()
    except EOFError:
        found = ("failed", "its process died")
    process.join()
    return found


# --- goldens


def goldens(root: Path, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return summaries by type, the reasons of those that fail, and the types whose config.json is read raw."""
    import torch  # noqa: F401  imported before the forks, which then need not
    import transformers  # noqa: F401

    made, failed, raw = {}, {}, []
    with tempfile.TemporaryDirectory() as work:
        for kind in kinds:
            status, found = converted(root, kind, Path(work))
            if status == "failed":
                again, second = converted(root, kind, Path(work), reads_raw=True)
                if again == "done":
                    status, found = again, second
                    raw.append(kind)
            print(f"{kind:20} {len(found['tensors'])} tensors" if status == "done" else f"{kind:20} fails: {found}")
            (made if status == "done" else failed)[kind] = found
    return made, failed, raw


def index_of(kinds: Sequence[str], failed: dict[str, str], raw: Sequence[str]) -> dict[str, Any]:
    """Return the index, in which the types that were not asked for stay as they are."""
    import transformers

    old = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    kept = {kind: why for kind, why in old.get("failed", {}).items() if kind not in kinds and kind in TINY}
    known = [kind for kind in old.get("raw", {}) if kind not in kinds and kind in TINY]
    return {
        "made by": {"llama-cpp-python": VERSION, "transformers": transformers.__version__},
        "failed": dict(sorted({**kept, **failed}.items())),
        "raw": dict.fromkeys(sorted({*known, *raw}), "the converter fails on the class's config, and takes the file's"),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TINY), metavar="TYPE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--llama-cpp", type=Path)
    chosen = parser.parse_args(arguments)
    root, kinds = (chosen.llama_cpp or fetched()).resolve(), chosen.only or list(TINY)
    made, failed, raw = goldens(root, kinds)
    index = index_of(kinds, failed, raw)
    if not chosen.check:
        GOLDENS.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            golden_path(kind).unlink(missing_ok=True)
        for kind, found in made.items():
            golden_path(kind).write_text(dump(found))
        INDEX.write_text(dump(index))
        return 0
    lines = [f"index {key}: expected {old}, found {new}" for key, old, new in _changes(index)]
    for kind, found in made.items():
        old = json.loads(golden_path(kind).read_text()) if golden_path(kind).exists() else {"metadata": {}, "tensors": {}}
        lines += [f"{kind}: {line}" for line in differences(old, found)]
    print("\n".join(lines) or "as the goldens")
    return 1 if lines else 0


def _changes(index: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    old = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    return [(key, old.get(key), value) for key, value in index.items() if old.get(key) != value]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
