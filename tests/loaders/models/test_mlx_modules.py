"""mlx-lm's models, from our outputs and from originals on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import BadSpec
from loaders.models import (
    Backend,
    LoadingStrategy,
    QuantizationConfig,
    QuantizationMethod,
    load_model_and_tokenizer,
    mlx_modules,
)
from loaders.places import DEMO
from loaders.quantization.schemes.mlx_affine import MlxAffine
from tests.conftest import Ran
from tests.engines import mlx_lm_or_skip
from tests.making import write_moe
from tests.processes import start

mx = pytest.importorskip("mlx.core")
mlx_lm_or_skip()
pytest.importorskip("torch")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


def logits(model: Any) -> Any:
    return model(mx.arange(3, 40)[None]).astype(mx.float32)


def test_an_original_encoded_on_the_way_is_our_output(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", "quant=mlx_int4", "cluster=local", f"output.path={output}").status == 0
    wanted = logits(load_model_and_tokenizer(output, "mlx")[0])
    model, tokenizer = load_model_and_tokenizer(DEMO, "mlx", quantize="mlx_int4", dtype="auto")
    assert mx.array_equal(logits(model), wanted)
    assert tokenizer.encode("the")
    lazy = load_model_and_tokenizer(output, "mlx", strategy=LoadingStrategy.UNIFIED_MEMORY)[0]
    assert mx.array_equal(logits(lazy), wanted)
    low = load_model_and_tokenizer(DEMO, "mlx", quantize="mlx_int4", dtype="auto", low_memory=True)[0]
    assert mx.array_equal(logits(low), wanted)


def test_plain_weights_are_mlx_lms_own() -> None:
    from mlx_lm import load

    theirs = logits(load(str(DEMO))[0])
    assert mx.array_equal(logits(load_model_and_tokenizer(DEMO, "mlx", dtype="auto")[0]), theirs)


@pytest.mark.parametrize("quantize", [None, "mlx_int4", "mlx_int8"])
def test_weights_are_in_float16_unless_another_dtype_is_asked_for(quantize: str | None) -> None:
    """Scales among them; a checkpoint's own dtype is "auto"."""
    from mlx.utils import tree_flatten

    for dtype, wanted in ((None, mx.float16), ("float32", mx.float32), ("auto", mx.bfloat16)):
        model = load_model_and_tokenizer(DEMO, "mlx", quantize=quantize, dtype=dtype)[0]
        found = {weight.dtype for _, weight in tree_flatten(model.parameters())}
        assert found == {wanted, *([mx.uint32] if quantize else [])}, dtype


def test_mlx_schemes_for_a_macs_gpu_are_mlx_lms_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch alone: what MPS computes needs a Mac."""
    loaded = []
    monkeypatch.setattr(mlx_modules, "load", lambda checkpoint, config: loaded.append(config))
    config = QuantizationConfig(QuantizationMethod.MLX_INT4, bits=4, group_size=32)
    load_model_and_tokenizer(DEMO, Backend.MPS, quantization_config=config)
    assert loaded[0].scheme == MlxAffine(4, 32)
    assert loaded[0].loading_strategy is LoadingStrategy.UNIFIED_MEMORY
    with pytest.raises(BadSpec, match="torch .* finds no such device"):
        load_model_and_tokenizer(DEMO, Backend.MPS)


def test_experts_are_stacked(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="experts"):
        load_model_and_tokenizer(write_moe(tmp_path / "moe"), "mlx", quantize="mlx_int4")  # of which one layer has none


def test_what_is_of_other_backends_is_refused() -> None:
    with pytest.raises(BadSpec, match="streaming is for models of transformers"):
        load_model_and_tokenizer(DEMO, "mlx", strategy=LoadingStrategy.STREAMING)
    with pytest.raises(BadSpec, match="low_memory: MLX's models are of one process"):
        load_model_and_tokenizer(DEMO, "mlx", low_memory=True, rank=1, world_size=2)
    with pytest.raises(BadSpec, match="MLX has one memory"):
        load_model_and_tokenizer(DEMO, "mlx", offload_to_cpu=True)
    with pytest.raises(BadSpec, match="give backend='mlx'"):
        load_model_and_tokenizer(DEMO, "cpu", quantize="mlx_int4")


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from loaders.models import load_model_and_tokenizer
load_model_and_tokenizer(sys.argv[1], "mlx")
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_of_open_files_stays_as_it_is() -> None:
    process = start("-W", "ignore", "-c", FEW_FILES, DEMO)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "(300, 300)"
