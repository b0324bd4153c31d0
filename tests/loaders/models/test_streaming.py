"""A model larger than the memory there is computes, a module at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.places import ROOT
from tests.loaders.models.large import bytes_of

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.engine
MIB = 1 << 20

RUN = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import loaders.models.loading, loaders.models.streaming
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from loaders.backends.memory import PeakMemory, anonymous_bytes
from loaders.models import LoadingStrategy
folder, room = sys.argv[1], int(sys.argv[2])

def data():
    for line in open("/proc/self/status"):
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024

limit = data() + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
load = loaders.models.loading.load_model_and_tokenizer
with PeakMemory() as memory:
    model, _ = load(folder, "cpu", strategy=LoadingStrategy.STREAMING, memory_budget_mb=250, workers=1)
    with torch.no_grad():
        out = model(torch.arange(5)[None]).logits
        made = model.generate(torch.arange(5)[None], max_new_tokens=2, min_new_tokens=2, do_sample=False)
found = {"finite": bool(out.isfinite().all()), "made": made.shape[1], "peak": memory.peak_bytes,
         "held": model.streamer.peak_bytes, "size": sum(p.nbytes for p in model.parameters())}
model.streamer.close()
del model
try:
    load(folder, "cpu", workers=1)
except (MemoryError, RuntimeError) as error:
    found["full"] = type(error).__name__ + ": " + str(error)[:200]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts private memory on Linux alone")
def test_a_gigabyte_computes_under_a_limit_that_loading_it_exceeds(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = bytes_of(large)
    assert size >= 1_000_000_000
    script = [sys.executable, "-c", RUN, str(large), str(800 * MIB)]
    few = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # an arena counts all that is reserved for it
    ran = subprocess.run(script, cwd=ROOT, env=few, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n  {found}", end="")
    assert found["finite"]
    assert found["made"] == 7
    assert found["size"] == size
    assert 0 < found["held"] <= 250_000_000
    assert found["peak"] <= 600 * MIB < size
    assert "alloc" in found["full"].lower() or "memory" in found["full"].lower()
