"""No code that comes with a checkpoint is run, whoever loads it, and nobody is asked whether it may."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import BadCheckpoint, BadSpec, WeightmillError
from loaders.models import evaluate, load_model_and_tokenizer
from loaders.models.foreign import check_config, hqq_model_from, mlx_model_from, mlx_tokenizer_from, model_from, no_code
from loaders.models.sensitivity import importances_of
from loaders.places import DEMO
from tests.conftest import Ran

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

AUTO = transformers.AutoModelForCausalLM
HAS_RUN = "HAS_RUN"
CODE = f"""
from pathlib import Path
Path(__file__).with_name("{HAS_RUN}").touch()
Path({{marker!r}}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
"""
CONFIG = {
    "model_type": "evilmodel",
    "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"},
    "model_file": "evil.py",
}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"}
KERNEL = {"attn_implementation": "stranger/kernel"}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that makes a copy of the demo with code beside it; somebody answers y to whatever is asked."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)

    def make(config: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
        folder = tmp_path / "evil"
        shutil.copytree(DEMO, folder)
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / HAS_RUN)))
        return folder

    yield make  # type: ignore[misc]
    assert asked == []
    assert not list(tmp_path.rglob(HAS_RUN))


LOADS: dict[str, Callable[[Path], Any]] = {
    "load_model_and_tokenizer": lambda folder: load_model_and_tokenizer(folder, "cpu"),
    "streaming": lambda folder: load_model_and_tokenizer(folder, "cpu", strategy="streaming"),
    "mlx-lm": lambda folder: load_model_and_tokenizer(folder, "mlx"),
    "mlx-lm's own model": lambda folder: mlx_model_from(folder, is_lazy=True),
    "evaluating": lambda folder: evaluate(folder, DEMO, tokens=300, window=64),
    "importances": lambda folder: importances_of(folder, "a text " * 1000, 256),
    "hqq": lambda folder: hqq_model_from(folder, torch.float32, "cpu"),
}


@pytest.mark.parametrize("what", LOADS)
def test_code_of_a_config_is_refused(what: str, evil: Callable[..., Path]) -> None:
    folder = evil(CONFIG, {})
    if what == "hqq":
        shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "qmodel.pt")
    with pytest.raises((WeightmillError, ValueError, OSError, KeyError)):
        LOADS[what](folder)


@pytest.mark.parametrize("what", ["load_model_and_tokenizer", "mlx-lm", "evaluating", "importances"])
def test_code_of_a_tokenizer_does_not_run(what: str, evil: Callable[..., Path]) -> None:
    folder = evil({}, TOKENIZER)
    # A tokenizer.json beside it may be loaded by transformers' own class.
    with suppress(WeightmillError, ValueError, OSError, KeyError):
        LOADS[what](folder)


def test_a_tokenizer_that_mlx_lm_loads_is_of_this_folder_alone(evil: Callable[..., Path]) -> None:
    pytest.importorskip("mlx_lm")
    folder = evil({}, TOKENIZER)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
    with pytest.raises((ValueError, OSError)):
        mlx_tokenizer_from(folder)


def test_calls_inside_of_libraries_do_not_ask_either(evil: Callable[..., Path]) -> None:
    """They may leave open whether code may run, whatever they were told."""
    folder = evil(CONFIG, TOKENIZER)
    with no_code(), pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(str(folder))
    asking: Any = transformers.dynamic_module_utils
    assert asking.TIME_OUT_REMOTE_CODE > 0  # a process's own calls ask as before


DEEP: Any = "stranger/kernel"
for _ in range(20):
    DEEP = {"": [DEEP]}


@pytest.mark.parametrize(
    "config",
    [
        KERNEL,
        {"text_config": KERNEL},
        {"attn_implementation": {"": "stranger/kernel"}},
        {"attn_implementation": {"text_config": {"": "stranger/kernel"}}},
        {"text_config": {"attn_implementation": {"a": {"": "stranger/kernel"}}}},
        {"attn_implementation": DEEP},
    ],
)
def test_code_of_the_hub_is_refused_by_name(config: dict[str, Any], evil: Callable[..., Path]) -> None:
    folder = evil(config, {})
    said = r"attn_implementation is 'stranger/kernel', code of the Hub, which is never run"
    with pytest.raises(BadCheckpoint, match=said):
        model_from(transformers.AutoModelForCausalLM, folder)
    with pytest.raises(BadCheckpoint, match=said):
        load_model_and_tokenizer(folder, "cpu")


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_experts_implementation", "experts_implementation"])
def test_whatever_setting_names_code_of_the_hub_is_refused(key: str) -> None:
    with pytest.raises(BadCheckpoint, match=rf"{key} is 'stranger/kernel'"):
        check_config({"a": [{key: {"b": {"": "stranger/kernel"}}}]})


def test_a_config_that_another_config_names_is_checked(evil: Callable[..., Path]) -> None:
    folder = evil({"configuration_files": ["config.4.0.0.json"]}, {})
    (folder / "config.4.0.0.json").write_text(json.dumps({**json.loads((DEMO / "config.json").read_text()), **KERNEL}))
    with pytest.raises(BadCheckpoint, match="stranger/kernel"):
        model_from(transformers.AutoModelForCausalLM, folder)


def test_attention_that_is_not_installed_is_said_in_our_words(
    evil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would get it from the Hub, had it the package kernels."""
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True)
    folder = evil({"attn_implementation": "flash_attention_3"}, {})
    for load in (lambda: load_model_and_tokenizer(folder, "cpu"), lambda: model_from(AUTO, folder)):
        with pytest.raises(BadSpec, match="attn_implementation asks for FlashAttention"):
            load()


def test_an_adapter_beside_a_model_is_not_loaded_with_it(evil: Callable[..., Path]) -> None:
    """peft, if it were to read this file, would match a stranger's pattern, and fail for want of the adapter."""
    pytest.importorskip("peft")
    folder = evil({}, {})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": "(a|a)*$"}')
    model_from(AUTO, folder)
    load_model_and_tokenizer(folder, "cpu")


def test_a_job_that_reads_by_transformers_runs_none(
    evil: Callable[..., Path], tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    folder = evil(CONFIG, TOKENIZER)
    (tmp_path / "text.txt").write_text("a text " * 2000)
    ran = weightmill(
        "run", f"model.path={folder}", "quant=auto", "quant.engine=transformers", "quant.target_bits=6.5",
        f"quant.calibration={tmp_path / 'text.txt'}", f"output.path={tmp_path / 'out'}",
    )  # fmt: skip
    assert ran.status in (1, 2)
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
