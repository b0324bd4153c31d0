"""The iterators as functions: called as vLLM's are, with the tensors that other libraries read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loaders
from loaders import BadSpec
from tests.loaders.strategies.test_strategies import made, raw_bytes

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine
# A program written against vLLM's functions, as a user has it: only the import is ours.
PROGRAM = """
from loaders import (
    fastsafetensors_weights_iterator, multi_thread_safetensors_weights_iterator, runai_safetensors_weights_iterator,
    safetensors_weights_iterator,
)

def load_weights(files, how, use_tqdm):
    if how == "multi_thread":
        weights = multi_thread_safetensors_weights_iterator(files, use_tqdm, max_workers=4)
    elif how == "fast":
        weights = fastsafetensors_weights_iterator(files, use_tqdm)
    elif how == "runai":
        weights = runai_safetensors_weights_iterator(files, use_tqdm)
    else:
        weights = safetensors_weights_iterator(files, use_tqdm, how)
    return {name: param for name, param in weights}
"""
NEEDS = {"fast": "fastsafetensors", "runai": "runai_model_streamer"}


@pytest.fixture
def load() -> Callable[..., dict[str, Any]]:
    namespace: dict[str, Any] = {}
    exec(PROGRAM, namespace)
    return namespace["load_weights"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["lazy", "eager", "prefetch", None, "multi_thread", "fast", "runai"])
def test_a_program_written_for_vllm_runs(how: str | None, load: Callable[..., Any], tmp_path: Path) -> None:
    if how in NEEDS:
        pytest.importorskip(NEEDS[how])
    wanted = {name: raw.data.tobytes() for name, raw in made("safetensors", tmp_path / "m").items()}
    files = [str(path) for path in sorted((tmp_path / "m").glob("*.safetensors"))]
    found = load(files, how, False)
    assert {name: raw_bytes(param.cpu()) for name, param in found.items()} == wanted
    assert found["layers.1.up.weight"].dtype == torch.bfloat16


def test_pytorch_files_are_iterated_too(tmp_path: Path) -> None:
    wanted = {name: raw.data.tobytes() for name, raw in made("pytorch", tmp_path / "m").items()}
    files = sorted((tmp_path / "m").glob("*.bin"))
    for found in (
        loaders.pt_weights_iterator(files, False),
        loaders.pt_weights_iterator(files, False, {"": "cpu"}),
        loaders.multi_thread_pt_weights_iterator(files, False, "cpu", 2),
        loaders.multi_thread_pt_weights_iterator(hf_weights_files=files, use_tqdm_on_load=False, max_workers=2),
    ):
        assert {name: raw_bytes(param) for name, param in found} == wanted
    with pytest.raises(BadSpec, match="pt_load_map_location: expected one device"):
        loaders.pt_weights_iterator(files, False, {"cuda:0": "cpu", "cuda:1": "cuda"})


def test_a_gguf_gives_types_and_blocks(tmp_path: Path) -> None:
    wanted = made("gguf", tmp_path / "m")
    [file] = (tmp_path / "m").glob("*.gguf")
    found = dict(loaders.gguf_quant_weights_iterator(str(file)))
    assert int(found["layers.2.q8.qweight_type"]) == 8  # GGML_TYPE_Q8_0
    assert tuple(found["layers.2.q8.qweight"].shape) == (8, 2 * 34)
    assert raw_bytes(found["layers.2.q8.qweight"]) == wanted["layers.2.q8.weight"].data.tobytes()
    assert found["layers.0.up.weight"].dtype == torch.bfloat16
    mapped = loaders.gguf_quant_weights_iterator(file, {"layers.2.q8.weight": "up.weight"})
    assert [name for name, _ in mapped] == ["up.qweight_type", "up.qweight"]
    made("safetensors", tmp_path / "s")
    with pytest.raises(BadSpec, match="gguf_file: expected a GGUF, found safetensors"):
        loaders.gguf_quant_weights_iterator(tmp_path / "s")


def test_progress_is_shown_by_the_first_rank_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made("safetensors", tmp_path / "m")
    list(loaders.safetensors_weights_iterator(tmp_path / "m", True))
    assert "Loading weights" in (shown := capsys.readouterr().err)
    assert re.search(r"([\d.]+)/\1 kB", shown), "all bytes came"
    list(loaders.safetensors_weights_iterator(tmp_path / "m", False))
    monkeypatch.setenv("RANK", "1")
    list(loaders.safetensors_weights_iterator(tmp_path / "m", True))
    assert capsys.readouterr().err == ""


def test_experts_of_other_ranks_are_not_read(tmp_path: Path) -> None:
    from tests.making import write_moe

    names = {name for name, _ in loaders.safetensors_weights_iterator(write_moe(tmp_path / "m"))}
    kept = dict(loaders.safetensors_weights_iterator(tmp_path / "m", False, "lazy", {0}))
    assert {name for name in names if ".experts." not in name or ".experts.0." in name} == set(kept) < names


@pytest.mark.quick
def test_bad_requests_are_refused_at_the_call(tmp_path: Path) -> None:
    made("safetensors", tmp_path / "m")
    with pytest.raises(BadSpec, match="expected lazy, eager or prefetch, found 'torchao'"):
        loaders.safetensors_weights_iterator(tmp_path / "m", False, "torchao")
    for iterated in (loaders.safetensors_weights_iterator, loaders.pt_weights_iterator):
        with pytest.raises(BadSpec, match="use_tqdm_on_load: expected True or False, found 'cuda'; no device is given"):
            iterated(tmp_path / "m", "cuda")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        loaders.multi_thread_safetensors_weights_iterator([tmp_path / "m" / "none.safetensors"], True)
    made("gguf", tmp_path / "g")
    [gguf] = (tmp_path / "g").glob("*.gguf")
    for iterator in (loaders.safetensors_weights_iterator, loaders.pt_weights_iterator):
        with pytest.raises(
            BadSpec, match=r"hf_weights_files: .* found a GGUF at .*; gguf_quant_weights_iterator reads it"
        ):
            iterator(gguf)
