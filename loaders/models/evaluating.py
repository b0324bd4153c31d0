"""Evaluation: what an output computes over a held-out text, compared with its original, each in its own engine.

Compared are logits or, of models without any, last hidden states. The original's tokenizer cuts the text into token ids
once, and every engine gets the same windows of them. The original's numbers are written to a file, in float32 so that
an output which computes the same is found to be equal. The output's are compared with them window by window: memory
holds one model and a few windows at a time.

Shapes: W windows, T tokens in each, V words of the vocabulary or numbers of a hidden state.
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
from typing import Any, TypeVar

import numpy as np

from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, VerifyFailed, io_errors, setting
from loaders.layouts.gguf.tokenizers.tokenizer_files import tokenizer_files
from loaders.models import hidden_states
from loaders.models.engine_runners import Runner
from loaders.models.foreign import tokenizer_from
from loaders.models.heads import check_causal, check_encodes, positions_of
from loaders.models.hidden_states import Closeness, Compared
from loaders.models.quality import Quality, Scores, scores, summed_up
from loaders.models.runners import (
    ORIGINAL,
    Engine,
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
BATCH_BYTES = 64 << 20  # bytes of numbers computed at once: larger batches take memory, smaller ones more passes
KEPT_BYTES = 32 << 30  # bytes of originals' numbers kept on disk for later evaluations; the oldest are removed first
FORMAT = 1
OnTokens = Callable[[int], None]
Found = TypeVar("Found", Scores, Compared)


@dataclass(frozen=True)
class Windows:
    """A text as token ids, int32 of shape (W, T). If the tokenizer begins texts with a token, every window has it.

    For hidden states, every window also has the token with which the tokenizer ends texts.
    """

    ids: np.ndarray
    text: str  # the text's file name and digest
    vocabulary: int  # the number of words in the tokenizer

    @property
    def digest(self) -> str:
        return digest(np.ascontiguousarray(self.ids))


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
    checkpoint: Checkpoint,
    text: str | Path | None = None,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    states: bool = False,
) -> Windows:
    """Cut a text into windows of token ids with a checkpoint's tokenizer, for its logits or (`states`) hidden states.

    Raises:
        BadSpec: the model has no such numbers, it has no tokenizer, or the text cannot be read or is too short.
    """
    (check_encodes if states else check_causal)(checkpoint)
    most = positions_of(checkpoint.config)
    if most is not None and window > most:
        raise BadSpec(f"{setting('window')}: {window} tokens, but the model has {most} positions; give fewer")
    path = TEXT if text is None else Path(text)
    words = _read(path)
    tokenizer = required_tokenizer(checkpoint)
    ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids[:tokens]
    lead, trail = _around(tokenizer)
    trail = trail if states else []
    each = window - len(lead) - len(trail)
    count = len(ids) // each
    if count < 2:
        raise BadSpec(
            f"{setting('text')}: expected at least {2 * each} tokens, two windows of {setting('window')}={window},"
            " found"
            f" {len(ids)} in {path}; give more text, or smaller windows"
        )
    body = np.array(ids[: count * each], np.int32).reshape(count, each)
    before, after = (np.tile(np.array(part, np.int32), (count, 1)) for part in (lead, trail))
    every = np.concatenate([before, body, after], 1)
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


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before a text, such as BOS, and after it."""
    bare, whole = (tokenizer("a", add_special_tokens=is_on).input_ids for is_on in (False, True))
    at = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(bare) :])


# --- the original


@dataclass(frozen=True)
class Reference:
    """An original's logits over windows of a text, or its last hidden states, computed if a folder has none yet."""

    checkpoint: Checkpoint
    windows: Windows
    device: str = "cpu"
    dtype: str = "float32"
    states: bool = False

    @cached_property
    def key(self) -> str:
        """A digest of all that the numbers depend on: the original's files, the tokens, device, dtype, engine."""
        files = [(tag.name, tag.size, tag.tag) for tag in self.checkpoint.files]
        source = self.checkpoint.source
        # The stored file's hash, not `checkpoint.config`: block expansion changes the latter, and not the original.
        config = source.find("config.json")
        about = [str(source.address.real), files, None if config is None else hash_stored(source.store, config)]
        how = [self.windows.digest, list(self.windows.ids.shape), device_of(ORIGINAL, self.device), self.dtype]
        return text_digest(json.dumps([FORMAT, *about, *how, ORIGINAL.described, *(["states"] if self.states else [])]))

    @property
    def tokens(self) -> int:
        """The number of compared tokens; of logits those that are predicted, all but the first of each window."""
        windows, length = self.windows.ids.shape
        return int(windows * (length if self.states else length - 1))

    def is_in(self, folder: Path) -> bool:
        return (folder / f"{self.key}.json").is_file() and self._path(folder).is_file()

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.key}.{'states' if self.states else 'logits'}"

    def numbers(self, folder: Path, on_tokens: OnTokens = lambda count: None) -> tuple[np.ndarray, float]:
        """Return logits, float32 (W, T - 1, V), or hidden states (W, T, V), in a map of a file in the folder.

        The second result is the seconds spent computing them.

        Raises:
            BadCheckpoint: transformers cannot load the original, or it computes NaN.
            StorageError: the disk is full, ...
        """
        began, path = time.perf_counter(), self._path(folder)
        with file_lock(path):
            is_there = self.is_in(folder)
            if not is_there:
                self._make(folder, path, on_tokens)
            else:
                on_tokens(self.tokens)
        # The time of the last use decides which numbers `_forget` removes first; a read-only folder keeps them all.
        with suppress(OSError):
            path.touch()
        width = json.loads((folder / f"{self.key}.json").read_text())["vocabulary"]
        count = len(self.windows.ids)
        found = np.memmap(path, np.float32, "r", shape=(count, self.tokens // count, width))
        return found, 0.0 if is_there else time.perf_counter() - began

    def _make(self, folder: Path, path: Path, on_tokens: OnTokens) -> None:
        width = 0
        with (
            running(
                self.checkpoint, None, device=self.device, dtype=self.dtype, window=self.windows.ids.shape[1],
                key=setting("checkpoint"), states=self.states,
            ) as runner,
            atomic_writer(path) as file,
        ):  # fmt: skip
            for numbers_TV in numbers_of(runner, self.windows, on_tokens, states=self.states):
                width = numbers_TV.shape[-1]
                if why := self._wrong(numbers_TV):
                    raise BadCheckpoint(
                        f"{setting('checkpoint')}: {self.checkpoint.address} computes {why}; nothing to compare with"
                    )
                file.write(np.ascontiguousarray(numbers_TV).data)
        write_file(folder / f"{self.key}.json", json.dumps({"vocabulary": width}).encode())
        _forget(folder, path)

    def _wrong(self, numbers_TV: np.ndarray) -> str:
        if self.states:
            return "" if np.isfinite(numbers_TV).all() else "NaN or infinite hidden states"
        words, largest = numbers_TV.shape[-1], int(self.windows.ids.max())
        if largest >= words:
            return f"{words} logits for token {largest}"
        return "" if np.isfinite(numbers_TV.max(-1)).all() else "NaN or infinite logits"


def _forget(folder: Path, newest: Path) -> None:
    """Remove the least recently used numbers beyond KEPT_BYTES."""
    files = sorted([*folder.glob("*.logits"), *folder.glob("*.states")], key=lambda p: -p.stat().st_mtime)
    total = 0
    for path in [newest, *(p for p in files if p != newest)]:
        total += path.stat().st_size
        if total > KEPT_BYTES and path != newest:
            # The description goes first: numbers without one count as missing, and are computed anew.
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def numbers_of(
    runner: Runner, windows: Windows, on_tokens: OnTokens = lambda count: None, *, states: bool = False
) -> Iterator[np.ndarray]:
    """Yield each window's logits, shape (T - 1, V), those that predict all its tokens but the first; or its states."""
    at, batch = 0, 1
    while at < len(windows.ids):
        found_BTV = runner(windows.ids[at : at + batch])
        found_BTV = found_BTV if states else found_BTV[:, :-1]
        yield from found_BTV
        on_tokens(found_BTV.shape[0] * found_BTV.shape[1])
        at += batch
        # The first batch is one window, which tells the size of a window's numbers.
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
    """Compare an output's logits with its original's, which are computed if the folder does not have them.

    Without an engine, the output is decoded to floats and runs in transformers, as the original does.

    Raises:
        BadCheckpoint: an engine cannot load one of the two.
        VerifyFailed: the output has fewer logits than its tokenizer has words, or computes NaN.
    """

    def compare(original_TV: np.ndarray, logits_TV: np.ndarray, ids_T: np.ndarray) -> Scores:
        # One of the two may have its vocabulary padded to a multiple that suits its kernels.
        words, known = min(original_TV.shape[-1], logits_TV.shape[-1]), reference.windows.vocabulary
        if words < min(known, original_TV.shape[-1]):
            raise VerifyFailed(
                f"{key}: {output.address} has {words} logits, the original {original_TV.shape[-1]}, its tokenizer"
                f" {known} words"
            )
        return scores(original_TV[:, :words], logits_TV[:, :words], ids_T[1:])

    found, about = _compared(reference, output, engine, folder, key, on_tokens, compare)
    return summed_up(found, **about)


def judge_states(
    reference: Reference,
    output: Checkpoint,
    engine: Engine | None,
    folder: Path,
    *,
    key: str = "output",
    on_tokens: OnTokens = lambda count: None,
) -> Closeness:
    """Compare an output's last hidden states with its original's, as `judge` does logits; so are the errors."""

    def compare(original_TH: np.ndarray, output_TH: np.ndarray, _: np.ndarray) -> Compared:
        if original_TH.shape != output_TH.shape:
            raise VerifyFailed(
                f"{key}: {output.address} has hidden states of {output_TH.shape[-1]} numbers, the original of"
                f" {original_TH.shape[-1]}"
            )
        return hidden_states.compared(original_TH, output_TH)

    found, about = _compared(reference, output, engine, folder, key, on_tokens, compare)
    return hidden_states.summed_up(found, **about)


def _compared(
    reference: Reference, output: Checkpoint, engine: Engine | None, folder: Path, key: str, on_tokens: OnTokens,
    compare: Callable[[np.ndarray, np.ndarray, np.ndarray], Found],
) -> tuple[list[Found], dict[str, Any]]:  # fmt: skip
    """Compare the numbers of each window, and its ids; returns the results, and what else is said of them."""
    windows, ran_by, found = reference.windows, engine or ORIGINAL, list[Found]()
    originals_WTV, reference_s = reference.numbers(folder, on_tokens)
    began = time.perf_counter()
    with running(
        output, engine, device=reference.device, dtype=reference.dtype, window=windows.ids.shape[1], key=key,
        states=reference.states,
    ) as runner:  # fmt: skip
        numbers = numbers_of(runner, windows, on_tokens, states=reference.states)
        for ids_T, original_TV, output_TV in zip(windows.ids, originals_WTV, numbers, strict=True):
            found.append(compare(original_TV, output_TV, ids_T))
            if not found[-1].is_finite:
                what = "hidden states" if reference.states else "logits"
                raise VerifyFailed(f"{key}: {output.address} computes {what} that are NaN or infinite in {ran_by.name}")
    return found, {
        "window": windows.ids.shape[1], "seconds": time.perf_counter() - began, "reference_seconds": reference_s,
        "engine": ran_by.described, "text": windows.text,
    }  # fmt: skip
