"""Sources of each kind in a store, and outputs of each engine there: the same bytes as from folder to folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import Hub
from tests.jobs.test_over_hub import published
from tests.jobs.test_over_stores import comparable
from tests.making import snapshot
from tests.shelf.places import Place, contents, fill
from tests.sources import SOURCES

# a row of SOURCES and a preset for it: each kind of reading a source meets a kind of writing an output
PAIRS = {
    "safetensors": "w4a16", "PyTorch `.bin`": "gguf_q4_k_m", "GGUF": "nf4", "bitsandbytes 4-bit": "none", "HQQ": "hqq4",
    "compressed-tensors": "mlx_int4", "FP8 block (DeepSeek)": "nvfp4a16", "AWQ": "hqq4", "gpt-oss MXFP4": "w4a16",
}  # fmt: skip


def given(source: object, out: object, preset: str) -> list[str]:
    settings = ("quant.group_size=32",) if preset == "w4a16" else ()
    return [f"model.path={source}", "model.name=model", f"output.path={out}", f"quant={preset}", *settings]


@pytest.mark.parametrize("row", PAIRS)
def test_a_source_of_each_kind_goes_from_store_to_store(
    row: str, tmp_path: Path, place_of: Callable[[str], Place], mine: Hub, weightmill: Any
) -> None:
    folder, preset = next(iter(SOURCES[row].values()))(tmp_path), PAIRS[row]
    assert weightmill("run", *given(folder, tmp_path / "here", preset)).status == 0
    wanted = comparable(snapshot(tmp_path / "here"))

    bucket = place_of("s3")
    ran = weightmill("run", *given(fill(bucket, folder, "model"), bucket.address / "out", preset))
    assert ran.status == 0, ran.err
    assert comparable(contents(bucket.address / "out")) == wanted

    mine.put("org/model", snapshot(folder))
    ran = weightmill("run", *given("hf://org/model", "hf://me/out", preset))
    assert ran.status == 0, ran.err
    assert comparable(published(mine, "me/out")) == wanted
