"""Memory stays bounded whatever the size of a tensor."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import start

LIMIT = 256 << 20
GB4 = 1 << 32


def write_large(folder: Path, size: int) -> None:
    """A matrix of `size` bytes that is quantized and a stack of a quarter of it that is kept; mostly holes."""
    folder.mkdir()
    config = {"model_type": "unheard_of", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    header = {
        "layers.0.up.weight": {"dtype": "BF16", "shape": [size >> 17, 1 << 16], "data_offsets": [0, size]},
        "layers.0.experts": {
            "dtype": "BF16",
            "shape": [8, size >> 22, 1 << 16],
            "data_offsets": [size, size + size // 4],
        },
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    patch = (np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for at in range(0, size + size // 4, 64 << 20):
            file.seek(8 + len(raw) + at)
            file.write(patch.tobytes())
        file.truncate(8 + len(raw) + size + size // 4)


def anonymous_peak(*arguments: str) -> int:
    """The most anonymous memory that a command held, looked at from outside."""
    process = start("-m", *arguments)
    peak = 0
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.communicate()))
    reader.start()
    while reader.is_alive():
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            pass
        time.sleep(0.01)
    reader.join()
    assert process.returncode == 0, said[1]
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")
@pytest.mark.parametrize(("settings", "size"), [("quant.double_quant=true", GB4), ("quant=ternary", GB4 >> 2)])
def test_two_tensors_of_gigabytes_take_less_than_256_mib(settings: str, size: int, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 2 * size:
        pytest.skip(f"needs {2 * size >> 30} GiB of disk")
    write_large(tmp_path / "m", size)
    given = [f"model.path={tmp_path / 'm'}", f"output.path={tmp_path / 'out'}", settings]
    libraries = anonymous_peak("jobs.plan", *given)
    peak = anonymous_peak("jobs.run", *given, "tracking=none", "strategy=read")
    report = json.loads((tmp_path / "out" / "weightmill.json").read_text())
    actions = {row["name"]: row["action"] for row in report["tensors"]}
    assert actions == {"layers.0.up.weight": "quantize", "layers.0.experts": "keep"}
    assert peak - libraries < LIMIT
    assert report["run"]["peak_anonymous_bytes"] < LIMIT
    for path in (tmp_path / "m" / "model.safetensors", *(tmp_path / "out").glob("*.safetensors")):
        path.unlink()
