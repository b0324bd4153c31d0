"""Quantized models that are loaded here are, to transformers, as its own: it saves them, and reads them back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import BadSpec
from loaders.models import LoadingStrategy, load_model_and_tokenizer
from loaders.places import DEMO
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from tests.conftest import Ran

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
IDS = torch.arange(3, 40)[None]
MARKS = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def bytes_of(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


def load(path: Path = DEMO, **settings: Any) -> Any:
    return load_model_and_tokenizer(path, "cpu", **settings)[0]


@pytest.mark.quick
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("is_output", [True, False])
def test_what_save_pretrained_writes_is_read_back_with_equal_logits(
    scheme: str, is_output: bool, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    """Quantized on the way, and from an output with a layer that stays plain; by transformers, and here."""
    if is_output:
        keeps = "rules=[{name: layers.1.mlp.down_proj, action: keep}]"
        job = ("model=demo", f"quant={scheme}", "cluster=local", "tracking=none", f"output.path={tmp_path / 'out'}")
        assert weightmill("run", *job, keeps).status == 0
    model = load(tmp_path / "out") if is_output else load(quantize=scheme)
    wanted = logits(model)  # the first use: some CPUs have the weights packed anew
    model.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"}).eval()
    for each in (theirs, load(tmp_path / "saved"), model):
        assert torch.equal(logits(each), wanted)
    assert [getattr(model, mark, None) for mark in MARKS] == [getattr(theirs, mark, None) for mark in MARKS]
    assert model.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()
    assert type(model.hf_quantizer) is type(theirs.hf_quantizer)
    assert isinstance(model.model.layers[1].mlp.down_proj, torch.nn.Linear)


@pytest.mark.parametrize("scheme", [Bnb4("nf4"), Bnb4("fp4", 128, double_quant=True, storage="bfloat16")])
def test_weights_are_told_as_they_were_quantized_whatever_was_computed_with_them(scheme: Bnb4) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes packs them anew at their first use."""
    model, unused = load(quantize=scheme), load(quantize=scheme)
    for _ in range(2):
        before, wanted = logits(model), unused.state_dict()
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(bytes_of(found[name]) == bytes_of(wanted[name]) for name in wanted)
        assert torch.equal(logits(model), before)
    used, fresh = (each.dequantize().model.layers[0].mlp.up_proj for each in (model, unused))
    assert type(used) is torch.nn.Linear
    assert torch.equal(used.weight, fresh.weight)


def test_a_weight_that_others_quantize_again_is_told_as_it_is_now() -> None:
    """As peft does when it merges an adapter: what we stored of the weight before is gone with it."""
    model = load(quantize="nf4")
    linear = model.model.layers[0].mlp.up_proj
    before = linear.state_dict()["weight.absmax"]
    ones = torch.ones(linear.out_features, linear.in_features, dtype=torch.bfloat16)
    linear.weight = type(linear.weight)(ones, compress_statistics=False, quant_type="nf4", module=linear).to("cpu")
    assert linear.state_dict()["weight.absmax"].eq(1).all()
    logits(model)
    assert not torch.equal(linear.state_dict()["weight.absmax"].flatten(), before.flatten())


@pytest.mark.quick
def test_a_streaming_model_and_hqq_refuse_save_pretrained(tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    for settings, said in (
        ({"strategy": "streaming"}, "no weights of its own to save; load it with strategy='full', or have a job"),
        ({"strategy": "streaming", "quantize": "nf4"}, "no weights of its own to save"),
        ({"quantize": "hqq4"}, r"transformers does not load weights of HQQ; a job .* weightmill.save"),
    ):
        model = load(**settings)
        with pytest.raises(BadSpec, match=f"^save_pretrained: .*{said}"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        if settings.get("strategy") is not None:
            model.streamer.close()
    load(strategy=LoadingStrategy.FULL).save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_layers_that_transformers_would_not_convert_are_not_saved(tmp_path: Path) -> None:
    """Falcon's are a class of its own: bitsandbytes' modules compute, and transformers would not look for them."""
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    model = load(tmp_path / "falcon", quantize="int8")
    with pytest.raises(BadSpec, match=r"^save_pretrained: transformers would look for other quantized layers.* a job"):
        model.save_pretrained(tmp_path / "saved")


def test_an_adapter_is_saved_where_the_model_is_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("hqq")
    model = load(quantize="hqq4")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["up_proj"]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_trainer_takes_quantized_models_that_have_something_to_train() -> None:
    check = pytest.importorskip("transformers.trainer_utils").validate_quantization_for_training
    with pytest.raises(ValueError, match="purely quantized models"):
        check(load(quantize="nf4"))
    check(load(quantize="nf4", llama_pro_blocks=1))
    peft = pytest.importorskip("peft")
    check(peft.get_peft_model(load(quantize="nf4"), peft.LoraConfig(r=4, target_modules=["up_proj"])))
