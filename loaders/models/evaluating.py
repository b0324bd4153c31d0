"""Holding an output's predictions against its original's, over a held-out text: each in its engine, one at a time.

The text is cut into token ids once, by the original's tokenizer, and every engine gets the same windows of them. The
original's logits go to a file (float32, so that an output which computes the same is found to be the same), and the
output's are compared with them window by window: what is held in memory is one model and some windows.

Shapes: W windows, T tokens of each, V words of the vocabulary.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, VerifyFailed, io_errors, setting
from loaders.layouts.gguf.tokenizer_files import tokenizer_files
from loaders.models.quality import Quality, scores, summed_up
from loaders.models.runners import (
    ORIGINAL,
    Engine,
    Runner,
    check_engine,
    check_tensors,
    device_of,
    engine_of_folder,
    running,
)
from loaders.storage.atomic import atomic_writer, file_lock, write_file
from loaders.storage.hashes import digest, hash_stored, text_digest
from loaders.tensors.quantized_sources import quantized_tensors

TOKENS, WINDOW = 8192, 256
TEXT = Path(__file__).resolve().parent / "texts" / "held_out.txt"
BATCH_BYTES = 64 << 20  # of logits, computed at once
KEPT_BYTES = 32 << 30  # of originals' logits, kept for the next evaluation
ENCODER_ONLY = ("MaskedLM", "PreTraining", "Classification", "Answering", "Encoder")
FORMAT = 1
OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class Windows:
    """A text as token ids, int32 of shape (W, T). Where the tokenizer begins a text with a token, each window does."""

    ids: np.ndarray
    text: str  # name and digest
    vocabulary: int  # words that the tokenizer knows

    @property
    def digest(self) -> str:
        return digest(np.ascontiguousarray(self.ids))

    @property
    def tokens(self) -> int:
        """How many are predicted: all but the first of each window."""
        windows, length = self.ids.shape
        return int(windows * (length - 1))


def evaluate(
    original: str | Path,
    output: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Path | None = None,
    on_tokens: OnTokens = lambda count: None,
) -> Quality:
    """Hold a quantized checkpoint against its original: KL of the logits, perplexity, top-1 agreement.

    `text`: a file of UTF-8 text; by default a text of ours that comes with the package. At most `tokens` of it are
    taken, in windows of `window`. `device`: "cpu", "cuda", "mps", or "auto". `dtype`: of float arithmetic. `cache`: a
    folder where the original's logits stay (4 bytes * tokens * vocabulary) for the next output; else they are
    forgotten. `on_tokens` is told of tokens as they are done, those of the original and of the output.

    Raises:
        BadSpec: the text is missing or too short, the model is not a causal one, an engine is not installed, or would
            stop at one of the output's tensors on this device.
        BadCheckpoint: an engine does not load one of the two.
        VerifyFailed: the output computes NaN or infinities.
    """
    one, other = open_checkpoint(original, key="original"), open_checkpoint(output, key="output")
    engine = engine_of_folder(other)
    for each, what in ((ORIGINAL, str(original)), (engine, str(output))):
        check_engine(each, device, what)
    stored = [(r.spec, r.decode) for r in quantized_tensors(other).values() if r.decode is not None]
    check_tensors(engine, device, stored)
    windows = read_windows(one, text, tokens=tokens, window=window)
    reference = Reference(one, windows, device=device, dtype=dtype)
    with kept(cache) as folder:
        return judge(reference, other, engine, folder, on_tokens=on_tokens)


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """The folder of originals' logits; where there is none, one that goes with the block."""
    if folder is not None:
        with io_errors("making", folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="weightmill-logits-") as made:
        yield Path(made)


# --- the text


def read_windows(
    checkpoint: Checkpoint, text: str | Path | None = None, *, tokens: int = TOKENS, window: int = WINDOW
) -> Windows:
    """Cut a text into windows of token ids with a checkpoint's tokenizer.

    Raises:
        BadSpec: the model is not a causal one, it has no tokenizer, the text cannot be read or is too short.
    """
    _check_causal(checkpoint, window)
    path = TEXT if text is None else Path(text)
    words = _read(path)
    tokenizer = required_tokenizer(checkpoint)
    ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids[:tokens]
    lead = _lead(tokenizer)
    each = window - len(lead)
    count = len(ids) // each
    if count < 2:
        raise BadSpec(
            f"{setting('text')}: expected at least {2 * each} tokens, two windows of {setting('window')}={window},"
            " found"
            f" {len(ids)} in {path}; give more text, or smaller windows"
        )
    body = np.array(ids[: count * each], np.int32).reshape(count, each)
    every = np.concatenate([np.tile(np.array(lead, np.int32), (count, 1)), body], 1)
    return Windows(every, f"{path.name} {text_digest(words)[:12]}", len(tokenizer))


def _read(path: Path) -> str:
    try:
        words = path.read_text("utf-8")
    except OSError as error:
        raise BadSpec(f"{setting('text')}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadSpec(f"{setting('text')}: {path} is not UTF-8 text (byte {error.start})") from None
    if not words.strip():
        raise BadSpec(f"{setting('text')}: {path} is empty")
    return words


def _check_causal(checkpoint: Checkpoint, window: int) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = checkpoint.config
    kind, built = config.get("model_type"), " ".join(map(str, config.get("architectures") or ()))
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not any(word in built for word in ENCODER_ONLY)
    if not is_causal or config.get("is_encoder_decoder"):
        raise BadSpec(
            f"{setting('evaluate')}: {checkpoint.address} is no causal language model of transformers"
            f" (model_type {kind!r}{', ' if built else ''}{built})"
        )
    inner: Any = config.get("text_config") or {}
    most = config.get("max_position_embeddings") or inner.get("max_position_embeddings")
    if isinstance(most, int) and window > most:
        raise BadSpec(f"{setting('window')}: {window} tokens, but the model has {most} positions; give fewer")


def required_tokenizer(checkpoint: Checkpoint) -> Any:
    """A checkpoint's tokenizer; that of a GGUF is taken out of it.

    Raises:
        BadSpec: it has none, or one that transformers does not load without running its code.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="weightmill-tokenizer-") as made:
        root = checkpoint.folder(READS_FOLDERS)
        files = tokenizer_files(checkpoint) if checkpoint.container == "gguf" else {}
        if files:
            root = Path(made)
            for name, data in files.items():
                (root / name).write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(str(root), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            said = " ".join(str(error).split())[:200]
            raise BadSpec(
                f"{setting('evaluate')}: no tokenizer that transformers loads in {checkpoint.address}: {said};"
                " put its files there"
            ) from None


def _lead(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare, whole = (tokenizer("a", add_special_tokens=is_on).input_ids for is_on in (False, True))
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    found: list[int] = whole[:at]
    return found


# --- the original


@dataclass(frozen=True)
class Reference:
    """An original's logits over windows of a text, computed where they are not there already."""

    checkpoint: Checkpoint
    windows: Windows
    device: str = "cpu"
    dtype: str = "float32"

    @cached_property
    def key(self) -> str:
        """Names the logits: by the original's files, the tokens, and how they are computed."""
        files = [(tag.name, tag.size, tag.tag) for tag in self.checkpoint.files]
        source = self.checkpoint.source
        config = source.find("config.json")  # as it stands there: a job may have expanded it
        about = [str(source.address.real), files, None if config is None else hash_stored(source.store, config)]
        how = [self.windows.digest, list(self.windows.ids.shape), device_of(ORIGINAL, self.device), self.dtype]
        return text_digest(json.dumps([FORMAT, *about, *how, ORIGINAL.described]))

    def is_in(self, folder: Path) -> bool:
        return (folder / f"{self.key}.json").is_file() and (folder / f"{self.key}.logits").is_file()

    def logits(self, folder: Path, on_tokens: OnTokens = lambda count: None) -> tuple[np.ndarray, float]:
        """Float32 (W, T - 1, V) in a map of a file of the folder, and the seconds that it took to compute them.

        Raises:
            BadCheckpoint: transformers does not load the original, or it computes NaN.
            StorageError: the disk is full, ...
        """
        began, path = time.perf_counter(), folder / f"{self.key}.logits"
        with file_lock(path):
            is_there = self.is_in(folder)
            if not is_there:
                self._make(folder, path, on_tokens)
            else:
                on_tokens(self.windows.tokens)
        with suppress(OSError):
            path.touch()
        words = json.loads((folder / f"{self.key}.json").read_text())["vocabulary"]
        count, length = self.windows.ids.shape
        found = np.memmap(path, np.float32, "r", shape=(count, length - 1, words))
        return found, 0.0 if is_there else time.perf_counter() - began

    def _make(self, folder: Path, path: Path, on_tokens: OnTokens) -> None:
        words, largest = 0, int(self.windows.ids.max())
        with (
            running(
                self.checkpoint, None, device=self.device, dtype=self.dtype, window=self.windows.ids.shape[1],
                key=setting("checkpoint"),
            ) as runner,
            atomic_writer(path) as file,
        ):  # fmt: skip
            for logits_TV in logits_of(runner, self.windows, on_tokens):
                words = logits_TV.shape[-1]
                if largest >= words or not np.isfinite(logits_TV.max(-1)).all():
                    why = f"{words} logits for token {largest}" if largest >= words else "NaN or infinite logits"
                    raise BadCheckpoint(
                        f"{setting('checkpoint')}: {self.checkpoint.address} computes {why}; nothing to compare with"
                    )
                file.write(np.ascontiguousarray(logits_TV).data)
        write_file(folder / f"{self.key}.json", json.dumps({"vocabulary": words}).encode())
        _forget(folder, path)


def _forget(folder: Path, newest: Path) -> None:
    """Remove the logits that were used longest ago, beyond what is kept."""
    files = sorted(folder.glob("*.logits"), key=lambda p: -p.stat().st_mtime)
    total = 0
    for path in [newest, *(p for p in files if p != newest)]:
        total += path.stat().st_size
        if total > KEPT_BYTES and path != newest:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def logits_of(runner: Runner, windows: Windows, on_tokens: OnTokens = lambda count: None) -> Iterator[np.ndarray]:
    """Window by window, logits of shape (T - 1, V): those that predict all but a window's first token."""
    at, batch = 0, 1
    while at < len(windows.ids):
        found_BTV = runner(windows.ids[at : at + batch])
        yield from found_BTV[:, :-1]
        on_tokens(len(found_BTV) * (windows.ids.shape[1] - 1))
        at += batch
        batch = max(1, min(16, BATCH_BYTES // found_BTV[0].nbytes))


# --- the output


def judge(
    reference: Reference,
    output: Checkpoint,
    engine: Engine | None,
    folder: Path,
    *,
    key: str = "output",
    on_tokens: OnTokens = lambda count: None,
) -> Quality:
    """Hold an output against its original, whose logits are in the folder, or come to be there. Without an engine it is
    decoded and runs as the original does.

    Raises:
        BadCheckpoint: an engine does not load one of the two.
        VerifyFailed: the output has fewer logits than its tokenizer has words, or computes NaN.
    """
    windows, ran_by = reference.windows, engine or ORIGINAL
    originals_WTV, reference_s = reference.logits(folder, on_tokens)
    began, found = time.perf_counter(), []
    with running(
        output, engine, device=reference.device, dtype=reference.dtype, window=windows.ids.shape[1], key=key
    ) as runner:
        for ids_T, original_TV, logits_TV in zip(
            windows.ids, originals_WTV, logits_of(runner, windows, on_tokens), strict=True
        ):
            words = min(original_TV.shape[-1], logits_TV.shape[-1])  # one of the two may be padded
            if words < min(windows.vocabulary, original_TV.shape[-1]):
                raise VerifyFailed(
                    f"{key}: {output.address} has {words} logits, the original {original_TV.shape[-1]}, its tokenizer"
                    f" {windows.vocabulary} words"
                )
            found.append(scores(original_TV[:, :words], logits_TV[:, :words], ids_T[1:]))
            if not found[-1].is_finite:
                raise VerifyFailed(f"{key}: {output.address} computes logits that are NaN or infinite in {ran_by.name}")
    return summed_up(
        found, window=windows.ids.shape[1], seconds=time.perf_counter() - began, reference_seconds=reference_s,
        engine=ran_by.described, text=windows.text,
    )  # fmt: skip
