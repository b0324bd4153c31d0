"""What transformers' own class makes of planned tensors: the class without weights, with its own maps of names.

The class is built on torch's meta device. Its code is that of the installed transformers: code that comes with a
checkpoint is never run, and nothing is fetched. Which modules its loader makes quantized ones, and which it keeps, was
read in transformers 5.23 (quantizers/base.py, quantizers_utils.py, integrations/bitsandbytes.py and bitnet.py) and
compressed-tensors 0.20 (utils/match.py).
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from loaders.lint.base import Finding, fault, warning
from loaders.lint.engines.base import FEW, Answer, PlannedTensor, Question, Unanswerable, patterns
from loaders.patterns import compiled
from loaders.words import model_type_said

# Keys of config.json, at any depth, that name code, or what was stored before.
DROPPED = {
    "auto_map", "quantization_config", "quantization", "compression_config", "_name_or_path",
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
}  # fmt: skip
# Types that published configs give to a part, and transformers' classes have under another name.
ALIASES = {"kimi_k2": "deepseek_v3"}
AUTO_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)  # fmt: skip
SKIP_KEYS = {"bitsandbytes": "llm_int8_skip_modules", "bitnet": "modules_to_not_convert"}
EXPERT = re.compile(r"\bexperts\.(\d+)\.")
# What llm-compressor's published recipes ignore, beside embeddings: heads, routers, towers, linear attention, MTP.
RECIPE_IGNORES = re.compile(
    r"(?:^|\.)(?:\w*head|embed_out|score|classifier|router|gate|wg|shared_expert_gate)(?:$|\.)"
    r"|vis(?:ion|ual)|audio|image|projector|aligner|linear_attn|\bmtp\b|weights_proj|patch_embed"
    r"|\bcompressor\.(?:indexer\.)?(?:kv|gate)_proj"
)


def check(question: Question, installed: str) -> Answer:
    """Build the class, and hold every planned tensor against it."""
    model = _model_of(json.dumps(cleaned(question.config)), question.engine)
    judging = _Judging(model, question)
    findings = tuple(judging.findings())
    return Answer(f"{installed}, {type(model.model).__name__}", findings, "", judging.recipe, judging.left)


def cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what names code or another form of the weights."""
    made = {
        key: cleaned(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in DROPPED
    }
    named = made.get("model_type")
    return {**made, "model_type": ALIASES[named]} if isinstance(named, str) and named in ALIASES else made


@lru_cache(maxsize=2)
def _model_of(config: str, engine: str) -> Model:
    """Return the class for a config.json; the last are kept, since several plans may be asked about in a row."""
    return Model(json.loads(config), engine)


class Model:
    """A model's class on the meta device: its linear modules, and where a published tensor goes.

    For some engines transformers replaces modules of a class that holds experts in stacks by ones that hold them one by
    one (quantizers/base.py: MODULES_TO_PATCH_FOR_QUANTIZATION).
    """

    def __init__(self, config: Mapping[str, Any], engine: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        warnings.filterwarnings("ignore")
        import torch
        from torch import nn
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.pytorch_utils import Conv1D

        transformers: Any = import_module("transformers")
        quantizer: Any = import_module("transformers.quantizers.base").HfQuantizer
        transformers.logging.set_verbosity_error()
        made, model_class = _class_of(config)
        made.dtype = torch.bfloat16
        with torch.device("meta"):
            self.model: Any = model_class._from_config(made)
            method = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=engine))
            quantizer._convert_model_for_quantization(method, self.model)
        modules = dict(self.model.named_modules())
        self.transposed = {name for name, module in modules.items() if isinstance(module, Conv1D)}
        self.linear = {name for name, module in modules.items() if type(module) is nn.Linear} | self.transposed
        self.like_linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        self.embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
        changes = get_model_conversion_mapping(self.model)
        self._renamings = [each for each in changes if isinstance(each, WeightRenaming)]
        self._converters = [each for each in changes if isinstance(each, WeightConverter)]
        self._by_source = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self.state: dict[str, Any] = self.model.state_dict()
        self.parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._known: dict[str, tuple[tuple[str, ...], bool]] = {}

    def place(self, name: str) -> tuple[tuple[str, ...], bool]:
        """Return the parameters that a published tensor becomes, or becomes part of, and whether by a conversion.

        All experts of a layer go the way of its expert 1, which saves most of the work in a large mixture.
        """
        expert = EXPERT.search(name)
        if expert is None or int(expert[1]) < 2:
            return self._place(name)
        keys, is_converted = self._place(EXPERT.sub("experts.1.", name, count=1))
        return tuple(key.replace("experts.1.", f"experts.{expert[1]}.") for key in keys), is_converted

    def _place(self, name: str) -> tuple[tuple[str, ...], bool]:
        if name not in self._known:
            from transformers.core_model_loading import rename_source_key

            prefix = self.model.base_model_prefix
            key, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.state)
            if key not in self.state and name in self.state:
                key, pattern = name, None
            self._known[name] = (self._targets(key, pattern), pattern is not None)
        return self._known[name]

    def _targets(self, key: str, pattern: str | None) -> tuple[str, ...]:
        """Return all parameters that a conversion makes: a stored q, k and v in one become three."""
        if pattern is None:
            return (key,)
        first, *others = self._by_source[pattern].target_patterns
        return (key, *(key.replace(first, other) for other in others if first in key))

    @cached_property
    def default_skips(self) -> list[str]:
        """The modules that transformers' quantizers skip where config.json gives no list."""
        from transformers.quantizers.base import get_keys_to_not_convert

        return list(get_keys_to_not_convert(self.model))

    @property
    def kept(self) -> list[str]:
        """The modules that the class keeps in float32, which quantizers skip."""
        return sorted(self.model._keep_in_fp32_modules or ())

    @property
    def kept_strictly(self) -> list[str]:
        """The modules that the class keeps in float32 whatever the dtype, and quantizers do not ask about."""
        return sorted(self.model._keep_in_fp32_modules_strict or ())


def _class_of(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' config object, and the class that `architectures` names if it takes it, else AutoModel's.

    Raises:
        Unanswerable: transformers has no such model of its own.
    """
    transformers: Any = import_module("transformers")
    known: Any = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    mappings = import_module("transformers.models.auto.modeling_auto")
    model_type, names = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in known:
        raise Unanswerable(f"has no class of its own for {model_type_said(config)}")
    made = known[model_type].from_dict(dict(config))
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    named = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        wanted: Any = named
        if isinstance(made, wanted.config_class):
            return made, named
    for mapping in AUTO_MAPPINGS:
        found = getattr(mappings, mapping).get(type(made), None)
        if found is not None:
            return made, found[0] if isinstance(found, tuple) else found
    raise Unanswerable(f"has no class for model type {model_type!r}")


# --- what a loader makes of modules


def skipped(modules: Iterable[str], listed: Sequence[str]) -> set[str]:
    """Return the modules that a skip list leaves alone: `should_convert_module` of transformers, compiled once."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    found = [(compiled(rf"(?:{pattern}){boundary}", "a list of modules"), pattern) for pattern in listed]
    return {m for m in modules if any(p.match(m) or m.endswith(text) for p, text in found)}


def wanted(model: Model, engine: str, block: Mapping[str, Any]) -> set[str]:
    """Return the modules that the loader makes quantized ones."""
    if not block:  # nothing is quantized
        return set()
    if engine == "compressed-tensors":
        return _targeted(model, block)
    listed = block.get(SKIP_KEYS[engine])
    patterns = [*(model.default_skips if listed is None else listed), *model.kept]
    modules = model.linear if engine == "bitsandbytes" else model.like_linear
    return modules - skipped(modules, patterns)


def _targeted(model: Model, block: Mapping[str, Any]) -> set[str]:
    """Return the linear modules that compressed-tensors' targets name and its `ignore` does not."""
    targets = [target for group in block["config_groups"].values() for target in group["targets"]]
    is_ignored = _matcher(block["ignore"])
    is_target = _matcher(targets)
    return {name for name in model.like_linear if ("Linear" in targets or is_target(name)) and not is_ignored(name)}


def _matcher(listed: Sequence[str]) -> Any:
    exact = {each for each in listed if not each.startswith("re:")}
    found = [compiled(each.removeprefix("re:"), "a list of modules") for each in listed if each.startswith("re:")]
    return lambda name: name in exact or any(pattern.match(name) for pattern in found)


# --- the judgment


class _Judging:
    """A planned output held against a class: the names at fault, by what is wrong with them."""

    def __init__(self, model: Model, question: Question) -> None:
        self.model = model
        self.engine = question.engine
        self.wanted = wanted(model, question.engine, question.config.get("quantization_config") or {})
        self.kept = skipped(model.like_linear, [*model.kept, *model.kept_strictly])
        self.at_fault: dict[str, list[str]] = defaultdict(list)
        self.recipe = (0, 0)
        self.left, self._most = "", 0
        self._seen: set[str] = set()
        self._dropped: set[str] = set()
        self._by_recipe = self._modules_of_recipe()
        for tensor in question.tensors:
            self._hold(tensor)
        self._rest()

    def _modules_of_recipe(self) -> set[str]:
        model = self.model
        if self.engine == "compressed-tensors":
            return {name for name in model.like_linear if not RECIPE_IGNORES.search(name)}
        modules = model.linear if self.engine == "bitsandbytes" else model.like_linear
        return modules - skipped(modules, [*model.default_skips, *model.kept])

    def _hold(self, tensor: PlannedTensor) -> None:
        """Hold a tensor against the parameter that it becomes."""
        model = self.model
        keys, is_converted = model.place(tensor.name)
        if tensor.action == "drop":
            self._dropped.update(keys)
            return
        self._seen.update(keys)
        key = keys[0]
        is_there, module = key in model.state, key.removesuffix(".weight")
        is_expert = EXPERT.search(tensor.name) is not None or (is_there and _is_stack(key, model.state[key]))
        self._count(tensor, module, is_expert=is_expert)
        if tensor.is_quantized:
            # Of a Conv1D bitsandbytes stores the transpose, the weight of the linear layer that it makes of it.
            is_turned = self.engine == "bitsandbytes" and module in model.transposed
            if is_turned and tensor.shape == tuple(model.state[key].shape)[::-1]:
                return
            found = self._quantized(key, module, is_there=is_there, is_converted=is_converted, is_expert=is_expert)
        else:
            found = "plain" if key.endswith(".weight") and module in self.wanted else None
        if found is None and is_there and not is_converted and tuple(model.state[key].shape) != tensor.shape:
            found = "shape"
        if found is None and not is_there and not is_converted and not is_expert and not self._is_ignored(tensor.name):
            found = "unknown"
        if found is not None:
            self.at_fault[found].append(tensor.name)

    def _quantized(self, key: str, module: str, *, is_there: bool, is_converted: bool, is_expert: bool) -> str | None:
        """Return what is wrong with a quantized tensor."""
        if module in self.model.transposed:
            return "transposed"
        if self.engine == "compressed-tensors" and is_expert:
            # Experts lie one by one for vLLM; transformers' loader dequantizes them before it fuses them.
            return None if is_there else "no expert"
        if is_converted:
            # The loader converts the scales of compressed-tensors beside the codes, and no parts of other engines'.
            return "converted with scales" if self.engine == "compressed-tensors" else "converted"
        if module in self.kept:
            return "kept"
        return None if module in self.wanted or not is_there else "quantized"

    def _is_ignored(self, name: str) -> bool:
        """Whether the class says of a tensor that it does not miss a parameter for it."""
        ignorable = getattr(self.model.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in ignorable)

    def _count(self, tensor: PlannedTensor, module: str, *, is_expert: bool) -> None:
        """Count the weights of the engine's recipe, and those of them that the plan quantizes."""
        is_in = module in self._by_recipe or (self.engine == "compressed-tensors" and is_expert)
        if is_in and len(tensor.shape) > 1:
            wanted, done = self.recipe
            self.recipe = (wanted + tensor.numel, done + tensor.numel * tensor.is_quantized)
            if not tensor.is_quantized and tensor.numel > self._most:
                self.left, self._most = tensor.name, tensor.numel

    def _rest(self) -> None:
        """Find the parameters that no tensor becomes."""
        model = self.model
        lost = model.parameters - self._seen
        self.at_fault["lost"] = sorted(name for name in lost if name.removesuffix(".weight") in self.wanted)
        ignorable = getattr(model.model, "_keys_to_ignore_on_load_missing", None) or ()
        self.at_fault["dropped"] = sorted(lost & self._dropped - model.tied)
        others = lost - model.tied - self._dropped - set(self.at_fault["lost"])
        self.at_fault["missing"] = sorted(n for n in others if not any(re.search(p, n) for p in ignorable))

    def findings(self) -> Iterator[Finding]:
        """Yield what was found, faults first."""
        for kind, (level, what, happens, remedy) in FINDINGS.items():
            names = self.at_fault.get(kind)
            if names:
                yield level(f"transformers ({self.engine})", f"{what}: {patterns(names)}", happens, remedy)
        share = self.recipe[1] / self.recipe[0] if self.recipe[0] else 1.0
        if share < FEW:
            yield warning(
                f"the recipe of {self.engine}",
                f"{share:.0%} of the weights that it quantizes are quantized",
                "the output is larger than it could be",
                "see the plan for what is kept, and why",
            )


def _is_stack(key: str, parameter: Any) -> bool:
    """Whether a parameter holds a layer's experts in one."""
    return parameter.ndim == 3 and "experts" in key


FINDINGS = {
    "transposed": (
        fault, "quantized as [outputs, inputs], where the class has [inputs, outputs]",
        "fails on the sizes, or computes garbage", "keep them by a rule",
    ),
    "quantized": (
        fault, "quantized, where the class has no linear layer or the loader skips it",
        "makes plain modules of them and fails on the shapes, or reads codes as weights", "keep them by a rule",
    ),
    "kept": (
        fault, "quantized, where the class keeps its weights in float32",
        "computes with less than the model needs, or fails", "keep them by a rule",
    ),
    "converted": (
        fault, "quantized, where the class fuses or splits what is stored",
        "fuses or splits codes as if they were weights, and fails", "keep them by a rule",
    ),
    "converted with scales": (
        warning, "quantized, where the class fuses or splits what is stored",
        "fuses or splits codes and scales, which is right for whole rows only", "load it once",
    ),
    "plain": (
        fault, "stored plain, and not named in config.json's skip list by the class's names",
        "makes quantized modules of them and finds no codes", "quantize them by a rule, or report this",
    ),
    "lost": (
        fault, "not stored (tied, or missing), and not named in config.json's skip list by the class's names",
        "makes quantized modules of them and finds no codes", "report this",
    ),
    "dropped": (
        fault, "dropped, and parameters of the class",
        "fills them with random numbers", "take out the rule that drops them",
    ),
    "shape": (
        fault, "of another shape than in the class", "fails, or computes with random numbers", "check the source",
    ),
    "no expert": (
        warning, "experts of which transformers' class has no parameter",
        "leaves them out; vLLM may read them", "load it once",
    ),
    "missing": (
        warning, "parameters of the class that no tensor becomes",
        "fills them with random numbers", "check that the source is whole",
    ),
    "unknown": (warning, "tensors that are no parameter of the class", "leaves them out", "drop them by a rule"),
}  # fmt: skip
