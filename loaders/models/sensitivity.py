"""How much each weight's error matters, by one pass of a text through the model: see `loaders.quantization.importance`.

The model reads windows of the text, forward and backward; the gradient is that of the log-likelihood of tokens drawn
from the model's own predictions, so that its square is the Fisher information, the curvature of the divergence that
quantization is judged by. Only squares of inputs and output gradients are kept, by channel. Needs `[models]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.quantization.importance import Importance

if TYPE_CHECKING:
    import torch

WINDOW = 256  # tokens
SEED = 0
Importances = Mapping[str, tuple[Importance, ...]]


def importances_of(
    folder: Path, text: str | None, tokens: int, on_tokens: Callable[[int], None] = lambda count: None
) -> Importances:
    """What the errors of each linear layer's and embedding's weight matter, by the weight's name in the checkpoint.

    A sum of rows[i] columns[j] dW_ij^2 estimates nats a token. text: what is read; None: text that the model writes.
    tokens: how many are read, in windows of 256. on_tokens(count) is called as they are read, or written.

    Raises:
        BadSpec: the text has too few tokens, or transformers is not installed.
        BadCheckpoint: transformers cannot load the model, or it is no language model.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise BadSpec(f"{setting('calibration')}: needs {error.name}: pip install 'weightmill[models]'") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        windows = (
            _written(model, tokens, on_tokens)
            if text is None
            else _read(AutoTokenizer.from_pretrained(folder), text, tokens)
        )
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
    """Windows spread evenly over the text."""
    import torch

    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    whole = len(ids) // WINDOW
    if not whole:
        raise BadSpec(f"{setting('calibration')}: the text has {len(ids)} tokens; at least {WINDOW} are needed")
    wanted = np.linspace(0, whole - 1, min(whole, max(1, tokens // WINDOW))).astype(int)
    return [ids[at * WINDOW : (at + 1) * WINDOW] for at in wanted]


def _written(model: Any, tokens: int, on_tokens: Callable[[int], None]) -> list[torch.Tensor]:
    """Windows that the model writes by its own probabilities."""
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
    """Squares of inputs and of output gradients of every linear layer and embedding, summed over tokens."""

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        names = dict(model.named_parameters(remove_duplicate=False))
        # a tied weight has one name in the checkpoint, the first
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
        """While this is open, whatever goes forward and backward through the model counts."""
        handles = [module.register_forward_hook(self._forward) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        import torch

        if isinstance(module, torch.nn.Embedding):
            output.requires_grad_(True)  # where the graph begins: the weights themselves need no gradients
            output.register_hook(lambda gradient: self._embedded(module, inputs[0], gradient))
            return
        self._add(self._inputs, module, _channels(inputs[0]))
        output.register_hook(lambda gradient: self._add(self._gradients, module, _channels(gradient)))

    def _embedded(self, module: Any, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """A lookup's rows matter as often as they are looked up."""
        import torch

        squares = gradient.detach().double().square().flatten(0, -2)
        self._add(self._inputs, module, squares.sum(0))
        rows = torch.zeros(module.weight.shape[0], dtype=torch.float64)
        self._add(self._gradients, module, rows.index_add_(0, ids.flatten(), squares.sum(1)))

    @staticmethod
    def _add(sums: dict[Any, torch.Tensor], module: Any, squares: torch.Tensor) -> None:
        sums[module] = squares if module not in sums else sums[module] + squares

    def importances(self, tokens: int) -> Importances:
        """1/2 E[g^2] E[x^2] by weight; of a lookup 1/2 E[sum_j g_j^2 of its row] times each column's share."""
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
    """Squares summed over all but the last dimension: (..., C) to (C,)."""
    return values.detach().double().square().flatten(0, -2).sum(0)


# --- kept


def save(importances: Importances, path: Path) -> None:
    """As a file of numpy's."""
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
    """What `save` has left."""
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, number, part = key.split("\t")
            found.setdefault(name, {}).setdefault(int(number), {})[part] = arrays[key]
    return {
        name: tuple(Importance(parts["rows"], parts["columns"]) for _, parts in sorted(mine.items()))
        for name, mine in found.items()
    }
