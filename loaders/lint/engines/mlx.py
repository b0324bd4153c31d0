"""What mlx-lm's own class makes of planned files: its sanitize, its quantized modules, its parameters.

It does what mlx_lm 0.32 does to load them (utils.py: load_model), with arrays that are never computed.
"""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from loaders.lint.base import Finding, fault, warning
from loaders.lint.engines.base import FEW, Answer, Question, Unanswerable, patterns

ENGINE = "mlx-lm"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U32": "uint32", "U8": "uint8", "I64": "int64"}


def check(question: Question, installed: str) -> Answer:
    """Build the class, and hold every planned array against its parameters."""
    mx: Any = import_module("mlx.core")
    tree_flatten: Any = import_module("mlx.utils").tree_flatten
    # mlx-lm changes the process's limit of open files when it is imported, which fails where fewer are allowed.
    resource.setrlimit = lambda *given: None
    utils = import_module("mlx_lm.utils")
    config = {key: value for key, value in question.config.items() if key not in ("model_file", "auto_map")}
    try:
        model_class, arguments = utils._get_classes(config)
    except ValueError as error:
        raise Unanswerable(f"has no such model: {error}") from None
    model = model_class(arguments.from_dict(config))
    planned = {
        name: mx.zeros(shape, dtype=getattr(mx, DTYPES.get(dtype, "uint8")))
        for name, (dtype, shape) in question.stored.items()
    }
    try:
        arrays: Mapping[str, Any] = model.sanitize(planned) if hasattr(model, "sanitize") else planned
        # Sanitizing takes away the output projection of a model whose embeddings are tied.
        recipe = _of_recipe(model)
        _quantize(utils, model, arrays, question.config.get("quantization"))
    # The loader runs the same code on the same names, so that it would raise the same, whatever it is.
    except Exception as error:
        what = f"mlx-lm's own code raises {type(error).__name__} ({str(error)[:100]}) over these names and shapes"
        return Answer(f"{installed}, {model_class.__module__}", (fault(ENGINE, what, "fails", "report this"),))
    shapes = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    found = tuple(_findings(arrays, shapes, recipe))
    done = sum(size for path, (size, said) in recipe.items() if said and f"{path}.scales" in arrays)
    wanted = sum(size for size, said in recipe.values() if said)
    few = () if not wanted or done / wanted >= FEW else (_few(done / wanted),)
    return Answer(f"{installed}, {model_class.__module__}", (*found, *few), "", (wanted, done))


def _of_recipe(model: Any) -> dict[str, tuple[int, bool]]:
    """Return the modules that can be quantized: their weights, and whether mlx_lm.convert quantizes them."""
    predicate = getattr(model, "quant_predicate", None)
    return {
        path: (module.weight.size, predicate is None or bool(predicate(path, module)))
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }


def _quantize(utils: Any, model: Any, arrays: Mapping[str, Any], block: Any) -> None:
    """Make quantized modules as load_model does."""
    if not isinstance(block, Mapping):
        return

    def settings_of(path: str, module: Any) -> Any:
        if path in block:
            return block[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in arrays:
            return False
        return utils.infer_quant_config(path, module, arrays)

    nn: Any = import_module("mlx.nn")
    nn.quantize(
        model,
        group_size=block["group_size"],
        bits=block["bits"],
        mode=block.get("mode", "affine"),
        class_predicate=settings_of,
    )


def _findings(
    arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], recipe: Mapping[str, tuple[int, bool]]
) -> Iterator[Finding]:
    """Yield what load_weights would fail on, and what mlx-lm itself leaves alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        if name not in arrays:
            found["parameters of the class that are not stored"].append(name)
        elif tuple(arrays[name].shape) != shape:
            found["stored in another shape than the class has"].append(name)
    found["stored, and no parameters of the class"] = [name for name in arrays if name not in shapes]
    for what, names in found.items():
        if names:
            yield fault(ENGINE, f"{what}: {patterns(names)}", "fails", "report this")
    kept = [path for path, (_, said) in recipe.items() if not said and f"{path}.scales" in arrays]
    if kept:
        yield fault(
            ENGINE,
            f"quantized, where mlx-lm's quant_predicate keeps them: {patterns(kept)}",
            "computes with less than the model needs",
            "keep them by a rule",
        )


def _few(share: float) -> Finding:
    return warning(
        "the recipe of mlx_lm.convert",
        f"{share:.0%} of the weights that it quantizes are quantized",
        "the output is larger than it could be",
        "see the plan for what is kept, and why",
    )
