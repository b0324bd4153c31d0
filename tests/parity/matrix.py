"""Every preset against every kind of model: what is shown of it, and by which test.

A cell is "judged": the engine's own tool gives the same tensors byte for byte (HQQ: the same error), and the engine
loads ours with no missing key and computes the same logits. Or "run": it loads and runs ours, and there is no tool
of its own to compare with. Or "bytes": the tensors are compared and no engine computes
with them. Or "refused": the plan says why. `tests/parity/test_matrix.py` holds this table against the tests and against
docs/tested.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["judged", "run", "bytes", "refused"]
KINDS = ("tied", "untied", "odd sizes", "mixture")


@dataclass(frozen=True)
class Cell:
    """`test` is FILE::FUNCTION in this folder, `case` what its parametrization is given. `why` not judged."""

    verdict: Verdict
    test: str
    case: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


Row = tuple[Cell, Cell, Cell, Cell]

BITSANDBYTES = "test_bitsandbytes::test_the_checkpoint_is_that_of_transformers_with_bitsandbytes"
HQQ = "test_hqq::test_qmodel_is_what_hqq_saves_and_hqq_loads_it"
HQQ_MIXTURE = "test_hqq::test_of_a_mixture_the_attention_is_hqqs_and_the_experts_stay"
MLX = "test_mlx::test_the_checkpoint_is_that_of_mlx_lm"
COMPRESSED = "test_compressed_tensors::test_the_checkpoint_is_that_of_compressed_tensors_and_loads"
COMPRESSED_REFUSED = "test_compressed_tensors::test_what_a_scheme_or_its_engine_cannot_hold_is_refused_in_the_plan"
LLAMA_CPP = "test_llama_cpp::test_a_model_is_quantized_as_llama_cpp_quantizes_it"
BY_IMPORTANCES = "test_imatrix::test_a_model_is_quantized_by_importances_as_llama_cpp_does"
TERNARY = "test_bitnet::test_the_engine_loads_and_runs_it"
AGGRESSIVE = "test_llama_cpp::test_llama_cpp_runs_bitnets_rounding"
PLAIN = "test_plain::test_transformers_computes_the_same_from_a_cast_copy"

NO_FUSED_EXPERTS = "hqq neither saves nor loads the experts that transformers 5 fuses"
NO_EXPERTS = "transformers 5 cannot load these experts, or computes something else; vLLM loads them"
NO_TOOL = "no tool of the engine makes such files: its logits are held against a plain model's of the same weights"
RAGGED = "groups do not divide the rows"


def _by_case(test: str, *cases: str) -> Row:
    tied, untied, odd, mixture = (Cell("judged", test, {"case": case}) for case in cases)
    return tied, untied, odd, mixture


def _hqq(preset: str, tied: str, untied: str, odd: str) -> Row:
    judged = (Cell("judged", HQQ, {"case": case}) for case in (tied, untied, odd))
    return *judged, Cell("bytes", HQQ_MIXTURE, {"preset": preset}, NO_FUSED_EXPERTS)  # type: ignore[return-value]


def _compressed(preset: str, *, odd: bool, mixture: bool) -> Row:
    def judged(model: str) -> Cell:
        return Cell("judged", COMPRESSED, {"model": model, "preset": preset})

    experts = {"model": "qwen3 moe", "preset": preset}
    return (
        judged("tied"),
        judged("untied"),
        judged("odd") if odd else Cell("refused", COMPRESSED_REFUSED, {"preset": preset}, RAGGED),
        judged("qwen3 moe") if mixture else Cell("bytes", COMPRESSED, experts, NO_EXPERTS),
    )


def _gguf(file_type: str, tied: str, untied: str, odd: str, mixture: str, by: str | None = None) -> Row:
    """Return the cells of a file type; `by` is the kind of importance matrix that it needs."""
    test, more = (LLAMA_CPP, {}) if by is None else (BY_IMPORTANCES, {"kind": by})
    models = (Cell("judged", test, {"model": m, "file_type": file_type, **more}) for m in (tied, untied, odd, mixture))
    return tuple(models)  # type: ignore[return-value]


MODELS = ("llama tied", "llama untied", "llama odd")
MATRIX: dict[str, Row] = {
    "nf4": _by_case(BITSANDBYTES, "llama tied fp16 nf4", "llama untied bf16 nf4", "odd sizes bf16", "qwen3 moe bf16"),
    "fp4": _by_case(BITSANDBYTES, "llama tied bf16 fp4", "llama untied fp32 fp4", "odd sizes fp16 fp4",
                    "qwen3 moe fp32 fp4"),
    "int8": _by_case(BITSANDBYTES, "llama tied fp16 int8", "llama untied bf16 int8", "odd sizes bf16 int8",
                     "qwen3 moe fp32 int8"),
    "hqq8": _hqq("hqq8", "llama tied, bf16, 8 bits", "llama untied, fp16, 8 bits", "odd sizes, bf16, 8 bits"),
    "hqq4": _hqq("hqq4", "qwen2 with biases, tied, bf16, 4 bits", "llama untied, bf16, 4 bits",
                 "odd sizes, fp16, 4 bits"),
    "hqq3": _hqq("hqq3", "llama tied, fp32, 3 bits", "llama untied, bf16, 3 bits", "odd sizes, bf16, 3 bits"),
    "hqq2": _hqq("hqq2", "llama tied, fp16, 2 bits", "llama untied, fp32, 2 bits, axis 0", "odd sizes, bf16, 2 bits"),
    "mlx_int4": _by_case(MLX, "llama tied int4", "llama int4", "llama odd sizes", "qwen3_moe int4"),
    "mlx_int8": _by_case(MLX, "llama tied int8 fp16", "llama untied int8", "llama odd sizes int8",
                         "qwen3_moe int8 tied"),
    "mlx_mxfp4": _by_case(MLX, "llama tied mxfp4", "llama mxfp4", "llama odd sizes mxfp4", "qwen3_moe mxfp4"),
    "mlx_mxfp8": _by_case(MLX, "llama tied mxfp8", "llama untied mxfp8", "llama odd sizes mxfp8",
                          "qwen3_moe mxfp8 fp16"),
    "mlx_nvfp4": _by_case(MLX, "llama tied nvfp4", "llama untied nvfp4", "llama odd sizes nvfp4", "mixtral nvfp4"),
    "mlx_mixed_4_6": _by_case(MLX, "llama tied mixed", "llama mixed", "llama odd sizes mixed", "qwen3_moe mixed"),
    "fp8_dynamic": _compressed("fp8_dynamic", odd=True, mixture=True),
    "fp8_block": _compressed("fp8_block", odd=False, mixture=False),
    "w8a8": _compressed("w8a8", odd=True, mixture=False),
    "w8a16": _compressed("w8a16", odd=False, mixture=True),
    "w4a16": _compressed("w4a16", odd=False, mixture=True),
    "w4a16_asym": _compressed("w4a16_asym", odd=False, mixture=False),
    "nvfp4a16": _compressed("nvfp4a16", odd=False, mixture=False),
    "mxfp4a16": _compressed("mxfp4a16", odd=False, mixture=True),
    "mxfp4": _compressed("mxfp4", odd=False, mixture=True),
    "gguf_q8_0": _gguf("Q8_0", "qwen2 tied", "llama untied", "llama odd", "mixtral"),
    "gguf_q6_k": _gguf("Q6_K", *MODELS, "qwen3 moe"),
    "gguf_q5_k_m": _gguf("Q5_K_M", *MODELS, "mixtral"),
    "gguf_q4_k_m": _gguf("Q4_K_M", *MODELS, "mixtral"),
    "gguf_q4_0": _gguf("Q4_0", *MODELS, "qwen3 moe"),
    "gguf_q5_k_s": _gguf("Q5_K_S", *MODELS, "mixtral"),
    "gguf_q4_k_s": _gguf("Q4_K_S", *MODELS, "qwen3 moe"),
    "gguf_q3_k_l": _gguf("Q3_K_L", *MODELS, "mixtral"),
    "gguf_q3_k_m": _gguf("Q3_K_M", *MODELS, "mixtral"),
    "gguf_q3_k_s": _gguf("Q3_K_S", *MODELS, "qwen3 moe"),
    "gguf_q2_k": _gguf("Q2_K", *MODELS, "mixtral"),
    "gguf_q2_k_s": _gguf("Q2_K_S", *MODELS, "qwen3 moe", by="full"),
    "gguf_iq4_nl": _gguf("IQ4_NL", *MODELS, "qwen3 moe"),
    "gguf_iq4_xs": _gguf("IQ4_XS", *MODELS, "mixtral"),
    "gguf_q5_1": _gguf("Q5_1", *MODELS, "qwen3 moe"),
    "gguf_q5_0": _gguf("Q5_0", *MODELS, "mixtral"),
    "gguf_q4_1": _gguf("Q4_1", *MODELS, "qwen3 moe"),
    "gguf_tq2_0": _gguf("TQ2_0", *MODELS, "qwen3 moe"),
    "gguf_f16": _gguf("F16", *MODELS, "qwen3 moe"),
    "gguf_bf16": _gguf("BF16", *MODELS, "qwen3 moe"),
    "ternary": tuple(Cell("run", TERNARY, {"model": m}, NO_TOOL) for m in ("tied", "untied", "odd sizes", "qwen3 moe")),
    "ternary_aggressive": tuple(Cell("run", AGGRESSIVE, {"model": m}, NO_TOOL) for m in (*MODELS, "qwen3 moe")),
    "none": tuple(Cell("judged", PLAIN, {"model": m}) for m in ("tied", "untied", "odd sizes", "qwen3 moe")),
}  # type: ignore[assignment]  # fmt: skip


def table() -> str:
    """As docs/tested.md shows it: an engine's presets with the same cells share a row, reasons stand below."""
    rows: dict[tuple[str, ...], list[str]] = {}
    reasons = list(dict.fromkeys(cell.why for cells in MATRIX.values() for cell in cells if cell.why))
    for preset, cells in MATRIX.items():
        engine = cells[0].test.split("::")[0]
        rows.setdefault((engine, *(_text(cell, reasons) for cell in cells)), []).append(f"`{preset}`")
    lines = [f"| `quant=` | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| {' '.join(presets)} | {' | '.join(texts)} |" for (_, *texts), presets in rows.items()]
    return "\n".join([*lines, "", "; ".join(f"({n}) {why}" for n, why in enumerate(reasons, 1)) + "."])


def _text(cell: Cell, reasons: list[str]) -> str:
    return f"{cell.verdict} ({reasons.index(cell.why) + 1})" if cell.why else cell.verdict
