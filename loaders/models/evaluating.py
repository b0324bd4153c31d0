"""Evaluation: an output's predictions compared with its original's over a held-out text, each in its own engine.

The original's tokenizer cuts the text into token ids once, and every engine gets the same windows of them. The
original's logits are written to a file, in float32 so that an output which computes the same is found to be equal.
The output's logits are compared with them window by window: memory holds one model and a few windows at a time.

Shapes: W windows, T tokens in each, V words of the vocabulary.
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
from loaders.layouts.gguf.tokenizers.tokenizer_files import tokenizer_files
from loaders.models.foreign import tokenizer_from
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

# Defaults: 32 windows of 256 tokens. More tokens narrow the intervals with their square root, and time grows with them.
TOKENS, WINDOW = 8192, 256
TEXT = Path(__file__).resolve().parent / "texts" / "held_out.txt"
BATCH_BYTES = 64 << 20  # bytes of logits computed at once: larger batches take memory, smaller ones more passes
KEPT_BYTES = 32 << 30  # bytes of originals' logits kept on disk for later evaluations; the oldest are removed first
# Parts of class names of models that do not predict the next token, though their model_type has such a class too.
ENCODER_ONLY = ("MaskedLM", "PreTraining", "Classification", "Answering", "Encoder")
FORMAT = 1
OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class Windows:
    """A text as token ids, int32 of shape (W, T). If the tokenizer begins texts with a token, every window has it."""

    ids: np.ndarray
    text: str  # the text's file name and digest
    vocabulary: int  # the number of words in the tokenizer

    @property
    def digest(self) -> str:
        return digest(np.ascontiguousarray(self.ids))

    @property
    def tokens(self) -> int:
        """The number of tokens that are predicted: all but the first of each window."""
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
    """Compare a quantized checkpoint with its original: KL divergence of the logits, perplexity, top-1 agreement.

    `text`: a file of UTF-8 text; by default one that comes with the package. At most `tokens` of it are used, in
    windows of `window`. `device`: "cpu", "cuda", "mps", or "auto". `dtype`: of float arithmetic. `cache`: a folder that
    keeps the original's logits (4 bytes * tokens * vocabulary) for the next output; without it they are removed.
    `on_tokens` is called with the number of tokens just computed, by the original and by the output.

    Raises:
        BadSpec: the text is missing or too short, the model is not causal, or an engine is not installed or cannot
            compute with one of the output's tensors on this device.
        BadCheckpoint: an engine cannot load one of the two.
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
    """Yield the folder for the originals' logits; without one, a temporary folder that is removed after the block."""
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
        BadSpec: the model is not causal, it has no tokenizer, or the text cannot be read or is too short.
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
    """Load a checkpoint's tokenizer; a GGUF's is converted from its metadata.

    Raises:
        BadSpec: there is none, or transformers cannot load it without running its code.
    """
    with tempfile.TemporaryDirectory(prefix="weightmill-tokenizer-") as made:
        root = checkpoint.folder(READS_FOLDERS)
        files = tokenizer_files(checkpoint) if checkpoint.container == "gguf" else {}
        if files:
            root = Path(made)
            for name, data in files.items():
                (root / name).write_bytes(data)
        try:
            return tokenizer_from(root)
        # transformers 5 has no error class of its own for this: a damaged or unknown tokenizer raises any of these.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            said = " ".join(str(error).split())[:200]
            raise BadSpec(
                f"{setting('evaluate')}: no tokenizer that transformers loads in {checkpoint.address}: {said};"
                " put its files there"
            ) from None


def _lead(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before a text, such as BOS."""
    bare, whole = (tokenizer("a", add_special_tokens=is_on).input_ids for is_on in (False, True))
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    found: list[int] = whole[:at]
    return found


# --- the original


@dataclass(frozen=True)
class Reference:
    """An original's logits over windows of a text, computed only if a folder does not have them yet."""

    checkpoint: Checkpoint
    windows: Windows
    device: str = "cpu"
    dtype: str = "float32"

    @cached_property
    def key(self) -> str:
        """A digest of everything that the logits depend on: the original's files, the tokens, device, dtype, engine."""
        files = [(tag.name, tag.size, tag.tag) for tag in self.checkpoint.files]
        source = self.checkpoint.source
        # The stored file's hash, not `checkpoint.config`: block expansion changes the latter, and not the original.
        config = source.find("config.json")
        about = [str(source.address.real), files, None if config is None else hash_stored(source.store, config)]
        how = [self.windows.digest, list(self.windows.ids.shape), device_of(ORIGINAL, self.device), self.dtype]
        return text_digest(json.dumps([FORMAT, *about, *how, ORIGINAL.described]))

    def is_in(self, folder: Path) -> bool:
        return (folder / f"{self.key}.json").is_file() and (folder / f"{self.key}.logits").is_file()

    def logits(self, folder: Path, on_tokens: OnTokens = lambda count: None) -> tuple[np.ndarray, float]:
        """Return logits, float32 (W, T - 1, V), in a map of a file in the folder, and the seconds spent computing them.

        Raises:
            BadCheckpoint: transformers cannot load the original, or it computes NaN.
            StorageError: the disk is full, ...
        """
        began, path = time.perf_counter(), folder / f"{self.key}.logits"
        with file_lock(path):
            is_there = self.is_in(folder)
            if not is_there:
                self._make(folder, path, on_tokens)
            else:
                on_tokens(self.windows.tokens)
        # The time of the last use decides which logits `_forget` removes first; a read-only folder keeps them all.
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
    """Remove the least recently used logits beyond KEPT_BYTES."""
    files = sorted(folder.glob("*.logits"), key=lambda p: -p.stat().st_mtime)
    total = 0
    for path in [newest, *(p for p in files if p != newest)]:
        total += path.stat().st_size
        if total > KEPT_BYTES and path != newest:
            # The description goes first: logits without one count as missing, and are computed anew.
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def logits_of(runner: Runner, windows: Windows, on_tokens: OnTokens = lambda count: None) -> Iterator[np.ndarray]:
    """Yield each window's logits, shape (T - 1, V): those that predict all its tokens but the first."""
    at, batch = 0, 1
    while at < len(windows.ids):
        found_BTV = runner(windows.ids[at : at + batch])
        yield from found_BTV[:, :-1]
        on_tokens(len(found_BTV) * (windows.ids.shape[1] - 1))
        at += batch
        # The first batch is one window, which tells the size of a window's logits.
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
    """Compare an output with its original, whose logits are computed if the folder does not have them.

    Without an engine, the output is decoded to floats and runs in transformers, as the original does.

    Raises:
        BadCheckpoint: an engine cannot load one of the two.
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
            # One of the two may have its vocabulary padded to a multiple that suits its kernels.
            words = min(original_TV.shape[-1], logits_TV.shape[-1])
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
