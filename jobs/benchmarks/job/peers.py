"""The engines' own tools beside which whole jobs are timed, by preset."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.benchmarks.commands import job_command, ours, run_command
from jobs.cli.verb import note
from loaders.places import ROOT

SCRIPT = ROOT / "jobs" / "benchmarks" / "job" / "peer_tools.py"


@dataclass(frozen=True)
class Peer:
    """A tool: its name in the table, its word in peer_tools.py, its setting there, and the modules that it needs."""

    name: str
    tool: str
    setting: str
    needs: tuple[str, ...]


def _llmcompressor(scheme: str) -> tuple[Peer, ...]:
    """Return llm-compressor's tool as it comes, with one worker, and with one for each core."""
    name = f"llm-compressor model_free_ptq, {scheme}"
    return (
        Peer(name, "llmcompressor", f"{scheme} 1", ("llmcompressor",)),
        Peer(f"{name}, a worker a core", "llmcompressor", f"{scheme} 0", ("llmcompressor",)),
    )


PEERS = {
    "w4a16": _llmcompressor("W4A16"),
    "fp8_dynamic": _llmcompressor("FP8_DYNAMIC"),
    "mlx_int4": (Peer("mlx_lm.convert, 4 bits", "mlx", "4", ("mlx_lm",)),),
    "mlx_int8": (Peer("mlx_lm.convert, 8 bits", "mlx", "8", ("mlx_lm",)),),
    "gguf_q4_k_m": (Peer("llama-quantize, Q4_K_M", "llama_quantize", "Q4_K_M", ("llama_cpp",)),),
    "gguf_q8_0": (Peer("llama-quantize, Q8_0", "llama_quantize", "Q8_0", ("llama_cpp",)),),
    "hqq4": (Peer("hqq, 4 bits", "hqq", "4", ("hqq", "torch", "safetensors")),),
}


def absence(peer: Peer, llmcompressor: str | None) -> str:
    """Return why a peer cannot run here; empty if it can."""
    if peer.tool == "llmcompressor" and llmcompressor is not None:
        return "" if Path(llmcompressor).exists() else f"llmcompressor: there is no {llmcompressor}"
    missing = [module for module in peer.needs if importlib.util.find_spec(module) is None]
    if not missing:
        return ""
    hint = "; llmcompressor=PYTHON names an environment's that has it" if peer.tool == "llmcompressor" else ""
    return f"not installed: {', '.join(missing)}{hint}"


def peer_command(peer: Peer, source: Path, output: Path, llmcompressor: str | None) -> list[str]:
    """Return the command of a peer, of a source that `peer_source` made ready."""
    python = llmcompressor if peer.tool == "llmcompressor" and llmcompressor is not None else sys.executable
    return [python, "-P", str(SCRIPT), peer.tool, str(source), str(output), peer.setting]


def peer_source(peer: Peer, source: Path, work: Path) -> Path:
    """Return the folder that a peer reads: the source, or for llama-quantize, which reads only GGUFs, such a one."""
    if peer.tool != "llama_quantize" or any(source.glob("*.gguf")):
        return source
    made = work / "source-gguf"
    if not made.exists():
        note("making a GGUF of bfloat16 for llama-quantize, which does not count")
        run_command(job_command(source, ["gguf_bf16"], f"output.path={made}", "lint=warn"), ours())
    return made
