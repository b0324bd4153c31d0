"""Models loaded here train: whole, by adapters on plain and quantized weights, and in the new blocks of LLaMA Pro."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.models import load_model_and_tokenizer
from loaders.places import DEMO

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
IDS = torch.arange(3, 11)[None]
MODULES = ["q_proj", "up_proj"]


def losses(model: Any, steps: int = 2) -> list[float]:
    """Train all that takes gradients on one batch; returns the loss before each step and after the last."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        found.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [*found, float(model(input_ids=IDS, labels=IDS).loss)]


# The train types by their names, what the loader is told, and peft's settings; none trains the model itself.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "full": ({}, None),
    "lora": ({}, {}),
    "qlora": ({"quantize": "nf4"}, {}),
    "qlora_int8": ({"quantize": "int8"}, {}),
    "hqq_lora": ({"quantize": "hqq4"}, {}),
    "hqq_dora": ({"quantize": "hqq4"}, {"use_dora": True}),
    "llama_pro": ({"llama_pro_blocks": 3}, None),
    "llama_pro_nf4": ({"llama_pro_blocks": 1, "quantize": "nf4"}, None),
}
LAYERS = {"qlora": "Linear4bit", "qlora_int8": "Linear8bitLt"}


@pytest.mark.parametrize("kind", TYPES)
def test_each_train_type_learns_on_what_is_loaded(kind: str) -> None:
    settings, adapter = TYPES[kind]
    for name in {"nf4": ["bitsandbytes"], "int8": ["bitsandbytes"], "hqq4": ["hqq"]}.get(settings.get("quantize"), []):
        pytest.importorskip(name)
    model = load_model_and_tokenizer(DEMO, "cpu", dtype="float32", **settings)[0]
    if adapter is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=MODULES, **adapter))
        taken = next(m for path, m in model.named_modules() if path.endswith("layers.0.mlp.up_proj"))
        # peft's own layer for bitsandbytes, which merges into packed weights; its plain one could not.
        assert LAYERS.get(kind, type(taken).__name__) in (type(taken).__name__, type(taken.base_layer).__name__)
        assert ("bnb" in type(taken).__module__) == (kind in LAYERS)
    found = losses(model)
    assert found[-1] < found[0] - 0.01, found


@pytest.mark.parametrize("quantize", [None, "nf4", "hqq4"])
def test_llama_pro_trains_its_new_blocks_and_nothing_else(quantize: str | None) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("hqq")
    model = load_model_and_tokenizer(DEMO, "cpu", dtype="float32", quantize=quantize, llama_pro_blocks=1)[0]
    base = load_model_and_tokenizer(DEMO, "cpu", dtype="float32", quantize=quantize)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, base(IDS).logits)  # new blocks add nothing yet
    new = f"model.layers.{len(model.model.layers) - 1}."
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(new)
    }
    kinds = {type(layer.mlp.up_proj).__name__ for layer in model.model.layers[:-1]}
    assert kinds == {{None: "Linear", "nf4": "Linear4bit", "hqq4": "HQQLinear"}[quantize]}
    assert type(model.model.layers[-1].mlp.up_proj) is torch.nn.Linear
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    losses(model, steps=1)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(new) for name in changed)
