"""Loaders as objects, recommendations that are passed on, and what a load is told of ranks, devices and files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders import get_recommended_loader_config
from loaders.errors import BadSpec
from loaders.models import (
    Backend,
    LoadingStrategy,
    ModelLoader,
    ModelLoaderFactory,
    ModelLoadingConfig,
    QuantizationConfig,
    QuantizationMethod,
    QuantizedModelLoader,
    StandardModelLoader,
    load_model_and_tokenizer,
    loading,
    open_weights,
    opening,
    process_rank,
)
from loaders.models.recommended import config_of
from loaders.places import DEMO
from tests.conftest import Ran

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
NF4 = QuantizationConfig(QuantizationMethod.BNB_NF4)
IDS = torch.arange(3, 20)[None]


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def test_a_loader_is_created_for_a_config_and_loads_what_the_function_does() -> None:
    pytest.importorskip("bitsandbytes")
    plain = ModelLoaderFactory.create_loader(ModelLoadingConfig(DEMO, Backend.CPU))
    packed = ModelLoaderFactory.create_loader(ModelLoadingConfig(str(DEMO), Backend.CPU, LoadingStrategy.FULL, NF4))
    assert type(plain) is StandardModelLoader
    assert type(packed) is QuantizedModelLoader
    assert torch.equal(logits(plain.load_model()), logits(load_model_and_tokenizer(DEMO, "cpu")[0]))
    wanted = logits(load_model_and_tokenizer(config=packed.config)[0])
    assert torch.equal(logits(packed.load_model()), wanted)
    assert packed.load_tokenizer()("the")["input_ids"]
    assert issubclass(QuantizedModelLoader, ModelLoader)


def test_a_loader_of_another_kind_is_refused() -> None:
    with pytest.raises(BadSpec, match="StandardModelLoader leaves weights as they are"):
        StandardModelLoader(ModelLoadingConfig(DEMO, quantize="nf4")).load_model()
    with pytest.raises(BadSpec, match="is not quantized; give a quantization_config"):
        QuantizedModelLoader(ModelLoadingConfig(DEMO)).load_model()
    with pytest.raises(BadSpec, match="model_name: expected a folder"):
        ModelLoaderFactory.create_loader(ModelLoadingConfig())
    with pytest.raises(BadSpec, match="expected a ModelLoadingConfig"):
        ModelLoaderFactory.create_loader({"model_name": DEMO})  # type: ignore[arg-type]
    with pytest.raises(BadSpec, match="name_or_path: .* was given, and in config model_name="):
        load_model_and_tokenizer("other", config=ModelLoadingConfig(DEMO))
    with pytest.raises(TypeError, match="abstract"):
        ModelLoader(ModelLoadingConfig(DEMO))  # type: ignore[abstract]


def test_a_loader_of_ones_own_that_asks_the_abstract_one_is_told_which_to_extend() -> None:
    class Mine(ModelLoader):
        def load_model(self) -> Any:
            return super().load_model()  # type: ignore[safe-super]

    with pytest.raises(NotImplementedError, match="extend StandardModelLoader or QuantizedModelLoader"):
        Mine(ModelLoadingConfig(DEMO)).load_model()


# --- recommendations


def test_a_recommendation_is_passed_on() -> None:
    advice = get_recommended_loader_config(DEMO, "cpu", 4)
    loader = ModelLoaderFactory.create_loader(advice)
    assert loader.config == ModelLoadingConfig(str(DEMO), "cpu")
    assert torch.equal(logits(loader.load_model()), logits(load_model_and_tokenizer(DEMO, "cpu")[0]))
    assert load_model_and_tokenizer(DEMO, config=advice, dtype="float32")[0].dtype == torch.float32


def test_settings_in_the_place_of_a_name_are_refused() -> None:
    advice = get_recommended_loader_config(DEMO, "cpu", 4)
    for given, said in (
        (advice, "a Recommendation; give it as config="),
        (ModelLoadingConfig(DEMO), "a ModelLoadingConfig; give it as config="),
        (5, "5"),
    ):
        with pytest.raises(
            BadSpec, match=f"^name_or_path: expected a folder, a URL or a name of the Hub, found {said}$"
        ):
            load_model_and_tokenizer(given)


def test_a_recommendation_quantizes_as_far_as_the_memory_asks() -> None:
    """To what modules can hold: the demo takes 3.87 MB plain, 2.22 in int8, 1.47 in nf4, 1.05 in hqq2."""
    reserve = get_recommended_loader_config(DEMO, "cpu", 4).reserve_bytes / 1e9
    found = {
        room: config_of(get_recommended_loader_config(DEMO, "cpu", reserve + room / 1e3), None, {})
        for room in (10, 3, 2, 1.2, 1)
    }
    assert [found[room].quantize for room in found] == [None, "int8", "nf4", "hqq2", None]
    assert found[1].strategy is LoadingStrategy.STREAMING
    assert found[1].memory_budget_mb == pytest.approx(1, rel=1e-3)
    assert config_of(get_recommended_loader_config(DEMO, "cuda", 100), None, {}).backend is Backend.CUDA
    small = get_recommended_loader_config(DEMO, "mlx", reserve + 0.9e-3)
    with pytest.raises(BadSpec, match="nothing fits into 0.9 MB for weights: none takes"):
        config_of(small, None, {})


def test_a_recommendation_of_a_number_of_parameters_takes_the_name_later() -> None:
    advice = get_recommended_loader_config(8_000_000_000, "cpu", 24)
    assert advice.model_name is None
    assert load_model_and_tokenizer(DEMO, config=advice)[0].dtype == torch.bfloat16
    with pytest.raises(BadSpec, match="model_name: expected a folder"):
        ModelLoaderFactory.create_loader(advice)


# --- ranks, devices, files


def test_ranks_that_are_not_the_groups_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"is_initialized": True, "get_rank": 1, "get_world_size": 2}
    for name, value in group.items():
        monkeypatch.setattr(process_rank.dist, name, lambda value=value: value)
    monkeypatch.setattr(loading, "fill_model", lambda *given: pytest.fail("the work began"))
    for settings in ({"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 4}):
        with pytest.raises(BadSpec, match=r"rank: rank \d of world_size=\d was given, and .* rank 1 of 2"):
            load_model_and_tokenizer(DEMO, "cpu", low_memory=True, **settings)
    for settings in ({}, {"rank": 1, "world_size": 2}):
        model = load_model_and_tokenizer(DEMO, "cpu", low_memory=True, **settings)[0]
        assert all(parameter.is_meta for parameter in model.parameters())


def test_without_a_group_ranks_are_those_given() -> None:
    other = load_model_and_tokenizer(DEMO, backend="cpu", low_memory=True, rank=1, world_size=2)[0]
    assert all(parameter.is_meta for parameter in other.parameters())
    first = load_model_and_tokenizer(DEMO, backend="cpu", low_memory=True, rank=0, world_size=2)[0]
    assert not any(parameter.is_meta for parameter in first.parameters())
    whole = load_model_and_tokenizer(DEMO, backend="cpu", rank=1, world_size=2)[0]  # each its own, with FULL
    assert not any(parameter.is_meta for parameter in whole.parameters())


@pytest.mark.parametrize("strategy", list(LoadingStrategy))
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(
    strategy: LoadingStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_weights", lambda *given, **settings: pytest.fail("files were opened"))
    limits = {"max_memory": {"cpu": "8GB", "cuda:77": "8GB"}}
    settings: dict[str, Any]
    for settings in ({"backend": "mps"}, {"device": "cuda:77"}, limits):
        if settings is limits and strategy is LoadingStrategy.STREAMING:
            continue
        with pytest.raises(BadSpec, match="finds no such device here"):
            load_model_and_tokenizer(DEMO, strategy=strategy, **settings)


def test_workers_read_and_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are asked for, under either name; -1, as None, leaves it to the threads that all loads share."""
    asked: list[int | None] = []

    def counted(*given: Any, workers: int | None, **settings: Any) -> Any:
        asked.append(workers)
        return open_weights(*given, workers=workers, **settings)

    monkeypatch.setattr(loading, "open_weights", counted)
    for settings in ({"loading_workers": 3}, {"workers": 2}, {"loading_workers": -1}, {}):
        load_model_and_tokenizer(DEMO, "cpu", quantize="hqq8", **settings)
    assert asked == [3, 2, None, None]


def test_of_both_forms_of_files_the_one_asked_for_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.md"))
    from safetensors.torch import load_file

    tensors = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    torch.save({name: each * 2 for name, each in tensors.items()}, folder / "pytorch_model.bin")
    model, theirs = (load_model_and_tokenizer(folder, "cpu", use_safetensors=each)[0] for each in (True, False))
    assert torch.equal(theirs.model.norm.weight, 2 * model.model.norm.weight)
    with pytest.raises(BadSpec, match="pytorch"):
        load_model_and_tokenizer(DEMO, "cpu", use_safetensors=False)


def test_steps_are_logged_where_asked_for_by_the_first_rank(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weightmill")
    load_model_and_tokenizer(DEMO, "cpu")
    load_model_and_tokenizer(DEMO, "cpu", verbose=True, low_memory=True, rank=1, world_size=2)
    assert not caplog.messages
    load_model_and_tokenizer(DEMO, "cpu", verbose=True, quantize="hqq8")
    said = "\n".join(caplog.messages)
    for part in (
        "GB of safetensors, for cpu",
        "21 of them quantized to hqq8; strategy full",
        "loaded LlamaForCausalLM",
    ):
        assert part in said


def test_limits_of_memory_count_quantized_weights_as_stored() -> None:
    pytest.importorskip("bitsandbytes")
    assert load_model_and_tokenizer(DEMO, "cpu", quantize="nf4", max_memory={"cpu": "1.9MB"})[0] is not None
    with pytest.raises(BadSpec, match="max_memory: the model takes"):
        load_model_and_tokenizer(DEMO, "cpu", quantize="int8", max_memory={"cpu": "1.9MB"})


def test_blocks_are_shared_out_by_what_is_stored_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over devices that need not be here: the demo's blocks take 1.1 MB plain, and 0.32 in nf4."""
    found = []
    monkeypatch.setattr(loading, "fill_model", lambda *given: found.append(given[3]))
    monkeypatch.setattr(loading, "hold_to", lambda model, places: model)
    monkeypatch.setattr(opening, "torch_device", lambda name: None)
    limits = {"cuda:0": 1_300_000, "cuda:1": 1_300_000}
    load_model_and_tokenizer(DEMO, "cuda", quantize="nf4", max_memory=limits)
    places = [found[0](f"model.layers.{number}.mlp.up_proj.weight") for number in range(3)]
    assert places == sorted(places)
    assert {*places} == {"cuda:0", "cuda:1"}
    with pytest.raises(BadSpec, match="max_memory: "):
        load_model_and_tokenizer(DEMO, "cuda", max_memory=limits)


def test_a_scheme_that_no_module_here_holds_is_refused(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    from loaders import preset

    for strategy in LoadingStrategy:
        with pytest.raises(BadSpec, match="quantize: no modules for"):
            load_model_and_tokenizer(DEMO, "cpu", quantize=preset("w8a16").scheme, strategy=strategy)
    output = tmp_path / "out"
    assert weightmill("run", "model=demo", "quant=nf4", "cluster=local", f"output.path={output}").status == 0
    for strategy in LoadingStrategy:
        with pytest.raises(BadSpec, match="is quantized already"):
            load_model_and_tokenizer(output, "cpu", quantize="nf4", strategy=strategy)


def test_what_stops_the_first_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none waits for weights that do not come."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "unusable_4bit", lambda tensors: "matrix cannot run here")
    for rank in (0, 1):
        with pytest.raises(BadSpec, match="^quantize: matrix cannot run here"):
            load_model_and_tokenizer(DEMO, "cpu", quantize="nf4", low_memory=True, rank=rank, world_size=2)
