"""What diffusers makes of planned tensors: its class of each component without weights; text encoders by transformers.

A question about a pipeline has the config.json of each component to ask about, by the prefix of its tensors' names. The
classes are those of the installed diffusers: code that comes with a checkpoint is never run, and nothing is fetched.
Which modules become quantized ones was read in diffusers 0.42 (quantizers/bitsandbytes/utils.py).
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from loaders.architectures.diffusers import class_of, is_skipped
from loaders.lint.base import Finding, warning
from loaders.lint.engines import transformers
from loaders.lint.engines.base import FEW, Answer, PlannedTensor, Question, Unanswerable, patterns

ENGINE = "bitsandbytes"
DROPPED = ("quantization_config", "_name_or_path")  # keys that say nothing of the class


def check(question: Question, installed: str) -> Answer:
    """Ask about each component, and put the answers together."""
    answers = list[Answer]()
    for prefix, config in question.config.items():
        mine = tuple(
            replace(tensor, name=tensor.name.removeprefix(prefix))
            for tensor in question.tensors
            if tensor.name.startswith(prefix)
        )
        answers.append(_named(prefix, _asked(config, mine, installed)))
    recipe = sum(answer.recipe[0] for answer in answers), sum(answer.recipe[1] for answer in answers)
    return Answer(
        by="; ".join(dict.fromkeys(answer.by for answer in answers)),
        findings=tuple(finding for answer in answers for finding in answer.findings),
        recipe=recipe,
        left=next((answer.left for answer in answers if answer.left), ""),
    )


def _named(prefix: str, answer: Answer) -> Answer:
    """Return an answer about a component as one about the pipeline."""
    part = prefix.rstrip("/")
    if not part:
        return answer
    findings = tuple(replace(finding, what=f"{part}: {finding.what}") for finding in answer.findings)
    return replace(answer, findings=findings, left=answer.left and prefix + answer.left)


def _asked(config: Mapping[str, Any], tensors: tuple[PlannedTensor, ...], installed: str) -> Answer:
    """Ask about one component.

    Raises:
        Unanswerable: the library is not there, or has no such class of its own.
    """
    if class_of(config) is None:
        return transformers.check(Question(ENGINE, config, tensors), installed)
    try:
        said = f"diffusers {version('diffusers')}"
    except PackageNotFoundError:
        raise Unanswerable("is there, and diffusers, whose class this is, is not installed") from None
    return _check_part(config, tensors, said)


def _check_part(config: Mapping[str, Any], tensors: Sequence[PlannedTensor], installed: str) -> Answer:
    """Build a component's class, and hold every planned tensor against it."""
    model = _model_of(config)
    block = config.get("quantization_config") or {}
    kept = list(model._keep_in_fp32_modules or ())
    linear = _linear_modules(model)
    convertible = {name for name in linear if not is_skipped(name, kept)}
    wanted = {name for name in convertible if not is_skipped(name, block.get(transformers.SKIP_KEYS[ENGINE]) or ())}
    state, at_fault, left = model.state_dict(), defaultdict[str, list[str]](list), ("", 0)
    recipe = done = 0
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        if module in convertible and tensor.name.endswith(".weight"):
            recipe, done = recipe + tensor.numel, done + (tensor.numel if tensor.is_quantized else 0)
            if not tensor.is_quantized and tensor.numel > left[1]:
                left = tensor.name, tensor.numel
        if (kind := _fault(tensor, module, state, linear, wanted if block else set())) is not None:
            at_fault[kind].append(tensor.name)
    at_fault["missing"] = sorted(state.keys() - {tensor.name for tensor in tensors})
    findings = tuple(_findings(at_fault, done / recipe if recipe else 1.0))
    return Answer(f"{installed}, {type(model).__name__}", findings, "", (recipe, done), left[0])


def _fault(
    tensor: PlannedTensor, module: str, state: Mapping[str, Any], linear: set[str], wanted: set[str]
) -> str | None:
    """Return what is wrong with a planned tensor, a key of transformers.FINDINGS."""
    if tensor.action == "drop":
        return "dropped" if tensor.name in state else None
    if tensor.name not in state:
        return "unknown"
    if tensor.is_quantized and module not in wanted:
        return "kept" if module in linear else "quantized"
    if not tensor.is_quantized and tensor.name.endswith(".weight") and module in wanted:
        return "plain"
    return None if tuple(state[tensor.name].shape) == tensor.shape else "shape"


def _findings(at_fault: Mapping[str, Sequence[str]], share: float) -> Iterator[Finding]:
    """Yield what was found, faults first."""
    for kind, (level, what, happens, remedy) in transformers.FINDINGS.items():
        if names := at_fault.get(kind):
            yield level(f"diffusers ({ENGINE})", f"{what}: {patterns(names)}", happens, remedy)
    if share < FEW:
        yield warning(
            f"diffusers ({ENGINE})",
            f"{share:.0%} of the weights that it quantizes are quantized",
            "the output is larger than it could be",
            "see the plan for what is kept, and why",
        )


def _model_of(config: Mapping[str, Any]) -> Any:
    """Return the class that a config.json names, built without weights.

    Raises:
        Unanswerable: diffusers has no such class of its own.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    accelerate, diffusers = import_module("accelerate"), import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    name = class_of(config) or ""
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise Unanswerable(f"has no class {name!r:.80} of its own")
    wanted: Any = found
    with accelerate.init_empty_weights():
        return wanted.from_config({key: value for key, value in config.items() if key not in DROPPED})


def _linear_modules(model: Any) -> set[str]:
    nn = import_module("torch.nn")
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
