"""Which engines load an output, and how: the end of its model card, and its metadata for the Hub.

They are those of README's table of quantizations; a row of BY_ENGINE is a scheme's engine, written in a layout of
transformers, and a row of BY_LAYOUT every other layout.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from jobs.planning.plan import Plan, TargetPlan
from jobs.report.tables import whole
from loaders.architectures.diffusers import class_of
from loaders.layouts import BY_ENGINE as LAYOUT_OF
from loaders.layouts.compressed_tensors import is_asymmetric
from loaders.presets.catalog import preset, preset_names
from loaders.quantization.schemes.compressed_tensors_fp4 import CompressedMxfp4, CompressedNvfp4
from loaders.storage.address import Address
from loaders.storage.hub.store import Place


@dataclass(frozen=True, slots=True)
class Loading:
    """How an output is loaded.

    engine: who loads it, in words. library: the Hub's name of it, if it has one. code: what to type. not_in: what might
    be thought to load it, and does not.
    """

    engine: str
    library: str | None
    language: str = ""
    code: str = ""
    not_in: str = ""


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


# engine of the schemes -> who loads them, what to install, and who does not load them
BY_ENGINE = {
    "bitsandbytes": ("transformers with bitsandbytes", "transformers accelerate bitsandbytes", "mlx-lm, llama.cpp"),
    "bitnet": ("transformers (its quantization `bitnet`)", "transformers accelerate", "mlx-lm, llama.cpp"),
    "hqq": ("transformers 4 with hqq", "'transformers<5' accelerate hqq", "transformers 5, vLLM, mlx-lm, llama.cpp"),
    "compressed-tensors": (
        "vLLM, and transformers with compressed-tensors",
        "transformers accelerate compressed-tensors",
        "mlx-lm, llama.cpp",
    ),
    "plain": ("transformers", "transformers", ""),
}  # fmt: skip
# Likewise of the layouts other than transformers'; without what to install.
ELSEWHERE = {
    "hqq": ("hqq", "transformers, vLLM, mlx-lm, llama.cpp"),
    "mlx": ("mlx-lm", "transformers, vLLM, llama.cpp"),
    "gguf": ("llama.cpp", "mlx-lm; transformers decodes it to floats, where it knows the architecture"),
    "packed": ("moeflux, by its format (it was not run)", "transformers, vLLM, mlx-lm, llama.cpp"),
    "diffusers": ("diffusers, with bitsandbytes where it is quantized", "transformers alone"),
}


def loaded_by(group: str, option: str) -> list[str]:
    """Return lines about who loads what a choice of a quantization, or of an output's layout, makes, and who does not.

    Nothing for other groups.
    """
    if group == "output" and option in ELSEWHERE:
        who, others = ELSEWHERE[option]
    elif group == "quant" and option in preset_names():
        engine = preset(option).scheme.engine
        layout = LAYOUT_OF[engine]
        who, others = ELSEWHERE[layout] if layout in ELSEWHERE else (BY_ENGINE[engine][0], BY_ENGINE[engine][2])
    else:
        return []
    return [f"loaded by: {who}", *([f"not by: {others}"] if others else [])]


def _transformers(subject: Subject, engine: str) -> Loading:
    who, packages, others = BY_ENGINE[engine]
    if not subject.config.get("architectures") and not subject.config.get("model_type"):
        return _tensors(subject)
    kept = subject.plan.checkpoint.quantized_by
    if engine == "plain" and kept is not None and all(d.tensor.decode is None for d in subject.target.decisions):
        return Loading(f"what loads its source, which is quantized by {kept}", "transformers")
    name, wants = _class_name(subject.config.get("architectures")), _wanted(subject)
    code = [f"# pip install {packages}", *(["import torch"] if "dtype" in wants else [])]
    imported = [name, *(["CompressedTensorsConfig"] if "quantization_config" in wants else [])]
    code += [f"from transformers import {', '.join(imported)}"]
    arguments = "".join(f", {key}={value}" for key, value in wants.items())
    code += ["", f"model = {name}.from_pretrained({json.dumps(subject.where)}{arguments})"]
    if engine == "compressed-tensors":
        code += ["", f"# or: vllm serve {shlex.quote(subject.where)}"]
    return Loading(who, "transformers", "python", "\n".join(code), others)


def _wanted(subject: Subject) -> dict[str, str]:
    """Return the arguments without which transformers would fail, as lint says of such an output."""
    found = [d for d in subject.target.decisions if d.action == "quantize"]
    wants = {}
    if any(is_asymmetric(d.scheme) for d in found):
        wants["quantization_config"] = "CompressedTensorsConfig(dequantize=True)"
    fours = [d for d in found if isinstance(d.scheme, CompressedNvfp4 | CompressedMxfp4)]
    if any(d.tensor.dtype.name != "BF16" for d in fours):
        wants["dtype"] = "torch.bfloat16"
    return wants


def _class_name(architectures: Any) -> str:
    """Return the class of transformers to load a model by; names of a checkpoint's own code are not taken."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(first, str) and first.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    if isinstance(first, str) and first.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText"
    return "AutoModel"


def _tensors(subject: Subject) -> Loading:
    code = ["from loaders import load_weights", "", f"weights = load_weights({json.dumps(subject.where)})"]
    return Loading("no engine that is known here: without a config.json these are tensors by name", None, "python",
                   "\n".join(code))  # fmt: skip


def _hqq(subject: Subject) -> Loading:
    code = [
        "# pip install hqq",
        "import torch",
        "from hqq.models.hf.base import AutoHQQHFModel",
        "",
        f"path = {json.dumps(subject.where)}",
        'model = AutoHQQHFModel.from_quantized(path, compute_dtype=torch.bfloat16, device="cpu")  # or "cuda"',
    ]
    return Loading(ELSEWHERE["hqq"][0], "hqq", "python", "\n".join(code), ELSEWHERE["hqq"][1])


def _mlx(subject: Subject) -> Loading:
    code = [
        "# pip install mlx-lm; on Linux with 'mlx[cpu]'",
        "from mlx_lm import load",
        "",
        f"model, tokenizer = load({json.dumps(subject.where)})",
    ]
    return Loading(ELSEWHERE["mlx"][0], "mlx", "python", "\n".join(code), ELSEWHERE["mlx"][1])


def _gguf(subject: Subject) -> Loading:
    target = subject.target
    # Of a split GGUF the first part is loaded, which has the metadata and no tensors.
    small = () if target.assembly is None else target.assembly.made
    names = [*(file.name for file in target.finals), *(name for name in small if name.endswith(".gguf"))]
    first = f"{subject.where}/{min(names)}"
    is_causal = _is_causal(subject.config)
    program = "llama-cli" if is_causal else "llama-embedding"
    code = [
        f"# in a shell: {program} -m {shlex.quote(first)} -p Hello",
        "# pip install llama-cpp-python",
        "from llama_cpp import Llama",
        "",
        f"model = Llama(model_path={json.dumps(first)}{'' if is_causal else ', embedding=True'})",
    ]
    return Loading(ELSEWHERE["gguf"][0], "gguf", "python", "\n".join(code), ELSEWHERE["gguf"][1])


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a model continues text; an encoder only embeds it. One that does not say what it is, does."""
    named = config.get("architectures")
    words = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return not isinstance(named, list) or not named or str(named[0]).endswith(words)


def _packed(subject: Subject) -> Loading:
    return Loading(ELSEWHERE["packed"][0], None, not_in=ELSEWHERE["packed"][1])


def _diffusers(subject: Subject) -> Loading:
    name = "DiffusionPipeline" if subject.plan.checkpoint.components else class_of(subject.config) or "AutoModel"
    name = name if name.isidentifier() else "AutoModel"
    code = [
        "# pip install diffusers transformers accelerate bitsandbytes",
        f"from diffusers import {name}",
        "",
        f"model = {name}.from_pretrained({json.dumps(subject.where)})",
    ]
    return Loading(ELSEWHERE["diffusers"][0], "diffusers", "python", "\n".join(code), ELSEWHERE["diffusers"][1])


BY_LAYOUT: dict[str, Callable[[Subject], Loading]] = {
    "hqq": _hqq,
    "mlx": _mlx,
    "gguf": _gguf,
    "packed": _packed,
    "diffusers": _diffusers,
}


def place_of(output: Address) -> str:
    """Return what an output is loaded by: its path from where one stands if it lies below, a Hub's name, or its URL."""
    if output.scheme == "hf":
        return Place.of(output).repo
    if not output.is_local:
        return str(output)
    here = Path.cwd()
    return str(output.path.relative_to(here)) if output.path.is_relative_to(here) else str(output.path)


def loading_lines(loading: Loading) -> list[Text]:
    """Say how an output is loaded, and where it is not, at the end of a job."""
    lines = [Text(f"loaded by {loading.engine}{':' if loading.code else ''}")]
    lines += [whole(f"    {line}".rstrip()) for line in loading.code.splitlines() if line]
    return [*lines, *([Text(f"not loaded by {loading.not_in}")] if loading.not_in else [])]
