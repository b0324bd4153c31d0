"""`weightmill bench plan`: planning large models, each plan in a fresh process, by phases and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.plan_phases import PHASES, SAY, START
from jobs.cli.verb import FAILED, Said, note
from jobs.report.tables import table
from loaders.dtypes import DTYPES
from loaders.places import ROOT

# DeepSeek V3's shapes. Only the headers are written; the weights are holes in the files, which take no disk.
HIDDEN, INNER, VOCABULARY, EXPERTS = 7168, 2048, 129280, 256
ATTENTION = {
    "q_a_proj": (1536, HIDDEN), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512), "o_proj": (HIDDEN, 16384),
}  # fmt: skip
MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
BLOCK = 128  # rows and columns that share a scale
SHARD = 600  # tensors in a file, about as many as the published ones have
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "num_experts_per_tok": 8, "num_attention_heads": 128,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def time_plans(path: str | None, tensors: int, quants: Sequence[str], stored: str, folder: str | None) -> Said:
    """Plan a checkpoint, or one of `tensors` tensors in the shape of DeepSeek V3, to each scheme, and time the phases.

    `stored` is fp8, as the model is published, with scales beside the weights, or bf16.
    """
    busy = Busy()
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as made:
        source = Path(path) if path is not None else Path(made) / "headers"
        if path is None:
            note(f"making the headers of {tensors} tensors in {source}")
            make_headers(source, tensors, is_fp8=stored == "fp8")
        rows = [_planned(source, quant, Path(made)) for quant in quants]
    names = [START, *(phase for phase, _, _ in PHASES), SAY]
    shown = table("CPU seconds", *quants, right=quants)
    for name in names:
        shown.add_row(name, *(f"{row['phases'][name]:.2f}" if "phases" in row else "" for row in rows))
    shown.add_row("all", *(f"{row['cpu_s']:.2f}" if "phases" in row else "" for row in rows))
    shown.add_row("peak RSS MB", *(f"{row['peak_bytes'] / 1e6:.0f}" if "phases" in row else "" for row in rows))
    here, taken = machine(), busy.document()
    said = warning(taken)
    what = str(source) if path is not None else f"{tensors} tensors, {stored}, in the shape of DeepSeek V3"
    faults = [Text(f"{row['quant']}: {row['fault']}", style="red") for row in rows if "fault" in row]
    text = Group(f"{here}; {what}", shown, *faults, *([] if said is None else [Text(said, style="yellow")]))
    document = {"status": "failed" if faults else "done", "machine": here, "busy": taken, "source": what, "rows": rows}
    return Said(document, text, FAILED if faults else 0)


def _planned(source: Path, quant: str, work: Path) -> dict[str, Any]:
    """Plan in a process of its own; the result has its phases, or the fault."""
    file = work / f"{quant}.json"
    command = [
        sys.executable, "-m", "jobs.benchmarks.plan_phases", str(file), f"model.path={source}", f"quant={quant}",
        "tracking=none", f"output.path={work / 'output'}",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if ran.returncode:
        return {"quant": quant, "fault": (ran.stderr.strip().splitlines() or ["no message"])[-1]}
    found = json.loads(file.read_text())
    return {"quant": quant, "cpu_s": sum(found["phases"].values()), **found}


def make_headers(folder: Path, tensors: int, *, is_fp8: bool) -> None:
    """Write a checkpoint of `tensors` tensors, headers only."""
    folder.mkdir(parents=True)
    every = list(islice(_tensors(is_fp8=is_fp8), tensors))
    if every[-1][1] == "F8_E4M3":  # its scale would be missing
        every.pop()
    shards = -(-len(every) // SHARD)
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        header, at = dict[str, Any](), 0
        for name, dtype, shape in every[(number - 1) * SHARD : number * SHARD]:
            end = at + DTYPES[dtype].size(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            at, weight_map[name] = end, file
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **({"quantization_config": FP8} if is_fp8 else {})}))


def _tensors(*, is_fp8: bool) -> Iterator[Tensor]:
    """Yield the tensors of a model without an end: it has as many layers as one takes."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)
    for name, shape in chain.from_iterable(_layer(f"model.layers.{number}") for number in count()):
        if len(shape) == 1 or not is_fp8 or name.endswith("mlp.gate.weight"):
            yield name, "BF16", shape
            continue
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def _layer(layer: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
        yield f"{layer}.{norm}.weight", (width,)
    for name, shape in ATTENTION.items():
        yield f"{layer}.self_attn.{name}.weight", shape
    yield f"{layer}.self_attn.q_a_layernorm.weight", (1536,)
    yield f"{layer}.self_attn.kv_a_layernorm.weight", (512,)
    yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
    for expert in ("shared_experts", *(f"experts.{number}" for number in range(EXPERTS))):
        for name, shape in MLP.items():
            yield f"{layer}.mlp.{expert}.{name}.weight", shape
