"""Several models in one process: the same workers, within the same budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import loaders.backends.threads
import loaders.loading.resources
import loaders.models.weights
from loaders import configure
from loaders.models import LoadingStrategy, load_model_and_tokenizer
from loaders.places import DEMO
from loaders.quantization.schemes.hqq import Hqq

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


def test_models_share_workers_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loaders.backends.threads, loaders.models.weights):
        monkeypatch.setattr(module, "RANGE", 1 << 12)  # so that the demo's tensors are several ranges
    monkeypatch.setattr(loaders.loading.resources, "_SHARED", [])
    together = loaders.loading.resources.configure(
        workers=2, memory_budget_mb=3 * loaders.backends.threads.THREAD_BYTES / 1e6
    )
    honest_hold, honest_run = together.budget.hold, loaders.backends.threads._Queue.run
    used: list[int] = []
    threads: set[str] = set()

    @contextmanager
    def hold(size: int) -> Iterator[None]:
        with honest_hold(size):
            used.append(together.budget.used)
            yield

    def run(self: Any, *work: Any) -> Any:
        threads.add(threading.current_thread().name)
        return honest_run(self, *work)

    monkeypatch.setattr(together.budget, "hold", hold)
    monkeypatch.setattr(loaders.backends.threads._Queue, "run", run)
    ids = torch.arange(3, 40)[None]

    def logits(strategy: LoadingStrategy) -> Any:
        model = load_model_and_tokenizer(DEMO, "cpu", strategy=strategy)[0]
        with torch.no_grad():
            return model(ids).logits

    load_model_and_tokenizer(DEMO, "cpu")  # transformers imports its modules once, and not on two threads
    with ThreadPoolExecutor(2, thread_name_prefix="caller") as callers:
        first, second = callers.map(logits, (LoadingStrategy.FULL, LoadingStrategy.STREAMING))
    assert not torch.nn.Linear(2, 2).weight.is_meta  # what building a model changes in torch is changed back
    wanted = transformers.AutoModelForCausalLM.from_pretrained(DEMO).eval()
    with torch.no_grad():
        assert torch.equal(first, wanted(ids).logits)
    assert torch.equal(first, second)
    assert 2 * loaders.backends.threads.THREAD_BYTES <= max(used) <= together.budget.size
    until = time.monotonic() + 10
    while together.budget.used and time.monotonic() < until:  # streaming reads ahead for a forward that does not come
        time.sleep(0.01)
    assert together.budget.used == 0
    workers = {name for name in threads if not name.startswith(("caller", "stream", "MainThread"))}
    assert workers
    assert all(name.startswith("weightmill") for name in workers)
    assert len(workers) <= 2


def test_what_was_quantized_once_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hqq")
    monkeypatch.setattr(loaders.loading.resources, "_SHARED", [])
    together = configure(workers=2, cache_folder=tmp_path)
    encoded: list[str] = []
    real = Hqq.encode

    def counted(self: Hqq, view: Any, *rest: Any) -> None:
        encoded.append(view.spec.name)
        real(self, view, *rest)

    monkeypatch.setattr(Hqq, "encode", counted)
    ids = torch.arange(3, 40)[None]
    found = []
    for use_cache in (True, True, False):
        model, _ = load_model_and_tokenizer(DEMO, "cpu", quantize="hqq4", use_cache=use_cache)
        with torch.no_grad():
            found.append(model(ids).logits)
        assert len(encoded) == len(set(encoded)) or not use_cache
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(encoded) == 2 * len(set(encoded))  # the first time, and without the cache
    assert len(together.cache.keys()) == len(set(encoded))
