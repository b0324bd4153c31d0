"""Which engines load an output, and how: the end of its model card, and its metadata for the Hub.

They are those of README's table of quantizations; a row of BY_ENGINE is a scheme's engine, written in a layout of
transformers, and a row of BY_LAYOUT every other layout.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.planning.plan import Plan, TargetPlan
from loaders.architectures.diffusers import class_of


@dataclass(frozen=True, slots=True)
class Loading:
    """engine: who loads the output, in words. library: the Hub's name of it, if it has one. code: what to type."""

    engine: str
    library: str | None
    language: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """The output that is loaded: its plan, and the name to load it by (a Hub id, or DIR)."""

    plan: Plan
    target: TargetPlan
    where: str

    @property
    def config(self) -> Mapping[str, Any]:
        return self.target.config or self.plan.checkpoint.config


def loading_of(plan: Plan, target: TargetPlan, where: str = "DIR") -> Loading:
    """Return how an output is loaded; `where` is what it is loaded by."""
    subject, layout = Subject(plan, target, where), target.target.layout.name
    if layout != "hf":
        return BY_LAYOUT[layout](subject)
    engines = {d.scheme.engine for d in target.decisions if d.scheme is not None and d.action == "quantize"}
    return _transformers(subject, next(iter(sorted(engines)), "plain"))


# engine of the schemes -> who loads them, and what to install
BY_ENGINE = {
    "bitsandbytes": ("transformers with bitsandbytes", "transformers bitsandbytes"),
    "bitnet": ("transformers (its quantization `bitnet`)", "transformers accelerate"),
    "hqq": ("transformers 4 with hqq", "'transformers<5' hqq"),
    "compressed-tensors": ("vLLM, and transformers with compressed-tensors", "transformers compressed-tensors"),
    "plain": ("transformers", "transformers"),
}


def _transformers(subject: Subject, engine: str) -> Loading:
    who, packages = BY_ENGINE[engine]
    if not subject.config.get("architectures") and not subject.config.get("model_type"):
        return _tensors(subject)
    kept = subject.plan.checkpoint.quantized_by
    if engine == "plain" and kept is not None and all(d.tensor.decode is None for d in subject.target.decisions):
        return Loading(f"what loads its source, which is quantized by {kept}", "transformers")
    name = _class_name(subject.config.get("architectures"))
    code = [
        f"# pip install {packages}",
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("{subject.where}")',
    ]
    if engine == "compressed-tensors":
        code += ["", f"# or: vllm serve {subject.where}"]
    return Loading(who, "transformers", "python", "\n".join(code))


def _class_name(architectures: Any) -> str:
    """Return the class of transformers to load a model by; names of a checkpoint's own code are not taken."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(first, str) and first.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    if isinstance(first, str) and first.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText"
    return "AutoModel"


def _tensors(subject: Subject) -> Loading:
    code = ["from loaders import load_weights", "", f'weights = load_weights("{subject.where}")']
    return Loading("no engine that is known here: without a config.json these are tensors by name", None, "python",
                   "\n".join(code))  # fmt: skip


def _hqq(subject: Subject) -> Loading:
    code = [
        "# pip install hqq",
        "from hqq.models.hf.base import AutoHQQHFModel",
        "",
        f'model = AutoHQQHFModel.from_quantized("{subject.where}")',
    ]
    return Loading("hqq", "hqq", "python", "\n".join(code))


def _mlx(subject: Subject) -> Loading:
    code = [
        "# pip install mlx-lm",
        "from mlx_lm import generate, load",
        "",
        f'model, tokenizer = load("{subject.where}")',
        'print(generate(model, tokenizer, prompt="Hello"))',
    ]
    return Loading("mlx-lm", "mlx", "python", "\n".join(code))


def _gguf(subject: Subject) -> Loading:
    first = shlex.quote(f"{subject.where}/{subject.target.finals[0].name}")
    return Loading("llama.cpp", "gguf", "sh", f"llama-cli -m {first} -p Hello")


def _packed(subject: Subject) -> Loading:
    return Loading("moeflux, by its format (it was not run)", None)


def _diffusers(subject: Subject) -> Loading:
    name = "DiffusionPipeline" if subject.plan.checkpoint.components else class_of(subject.config) or "AutoModel"
    name = name if name.isidentifier() else "AutoModel"
    code = [
        "# pip install diffusers transformers bitsandbytes",
        f"from diffusers import {name}",
        "",
        f'model = {name}.from_pretrained("{subject.where}")',
    ]
    return Loading("diffusers, with bitsandbytes where it is quantized", "diffusers", "python", "\n".join(code))


BY_LAYOUT: dict[str, Callable[[Subject], Loading]] = {
    "hqq": _hqq,
    "mlx": _mlx,
    "gguf": _gguf,
    "packed": _packed,
    "diffusers": _diffusers,
}
