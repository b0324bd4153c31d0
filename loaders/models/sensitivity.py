"""Sensitivity: how much each weight's error matters, measured over a text. See `loaders.quantization.importance`.

The model runs forward and backward over windows of the text. The gradient is that of the log-likelihood of tokens drawn
from the model's own predictions, so that its square is the Fisher information: the curvature of the KL divergence by
which quantization is judged. Only squares of inputs and of output gradients are kept, summed by channel. Needs
`[models]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.missing import needed_for
from loaders.models.foreign import model_from, tokenizer_from
from loaders.quantization.importance import Importance

if TYPE_CHECKING:
    import torch

WINDOW = 256  # tokens of a window
SEED = 0  # fixed, so that the same text gives the same importances, and so the same mix
Importances = Mapping[str, tuple[Importance, ...]]


def importances_of(
    folder: Path, text: str | None, tokens: int, on_tokens: Callable[[int], None] = lambda count: None
) -> Importances:
    """Return the importance of errors in each linear layer and embedding, by the weight's name in the checkpoint.

    The sum of rows[i] * columns[j] * dW_ij^2 estimates the loss in nats per token. text: the text that is read; None
    stands for text that the model writes. tokens: the number of tokens read, in windows of 256. on_tokens(count) is
    called as tokens are read or written.

    Raises:
        BadSpec: the text has too few tokens, or transformers is not installed.
        BadCheckpoint: transformers cannot load the model, or it is not a language model.
    """
    with needed_for(setting("calibration")):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        auto: Any = AutoModelForCausalLM
        model = model_from(auto, folder, dtype=torch.float32).eval().requires_grad_(False)
        windows = _written(model, tokens, on_tokens) if text is None else _read(tokenizer_from(folder), text, tokens)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{setting('calibration')}: transformers cannot load {folder}: {error}") from None
    generator = torch.Generator().manual_seed(SEED)
    sums, count = _Sums(model), 0
    with sums.watching():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            count += len(window)
            on_tokens(len(window))
    return sums.importances(count)


def _read(tokenizer: Any, text: str, tokens: int) -> list[torch.Tensor]:
    """Return windows spread evenly over the text."""
    import torch

    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = len(ids) // WINDOW
    if not whole:
        raise BadSpec(f"{setting('calibration')}: the text has {len(ids)} tokens; at least {WINDOW} are needed")
    wanted = np.linspace(0, whole - 1, min(whole, max(1, tokens // WINDOW))).astype(int)
    return [ids[at * WINDOW : (at + 1) * WINDOW] for at in wanted]


def _written(model: Any, tokens: int, on_tokens: Callable[[int], None]) -> list[torch.Tensor]:
    """Return windows that the model writes, sampled from its own probabilities."""
    import torch

    begin = model.config.bos_token_id
    count = max(1, tokens // WINDOW)
    start: Any = torch.full((count, 1), 0 if begin is None else begin)
    torch.manual_seed(SEED)
    made = []
    for batch in start.split(16):
        made += list(
            model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=WINDOW - 1, min_new_tokens=WINDOW - 1, pad_token_id=0,
            )
        )  # fmt: skip
        on_tokens(len(batch) * WINDOW)
    return made


class _Sums:
    """The squared inputs and output gradients of every linear layer and embedding, summed over tokens."""

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        names = dict(model.named_parameters(remove_duplicate=False))
        # A tied weight has one name in the checkpoint: the first of its names in the model.
        first = {id(parameter): name for name, parameter in reversed(names.items())}
        self._modules = {
            module: first[id(module.weight)]
            for module in model.modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        }
        self._inputs: dict[Any, torch.Tensor] = {}
        self._gradients: dict[Any, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count everything that passes forward and backward through the model during the block."""
        handles = [module.register_forward_hook(self._forward) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        import torch

        if isinstance(module, torch.nn.Embedding):
            # The graph begins here, since no weight requires a gradient.
            output.requires_grad_(True)
            output.register_hook(lambda gradient: self._embedded(module, inputs[0], gradient))
            return
        self._add(self._inputs, module, _channels(inputs[0]))
        output.register_hook(lambda gradient: self._add(self._gradients, module, _channels(gradient)))

    def _embedded(self, module: Any, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add an embedding's gradients: a row counts each time that its token occurs."""
        import torch

        squares = gradient.detach().double().square().flatten(0, -2)
        self._add(self._inputs, module, squares.sum(0))
        rows = torch.zeros(module.weight.shape[0], dtype=torch.float64)
        self._add(self._gradients, module, rows.index_add_(0, ids.flatten(), squares.sum(1)))

    @staticmethod
    def _add(sums: dict[Any, torch.Tensor], module: Any, squares: torch.Tensor) -> None:
        sums[module] = squares if module not in sums else sums[module] + squares

    def importances(self, tokens: int) -> Importances:
        """Return 1/2 E[g^2] E[x^2] per weight; for an embedding, 1/2 E[sum_j g_j^2] of a row times a column's share."""
        import torch

        found: dict[str, tuple[Importance, ...]] = {}
        for module, name in self._modules.items():
            if module not in self._gradients:
                continue
            rows, columns = self._gradients[module] / tokens, self._inputs[module]
            is_lookup = isinstance(module, torch.nn.Embedding)
            columns = columns / (columns.sum().clamp_min(1e-300) if is_lookup else tokens)
            made = Importance((rows / 2).float().numpy(), columns.float().numpy())
            found[name] = (*found.get(name, ()), made)
        return found


def _channels(values: torch.Tensor) -> torch.Tensor:
    """Sum the squares over all but the last dimension: (..., C) to float64 (C,)."""
    return values.detach().double().square().flatten(0, -2).sum(0)


# --- kept


def save(importances: Importances, path: Path) -> None:
    """Write importances to an .npz file, atomically."""
    arrays = {
        f"{name}\t{number}\t{part}": getattr(each, part)
        for name, mine in importances.items()
        for number, each in enumerate(mine)
        for part in ("rows", "columns")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.part")
    with made.open("wb") as file:
        np.savez(file, **arrays)
    made.replace(path)


def load(path: Path) -> Importances:
    """Read a file that `save` wrote."""
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, number, part = key.split("\t")
            found.setdefault(name, {}).setdefault(int(number), {})[part] = arrays[key]
    return {
        name: tuple(Importance(parts["rows"], parts["columns"]) for _, parts in sorted(mine.items()))
        for name, mine in found.items()
    }
