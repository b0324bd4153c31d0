"""The default rules of each engine: which tensors are quantized, kept and cast where the user says nothing."""

from __future__ import annotations

from loaders.architectures.family import Family
from loaders.architectures.layers import Layers
from loaders.dtypes import DTYPES, WEIGHT_DTYPES
from loaders.errors import setting
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Rule

NOT_FLOAT = tuple(name for name in DTYPES if name not in WEIGHT_DTYPES)
LINEAR = ("attention", "mlp", "linear")  # the roles of linear layers that every engine quantizes
# The roles of layers that are linear, too, and that some engines, or recipes for them, leave as they are.
OTHER_LINEAR = ("vision", "linear_attention", "mtp", "fused", "sensitive")
FUSED = "transformers joins it with others, or cuts it, as it loads, which cannot be done to packed codes"
SENSITIVE = "the model's own class keeps it in float32, makes it of several layers, or multiplies it group by group"

EXPERTS_KEPT = (
    "transformers 5 fuses a layer's experts into one parameter, which {engine} does not quantize; experts quantized one"
    " by one load in transformers 4 only"
)
STACKS_KEPT = "transformers holds a layer's experts in one stack, and {engine} quantizes linear layers only"

SINGLE_EXPERTS = Rule(
    action="quantize", role=("expert",), shape=(None, None),
    why="transformers makes an nn.Linear of each expert matrix of this model as it loads a quantized one",
)  # fmt: skip

CONV1D = {
    "bitsandbytes": (
        Rule(action="quantize", why="transformers quantizes a Conv1D as the linear layer that it is", role=("conv1d",)),
    )
}
CONV1D_KEPT = (Rule(action="keep", why="a Conv1D, which is no nn.Linear to the engine", role=("conv1d",)),)


def _engine_rules(engine: str, conversion: str) -> tuple[Rule, ...]:
    """Return the rules of an engine that converts a model's nn.Linear modules; `conversion` is the reason to give."""
    return (
        Rule(action="keep", why="only floats are quantized", dtype=NOT_FLOAT),
        Rule(action="keep", why=f"{engine} keeps embeddings", role=("embedding",)),
        Rule(action="keep", why=f"{engine} keeps the output projection", role=("head",)),
        Rule(action="keep", why="a router decides; rounding it changes the choice of experts", role=("router",)),
        Rule(action="keep", why=STACKS_KEPT.format(engine=engine), role=("expert",), shape=(None, None, None)),
        Rule(action="keep", why=EXPERTS_KEPT.format(engine=engine), role=("expert",)),
        Rule(action="keep", why="transformers loads no block for multi-token prediction", role=("mtp",)),
        Rule(action="keep", why=FUSED, role=("fused",)),
        Rule(action="keep", why=SENSITIVE, role=("sensitive",)),
        *CONV1D.get(engine, CONV1D_KEPT),
        Rule(action="keep", why="no matrix of a linear layer", role=("norm", "conv", "bias", "buffer", "other")),
        Rule(action="quantize", why=conversion, role=(*LINEAR, "vision", "linear_attention"), shape=(None, None)),
        Rule(action="keep", why="no matrix"),
    )


DEFAULTS: dict[str, tuple[Rule, ...]] = {
    "hqq": _engine_rules("hqq", "hqq makes every nn.Linear but the head an HQQLinear"),
    "bitsandbytes": _engine_rules("bitsandbytes", "transformers makes every nn.Linear a Linear4bit or Linear8bitLt"),
    "bitnet": _engine_rules("bitnet", "transformers makes every nn.Linear a BitLinear"),
    "compressed-tensors": (
        Rule(action="keep", why="only floats are quantized", dtype=NOT_FLOAT),
        Rule(action="keep", why="llm-compressor's recipes keep embeddings", role=("embedding",)),
        Rule(action="keep", why="llm-compressor's recipes keep the output projection", role=("head",)),
        Rule(action="keep", why="a router decides; rounding it changes the choice of experts", role=("router",)),
        Rule(action="keep", why="llm-compressor's recipes keep towers and their projectors", role=("vision",)),
        Rule(action="keep", why="llm-compressor's recipes keep linear attention", role=("linear_attention",)),
        Rule(action="keep", why="recipes keep blocks for multi-token prediction", role=("mtp",)),
        Rule(action="keep", why=SENSITIVE, role=("sensitive",)),
        *CONV1D_KEPT,
        Rule(action="keep", why="no matrix of a linear layer", role=("norm", "conv", "bias", "buffer", "other")),
        Rule(
            action="quantize",
            why="llm-compressor quantizes every linear layer",
            role=(*LINEAR, "fused"),
            shape=(None, None),
        ),
        Rule(action="quantize", why="each expert by itself, as vLLM loads them", role=("expert",), shape=(None, None)),
        Rule(
            action="keep",
            why="vLLM takes experts one by one, and how these stacks of them are cut is not known",
            role=("expert",),
            shape=(None, None, None),
        ),
        Rule(action="keep", why="no matrix"),
    ),
}


def default_rules(scheme: Scheme, family: Family | None = None) -> tuple[Rule, ...]:
    """Return the engine's own rules for a scheme, and for a family's models where the engine treats them apart."""
    if isinstance(scheme, Plain):
        if scheme.dtype is None:
            return (Rule(action="keep", why=f"{setting('quantize')}=none quantizes nothing"),)
        return (
            Rule(
                action="keep",
                why="only floats are cast",
                dtype=tuple(n for n in NOT_FLOAT if DTYPES[n].block == 1),
            ),
            Rule(action="cast", why=setting("dtype"), cast_to=scheme.dtype),
        )
    assert scheme.engine in DEFAULTS, f"{scheme.engine}: write its rules here, or give its quantizations a mix"
    rules = DEFAULTS[scheme.engine]
    if family is None or scheme.engine not in family.single_experts:
        return rules
    # A dtype that is no float comes first, as in every engine's rules.
    return (rules[0], SINGLE_EXPERTS, *rules[1:])


def left_out(found: Layers) -> tuple[Rule, ...]:
    """Return the rule that drops tensors of layers that config.json does not have; it goes before an engine's own."""
    if not found.beyond:
        return ()
    why = f"config.json has {found.count} layers, so that no engine computes with these"
    return (Rule(action="drop", why=why, names=frozenset(found.beyond)),)
