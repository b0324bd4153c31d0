"""A model larger than the memory there is computes, a module at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loaders.models.large import write_large

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.engine
ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20

RUN = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import loaders.models.loading, loaders.models.streaming
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from loaders.memory import PeakMemory, anonymous_bytes
from loaders.models import LoadingStrategy
folder, strategy, room = sys.argv[1], sys.argv[2], int(sys.argv[3])

def data():
    for line in open("/proc/self/status"):
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024

limit = data() + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    with PeakMemory() as memory:
        model, _ = loaders.models.loading.load_model_and_tokenizer(
            folder, "cpu", strategy=LoadingStrategy(strategy), memory_budget_mb=250, workers=1)
        with torch.no_grad():
            out = model(torch.arange(5)[None]).logits
            made = model.generate(torch.arange(5)[None], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    print(json.dumps({"finite": bool(out.isfinite().all()), "made": made.shape[1], "peak": memory.peak_bytes,
                      "held": model.streamer.peak_bytes, "size": sum(p.nbytes for p in model.parameters())}))
except (MemoryError, RuntimeError) as error:
    print(json.dumps({"error": type(error).__name__ + ": " + str(error)[:200]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts private memory on Linux alone")
def test_a_gigabyte_computes_under_a_limit_that_loading_it_exceeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = write_large(tmp_path / "large")
    assert size >= 1_000_000_000

    def run(strategy: str) -> dict[str, object]:
        script = [sys.executable, "-c", RUN, str(tmp_path / "large"), strategy, str(800 * MIB)]
        few = {
            **os.environ,
            "MALLOC_ARENA_MAX": "2",
        }  # each arena of the allocator counts as much as is reserved for it
        ran = subprocess.run(script, cwd=ROOT, env=few, capture_output=True, text=True, check=True, timeout=600)
        return dict(json.loads(ran.stdout.splitlines()[-1]))

    streamed, full = run("streaming"), run("full")
    with capsys.disabled():
        print(f"\n  streaming: {streamed}\n  full: {full}", end="")
    assert "error" in full
    assert "alloc" in str(full["error"]).lower() or "memory" in str(full["error"]).lower()
    assert "error" not in streamed
    assert streamed["finite"]
    assert streamed["made"] == 7
    assert streamed["size"] == size
    assert 0 < int(str(streamed["held"])) <= 250_000_000
    assert int(str(streamed["peak"])) <= 600 * MIB < size
