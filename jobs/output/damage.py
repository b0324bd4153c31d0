"""What quantization cost, as the report and the model card have it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """The base of all parts of a report: immutable and strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", ser_json_inf_nan="constants")


class WorstTensor(Part):
    """One of the tensors that lost most. Infinities are None."""

    name: str
    role: str
    relative_error: float | None
    sqnr_db: float | None
    max_error: float


class RoleDamage(Part):
    """What the changed tensors of one role (attention, mlp, expert, ...) lost. `worst` is None if they lost nothing."""

    tensors: int
    parameters: int
    bits_per_weight: float
    relative_error: float | None
    sqnr_db: float | None
    worst: WorstTensor | None


class Judged(Part):
    """What verify=logits found, without what depends on the machine: the fields of the same names in `quality`."""

    engine: str
    text: str
    tokens: int
    kl: float
    kl_low: float | None
    kl_high: float | None
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    top1: float


class JudgedStates(Part):
    """What verify=embeddings found, without what depends on the machine: the fields of the same names in `quality`."""

    engine: str
    text: str
    tokens: int
    cosine: float
    cosine_low: float | None
    cosine_high: float | None
    cosine_p1: float
    pooled_cosine: float
    hidden_error: float


class Damage(Part):
    """What quantization cost, on one page: the numbers of the model card.

    Sizes and errors are over all tensors, those by role over the tensors that were quantized or cast. `engine` is who
    loads the output; `quality` is None if the output was not judged in its engine.
    """

    engine: str
    bits_per_weight: float
    relative_error: float | None
    sqnr_db: float | None
    roles: dict[str, RoleDamage]
    worst: tuple[WorstTensor, ...]
    quality: Judged | JudgedStates | None
