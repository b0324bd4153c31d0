"""The settings of verification: what is checked of an output, and the limits that it must keep."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from jobs.spec.base import FloatName, LocalPath, Spec


class WeightsGate(Spec):
    """The limits that every tensor must keep."""

    allow_nonfinite: bool = Field(description="let NaN and infinities of the source pass")
    max_relative_error: float | None = Field(
        gt=0, description="fail above sqrt(sum e^2 / sum x^2) of any tensor; never above the scheme's own limit"
    )


class StrictSpec(WeightsGate):
    """conf/verify/strict: the weights are verified."""

    kind: Literal["strict"] = "strict"


class JudgedSpec(WeightsGate):
    """What verify=logits and verify=embeddings share: the text, and how original and output run over it."""

    text: LocalPath | None = Field(
        description="logits, embeddings: a file of UTF-8 text to read; null: one of the package"
    )
    tokens: int = Field(ge=32, description="logits, embeddings: how many tokens of the text to take, at most")
    window: int = Field(
        ge=16, description="logits, embeddings: tokens that are seen at once; no more than the model's positions"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        description="logits, embeddings: the device of original and output; auto: a GPU if the engine can use one"
    )
    dtype: FloatName = Field(
        description="logits, embeddings: dtype of float arithmetic; below float32, its rounding is measured too"
    )

    @field_validator("window")
    @classmethod
    def _there_are_two(cls, window: int, about: ValidationInfo) -> int:
        if window > about.data.get("tokens", 2 * window) // 2:
            raise ValueError(f"expected at most half of verify.tokens={about.data['tokens']}: two windows are needed")
        return window


class LogitsSpec(JudgedSpec):
    """conf/verify/logits: the weights are verified, and the logits that the output computes in its engine."""

    kind: Literal["logits"]
    max_kl: float | None = Field(gt=0, description="logits: fail above this mean KL(original || output), nats a token")
    max_perplexity_ratio: float | None = Field(
        gt=0, description="logits: fail if the output's perplexity is more than so many times the original's"
    )
    min_top1: float | None = Field(
        gt=0, le=1, description="logits: fail if both find the same token most likely for less than this share"
    )


class EmbeddingsSpec(JudgedSpec):
    """conf/verify/embeddings: the weights are verified, and the last hidden states that the output computes."""

    kind: Literal["embeddings"]
    min_cosine: float | None = Field(
        gt=0, le=1, description="embeddings: fail below this mean cosine of a token's hidden states and the original's"
    )
    max_hidden_error: float | None = Field(
        gt=0, description="embeddings: fail above this sqrt(sum e^2 / sum x^2) of the hidden states"
    )


VerifySpec = Annotated[StrictSpec | LogitsSpec | EmbeddingsSpec, Field(discriminator="kind")]
