"""The settings of quant=auto, a mix of candidates within a budget; and `QuantSpec`, the union of all quantizations."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from loaders.errors import setting
from loaders.presets.base import Calibration, Spec
from loaders.presets.settings import OneQuant, Quant
from loaders.quantization.scheme import Scheme
from loaders.rules.candidates import (
    AMONG,
    ENGINES,
    KEEP,
    KNOWN,
    REFUSED,
    CandidateMix,
    ChosenMix,
    Engine,
    engine_of,
    settings_of,
)
from loaders.rules.rule import Mix


@cache
def _any_candidate() -> TypeAdapter[Quant]:
    return TypeAdapter(Annotated[OneQuant, Field(discriminator="kind")])


class Chosen(Spec):
    """A mix that a job with quant=auto chose. The job records it in its output, so that it can be used again."""

    tensors: dict[str, tuple[str, ...]] = Field(description="by candidate, the names of its tensors; keep: unquantized")
    weighting: str = Field(description="what the errors were weighted by")
    error: float = Field(ge=0, description="the sum of the weighted errors; by a calibration, nats per token")
    bound: float = Field(description="what no mix within the budget can be below")


class AutoQuant(Quant):
    """The settings of quant=auto."""

    kind: Literal["auto"]
    engine: Engine | None = Field(description=f"what is to load it: {', '.join(ENGINES)}; null: whose `among` are")
    target_bits: float | None = Field(
        gt=0, description="the budget: bits per weight of the whole output, of all tensors"
    )
    target_gb: float | None = Field(gt=0, description="or the bytes of its weight files, in gigabytes (1e9 bytes)")
    among: tuple[str, ...] = Field(description="candidates; none given: the engine's usual ones")
    keep: bool = Field(description="whether a tensor may stay unquantized")
    calibration: Calibration | None = Field(
        description="a text file (or self: text that the model writes) to weight errors by; null: by sizes and roles"
    )
    calibration_tokens: int = Field(ge=256, description="how many tokens of it are read")
    chosen: Chosen | None = Field(default=None, description="the mix; null: it is chosen by measuring")

    @property
    def candidates(self) -> dict[str, Quant]:
        """The candidates by name, in the order given."""
        assert self.engine is not None
        return {name: self._candidate(name) for name in self.among}

    def _candidate(self, name: str) -> Quant:
        settings = settings_of(self.engine or "", name)
        assert settings is not None
        return _any_candidate().validate_python(settings)

    @property
    def base(self) -> Quant:
        """The first candidate of the chosen mix, or of all; its rules decide about tensors that the mix leaves out."""
        taken = [] if self.chosen is None else [name for name in self.chosen.tensors if name != KEEP]
        return self._candidate((taken or list(self.among))[0])

    @property
    def scheme(self) -> Scheme:
        return self.base.scheme

    @property
    def mix(self) -> Mix | None:
        if self.chosen is None:
            return self.base.mix
        found, base = self.chosen.tensors, self.base
        names = dict.fromkeys((base.name, *(name for name in found if name != KEEP)))
        parts = ((self._candidate(name), frozenset(found.get(name, ()))) for name in names)
        whole = tuple((CandidateMix(quant.scheme, quant.mix), names) for quant, names in parts)
        return ChosenMix(whole, frozenset(found.get(KEEP, ())))

    def varied(self, settings: dict[str, Any]) -> Scheme:
        return self.base.varied(settings)

    # Before validation: each of the two fields may be empty, and then follows from the other.
    @model_validator(mode="before")
    @classmethod
    def _engine_and_candidates(cls, values: Any) -> Any:
        """Fill in the engine from the candidates, or the candidates from the engine."""
        if not isinstance(values, dict) or not isinstance(values.get("among", []), list | tuple):
            return values
        engine, among = values.get("engine"), list(values.get("among") or ())
        if engine is None and among:
            engine = next((e for name in among if (e := engine_of(str(name))) is not None), None)
        return {**values, "engine": engine, "among": tuple(among or AMONG.get(str(engine), ()))}

    @model_validator(mode="after")
    def _is_whole(self) -> AutoQuant:
        if self.engine is None:
            raise ValueError(
                f"engine: missing; give {setting('engine')}={'|'.join(ENGINES)}, or {setting('among')}=[...] of one"
            )
        for name in self.among:
            if name in REFUSED and self.engine in ("vllm", "transformers"):
                raise ValueError(f"among: {name} cannot be in a mix: {REFUSED[name]}; {self.engine} has {self.known}")
            if settings_of(self.engine, name) is None:
                raise ValueError(f"among: {name} cannot be in an output for {self.engine}, which has {self.known}")
        if len(set(self.among)) < len(self.among):
            raise ValueError("among: a candidate is named twice")
        if self.engine == "transformers" and len(self.among) > 1:
            raise ValueError("among: transformers reads one 4-bit table in a checkpoint; give nf4 or fp4")
        if (self.target_bits is None) == (self.target_gb is None):
            raise ValueError(f"give a budget: {setting('target_bits')}=4.25 or {setting('target_gb')}=24, not both")
        return self

    @property
    def known(self) -> str:
        """The candidates that the engine has, for messages."""
        return KNOWN[self.engine or ""]


QuantSpec = Annotated[OneQuant | AutoQuant, Field(discriminator="kind")]
