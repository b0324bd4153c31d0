"""Candidates for a mix within a budget: those that an engine can mix in one output, and the rules of a chosen mix.

A candidate is a whole-model quantization by name, such as mlx_int6 or gguf_q5_k. It makes of a tensor what its engine's
own rules make of it (another type where blocks do not divide rows, experts stacked), so that a mix holds nothing that
the engine itself would not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args

from loaders.architectures.family import family_of
from loaders.errors import BadSpec, setting
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.ggml import TYPES
from loaders.rules.decide import decide
from loaders.rules.defaults import default_rules
from loaders.rules.llama_cpp import MIXES
from loaders.rules.mlx import kept
from loaders.rules.rule import Decision, Mix, Rule
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.words import counted

Engine = Literal["mlx", "gguf", "vllm", "transformers"]
ENGINES: tuple[str, ...] = get_args(Engine)
KEEP = "keep"  # the name in place of a candidate for a tensor that stays unquantized
WHY = "chosen within the budget"
# the candidates of each engine where the user names none
AMONG: dict[str, tuple[str, ...]] = {
    "mlx": ("mlx_int2", "mlx_int3", "mlx_int4", "mlx_int5", "mlx_int6", "mlx_int8"),
    "gguf": ("gguf_q2_k", "gguf_q3_k", "gguf_q4_k", "gguf_q5_k", "gguf_q6_k", "gguf_q8_0"),
    "vllm": ("w4a16", "w4a16_g32", "w8a16"),
    "transformers": ("nf4",),
}
# what each engine can mix, for messages
KNOWN = {
    "mlx": "mlx_int2, 3, 4, 5, 6, 8, with _g32 or _g128 for other groups than of 64; mlx_mxfp4, mlx_mxfp8, mlx_nvfp4",
    "gguf": f"gguf_ and one of {', '.join(name.lower() for name in TYPES)}",
    "vllm": "w4a16, w4a16_asym, w8a16, with _g32, _g64 or _g128 for other groups; mxfp4a16",
    "transformers": "nf4 or fp4",
}
# quantizations that can be no candidates, and why
REFUSED = {
    **dict.fromkeys(
        ("fp8_dynamic", "fp8_block", "w8a8", "mxfp4"),
        "it rounds activations too, and what that loses cannot be measured on weights",
    ),
    "nvfp4a16": "fused layers share a scale, so that one tensor's error depends on what its partners get",
    "int8": "transformers loads a checkpoint with 4-bit layers or with int8 layers, not with both; and nf4 is smaller",
}


def engine_of(name: str) -> str | None:
    """Return the engine of which this is a candidate, or None."""
    return next((engine for engine in ENGINES if settings_of(engine, name) is not None), None)


def settings_of(engine: str, name: str) -> dict[str, Any] | None:
    """Return a candidate's settings, as conf/quant would state them; None if the engine has none of this name."""
    base, _, group = name.partition("_g") if re.search(r"_g(32|64|128)$", name) else (name, "", "")
    if engine == "mlx" and (match := re.fullmatch(r"mlx_int([234568])", base)):
        return {"kind": "mlx", "name": name, "mode": "affine", "bits": int(match[1]), "group_size": int(group or 64)}
    floats = {"mlx_mxfp4": (4, 32), "mlx_mxfp8": (8, 32), "mlx_nvfp4": (4, 16)}
    if engine == "mlx" and name in floats:
        bits, size = floats[name]
        return {"kind": "mlx", "name": name, "mode": name[4:], "bits": bits, "group_size": size}
    if engine == "gguf" and name.startswith("gguf_"):
        return _ggml_settings(name)
    if engine == "vllm" and (base in ("w4a16", "w4a16_asym", "w8a16") or name == "mxfp4a16"):
        own = int(group) if group else None
        return {"kind": "compressed_tensors", "name": name, "preset": base, "group_size": own}
    if engine == "transformers" and name in ("nf4", "fp4"):
        common = {"group_size": 64, "double_quant": False, "storage_dtype": "uint8", "compute_dtype": None}
        return {"kind": "bnb4", "name": name, "table": name, **common}
    return None


def _ggml_settings(name: str) -> dict[str, Any] | None:
    """Return the settings of one type for every matrix. A mix such as gguf_q4_k_m stands for its main type."""
    wanted = name.removeprefix("gguf_").upper()
    chosen = MIXES.get(wanted, wanted)
    file_type = next((mix for mix, first in MIXES.items() if first == chosen), None)
    if file_type is None or chosen not in TYPES:
        return None
    others = {"type": None, "embedding_type": None, "output_type": None, "absmean": False}
    return {"kind": "ggml", "name": name, "file_type": file_type, "pure": True, **others}


@dataclass(frozen=True, slots=True)
class CandidateMix:
    """An engine's rules for one candidate, except that tensors which its scheme refuses are kept."""

    scheme: Scheme
    mix: Mix | None

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        usual = default_rules(self.scheme, family_of(config)) if self.mix is None else self.mix.rules(tensors, config)
        refused = {
            tensor.name
            for tensor in tensors
            for rule in [next(rule for rule in usual if rule.matches(tensor))]
            if rule.action == "quantize" and (rule.scheme or self.scheme).refuses(tensor.spec)
        }
        whole = frozenset(refused)
        return (*_keeping(self.scheme, config, "it does not divide into groups", whole), *usual) if whole else usual

    def choices(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> dict[str, Decision]:
        """Return the candidate's decisions by tensor, for tensors whose scheme the engine leaves open."""
        found = decide(tensors, self.scheme, (), self.rules(tensors, config))
        return {d.tensor.name: d for d in found if is_open(d)}


def is_open(decision: Decision) -> bool:
    """Whether a mix may give the tensor another scheme: not where a user's rule or the engine sets one."""
    is_own = decision.rule.scheme is not None and decision.rule.scheme.engine != "ggml"
    return decision.action == "quantize" and not decision.rule.label and not is_own


@dataclass(frozen=True, slots=True)
class ChosenMix:
    """A mix: which tensors get which candidate, and which are kept. All others are as the first candidate has them."""

    parts: tuple[tuple[CandidateMix, frozenset[str]], ...]
    kept: frozenset[str]

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]:
        """Return rules by name, one for each scheme.

        Raises:
            BadSpec: a tensor is missing, or its candidate cannot take it: the mix is of another checkpoint.
        """
        first = self.parts[0][0]
        by_scheme: dict[Scheme, set[str]] = {}
        known = {tensor.name for tensor in tensors}
        strangers = set(self.kept) - known
        for candidate, names in self.parts:
            found = candidate.choices(tensors, config)
            strangers |= names - set(found)
            for name in names & set(found):
                scheme = found[name].rule.scheme or candidate.scheme
                by_scheme.setdefault(scheme, set()).add(name)
        if strangers:
            raise BadSpec(
                f"{setting('chosen')}: it names {counted(len(strangers), 'tensor')} ({min(strangers)}) that this"
                " checkpoint"
                " lacks or its"
                " candidates cannot take: leave it away, and the mix is chosen for this checkpoint"
            )
        return (
            *(
                Rule(action="quantize", why=f"{WHY}: {said(s)}", names=frozenset(n), scheme=s)
                for s, n in by_scheme.items()
            ),
            *(_keeping(first.scheme, config, WHY, self.kept) if self.kept else ()),
            *first.rules(tensors, config),
        )


def said(scheme: Scheme) -> str:
    """Return a scheme and its settings as a few words."""
    shown: list[str] = [each.name for each in fields(scheme) if each.repr] if is_dataclass(scheme) else []
    settings = {name: getattr(scheme, name) for name in shown}
    return " ".join([scheme.kind, *(f"{key}={value}" for key, value in settings.items() if value is not False)])


def _keeping(scheme: Scheme, config: Mapping[str, Any], why: str, names: frozenset[str]) -> tuple[Rule, ...]:
    """Return rules that leave tensors unquantized in the way of their engine."""
    usual = kept(config, why, None, None) if scheme.engine == "mlx" else (Rule(action="keep", why=why),)
    return tuple(replace(rule, names=names) for rule in usual)
