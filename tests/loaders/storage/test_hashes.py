"""Hashes of weights, whatever holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from loaders import StreamingWeightLoader, compute_weight_hash

torch = pytest.importorskip("torch")


@pytest.mark.quick
def test_equal_bits_have_equal_hashes_whatever_holds_them() -> None:
    raw = np.arange(24, dtype=np.uint16)
    wanted = xxhash.xxh3_128_hexdigest(raw.tobytes())
    as_torch = torch.from_numpy(raw.view(np.int16).copy()).view(torch.bfloat16).reshape(4, 6)
    held = [raw, raw.reshape(4, 6), raw.tobytes(), memoryview(raw), raw.astype(">u2"), as_torch, as_torch.clone()]
    assert {compute_weight_hash(each) for each in held} == {wanted}
    crooked = as_torch.t().contiguous().t()
    assert not crooked.is_contiguous()
    assert compute_weight_hash(crooked) == wanted
    assert compute_weight_hash(raw[::-1]) != wanted
    assert compute_weight_hash(np.empty(0, np.float32)) == compute_weight_hash(b"")
    assert compute_weight_hash(torch.tensor(1.0)) == compute_weight_hash(np.float32(1).tobytes())
    with pytest.raises(TypeError, match="found list"):
        compute_weight_hash([1.0])


def test_the_same_hash_whatever_the_container(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", "quant=none", "output.container=pytorch")
    assert ran.status == 0, ran.err
    one, other = (
        {name: compute_weight_hash(a) for name, a in StreamingWeightLoader().iterate_weights(root)}
        for root in (source, out)
    )
    assert one == other
