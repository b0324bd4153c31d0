"""The rules of mlx_lm.convert: mlx_lm 0.32, utils.py (quantize_model) and convert.py (mixed_quant_predicate_builder).

Every linear layer, embedding and expert is quantized, and the output projection and the router too, where the group
size divides the length of rows; the rest stays. All weights are cast to the config's torch_dtype first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loaders.architectures.family import text_config
from loaders.architectures.layers import layer_of
from loaders.architectures.mlx import FINE_BITS, FINE_GROUP, convert_dtype, mlx_name, model_of, stack_of
from loaders.dtypes import WEIGHT_DTYPES
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.rules.defaults import LINEAR, NOT_FLOAT, OTHER_LINEAR
from loaders.rules.rule import Rule
from loaders.tensors.logical_tensor import LogicalTensor

MixedRecipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
MODULES = (*LINEAR, *OTHER_LINEAR, "expert", "embedding", "head", "router")
# The modules that a mixed recipe gives more bits, by mlx-lm's names.
FINE = r"\.layers\.(?:{layers})\..*(?:v_proj|v_a_proj|v_b_proj|down_proj)"


UNDIVIDED = "mlx-lm leaves alone what groups of {} do not divide"


@dataclass(frozen=True, slots=True)
class MlxRules:
    """The rules of mlx_lm.convert for groups of `group_size`; with `high`, those of one of its mixed recipes.

    A mixed recipe gives the scheme `high` to the output projection, and to the value and down projections in the first
    and last eighth of the layers and in every third layer between.
    """

    group_size: int
    high: MlxAffine | None = None

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        ragged = sorted({r.shape for r in tensors if len(r.shape) in (2, 3) and r.shape[-1] % self.group_size})
        short = dict.fromkeys((*(None,) * (len(shape) - 1), shape[-1]) for shape in ragged)
        why = UNDIVIDED.format(self.group_size)
        return (
            Rule(action="drop", why="mlx-lm computes it", name=r"rotary_emb\.inv_freq$"),
            Rule(action="keep", why="only floats are quantized", dtype=NOT_FLOAT),
            *_kept_by_name(config),
            *(rule for shape in short for rule in kept(config, why, MODULES, shape)),
            *(_fine(config) if self.high is None else self._mixed(self.high, tensors, config)),
            *(
                Rule(
                    action="quantize",
                    why="mlx-lm quantizes every linear layer and embedding",
                    role=MODULES,
                    shape=shape,
                )
                for shape in ((None, None), (None, None, None))
            ),
            *kept(config, "no linear layer or embedding", None, None),
        )

    def _mixed(self, high: MlxAffine, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        """Return the rules that give `high` to what mlx-lm's mixed_quant_predicate gives it to."""
        layers = [layer for tensor in tensors if (layer := layer_of(tensor.name)) is not None]
        count = int(text_config(config, "num_hidden_layers") or max(layers, default=-1) + 1)
        eighth = count // 8
        fine = [i for i in range(count) if i < eighth or i >= 7 * count // 8 or (i - eighth) % 3 == 2]
        why, pattern = f"{high.bits} bits by the mixed recipe", re.compile(FINE.format(layers="|".join(map(str, fine))))
        names = frozenset(tensor.name for tensor in tensors if pattern.search(_own_name(tensor.name, config)))
        return (
            Rule(action="quantize", why=why, role=("head",), shape=(None, None), scheme=high),
            *(
                Rule(action="quantize", why=why, names=names, role=MODULES, shape=shape, scheme=high)
                for shape in ((None, None), (None, None, None))
            ),
        )


def _own_name(name: str, config: Mapping[str, Any]) -> str:
    """Return mlx-lm's name of a tensor, that of its stack for an expert's; its own where the model is not known."""
    model = model_of(config)
    if model is None:
        return name
    own = mlx_name(model, name)
    stack = stack_of(model, own)
    return stack[0] if stack else own


def _kept_by_name(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    model = model_of(config)
    if model is None:
        return ()
    uncast = (Rule(action="keep", why="mlx-lm keeps its dtype", name=name) for name in model.uncast)
    return (*uncast, *(rule for name, why in model.keep for rule in kept(config, why, None, None, name)))


def _fine(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the rules for the modules that a model's quant_predicate treats apart."""
    model = model_of(config)
    scheme = MlxAffine(FINE_BITS, FINE_GROUP)
    return tuple(
        Rule(action="quantize", why=why, name=name, role=MODULES, shape=shape, scheme=scheme)
        for name, why in (() if model is None else model.fine)
        for shape in ((None, None), (None, None, None))
    )


def kept(
    config: Mapping[str, Any],
    why: str,
    role: tuple[str, ...] | None,
    shape: tuple[int | None, ...] | None,
    name: str | None = None,
) -> tuple[Rule, ...]:
    """Return rules that leave tensors unquantized, and cast them to the dtype that mlx_lm.convert gives all weights."""
    dtype = convert_dtype(config)
    keep = Rule(action="keep", why=why, role=role, shape=shape, name=name)
    if dtype is None:
        return (keep,)
    others = tuple(name for name in WEIGHT_DTYPES if name != dtype.name)
    cast = Rule(
        action="cast",
        why=f"{why}, and casts it to torch_dtype",
        role=role,
        shape=shape,
        name=name,
        dtype=others,
        cast_to=dtype.name,
    )
    return (cast, keep)


def bits_of(recipe: str) -> tuple[int, int]:
    """Return the low and the high bits of a mixed recipe."""
    match = re.fullmatch(r"mixed_(\d)_(\d)", recipe)
    assert match is not None, recipe
    return int(match[1]), int(match[2])
