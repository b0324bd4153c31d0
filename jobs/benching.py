"""What is timed, in rotation with its peers: kernels on one weight, and whole jobs.

GB/s are 1e9 bytes of bfloat16 input a second (2 bytes a weight), whatever form a case takes its input in. A peer that
is not installed, or does not work, is a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jobs.benches import compressed_tensors, ggml, hqq, into_memory, loading, loading_report, mlx, sweeping
from jobs.benches.busy import Busy, machine, warning
from jobs.benches.timing import SCRATCH, Case, on_threads, rotate
from jobs.console import Said, note
from jobs.spec import TrackingSpec
from loaders.backends.machine import usable_cpus
from loaders.checkpoint import open_checkpoint
from loaders.containers import safetensors, writer_of
from loaders.errors import BadSpec, io_errors
from loaders.integrity import hash_file
from loaders.quantization.kernels import compare, cpu, fourbit, rowwise
from loaders.specs import DTYPES, StoredSpec, StoredTensor

INNER = 1 << 18
SAID = """faster: median over median, of this run
measured: encoding and measuring, of the time of encoding alone"""


# --- kernels


def kernels(rows: int, columns: int, threads: int, repeats: int) -> Said:
    """Encoders and decoders on one bfloat16 weight."""
    weight = _random_bf16(np.random.default_rng(0), rows * columns).reshape(rows, columns)
    cases = [*_ours(weight, threads), *_peers(weight, threads), *(Case(*row) for row in hqq.rows(weight, threads))]
    cases += ggml.rows(weight, threads)
    cases += compressed_tensors.rows(weight, threads)
    note(f"timing {len(cases)} cases, {repeats} laps each; the libraries take a few seconds a lap")
    busy = Busy()
    rotate(cases, repeats)
    return _said(cases, weight.nbytes, busy, {"shape": [rows, columns], "threads": threads, "repeats": repeats})


def _random_bf16(rng: np.random.Generator, count: int) -> np.ndarray:
    values = rng.standard_normal(count, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _ours(weight: np.ndarray, threads: int) -> Iterator[Case]:
    flat, host = weight.reshape(-1), cpu.CpuKernels()
    packed, absmax = np.empty(flat.size // 2, np.uint8), np.empty(flat.size // 64, np.float32)
    half = ((flat.astype(np.uint32) << 16).view(np.float32)).astype(np.float16)
    single, target = half.astype(np.float32), np.empty_like(flat)
    codes, scales, columns = np.empty(flat.size, np.int8), np.empty(weight.shape[0], np.float32), weight.shape[1]
    quarter = flat.size // 4
    thirds = np.empty(quarter, np.uint8)

    def spread(body: Callable[[int, int], object], count: int) -> None:
        edges = [count * i // threads // 64 * 64 for i in range(threads)] + [count]
        on_threads(threads, body, edges[:-1], edges[1:])

    def four(x: np.ndarray, dtype: str, table: str) -> Callable[[], None]:
        def part(a: int, b: int) -> None:
            host.encode_fourbit(x[a:b], dtype, table, 64, packed[a // 2 : b // 2], absmax[a // 64 : b // 64])

        return lambda: spread(part, x.size)

    def eight(x: np.ndarray) -> Callable[[], None]:
        def part(a: int, b: int) -> None:
            taken = cpu.kernel_input(x[a * columns : b * columns], "F16" if x.dtype == np.float16 else "BF16")
            rowwise.encode_int8(taken, columns, codes[a * columns : b * columns], scales[a:b])

        return lambda: spread(part, weight.shape[0])

    def measure() -> None:
        def part(a: int, b: int) -> None:
            decoded, sums = SCRATCH.array("decoded", INNER, np.float32), compare.new_sums()
            for at in range(a, b, INNER):
                end = min(at + INNER, b)
                out = decoded[: end - at]
                fourbit.decode(packed[at // 2 : end // 2], absmax[at // 64 : end // 64], 64, False, out)
                cpu.compare_into(flat[at:end], "BF16", out, sums)

        spread(part, flat.size)

    def three() -> None:
        total: list[float] = []
        spread(lambda a, b: total.append(host.magnitude_sum(flat[a:b], "BF16")), flat.size)
        inverse = flat.size / sum(total)

        def part(a: int, b: int) -> None:
            runs = tuple(flat[k * quarter + a : k * quarter + b] for k in range(4))
            host.pack_ternary(runs, "BF16", inverse, thirds[a:b])  # type: ignore[arg-type]

        spread(part, quarter)

    yield Case("copy (np.copyto)", lambda: spread(lambda a, b: np.copyto(target[a:b], flat[a:b]), flat.size))
    yield Case("nf4, bf16", four(flat, "BF16", "nf4"))
    yield Case("nf4, fp16", four(half, "F16", "nf4"))
    yield Case("nf4, fp32", four(single, "F32", "nf4"))
    yield Case("fp4, bf16", four(flat, "BF16", "fp4"))
    yield Case("int8, bf16", eight(flat))
    yield Case("int8, fp16", eight(half))
    yield Case("nf4 decode + compare (measuring)", measure, after="nf4, bf16")
    yield Case("ternary, bf16", three)
    yield from mlx.ours(flat, spread)


def _peers(weight: np.ndarray, threads: int) -> Iterator[Case]:
    torch = _library("torch")
    tensor: Any = torch.from_numpy(weight).view(torch.bfloat16) if torch else None
    if torch:
        torch.set_num_threads(threads)
    functional: Any = (
        _library("bitsandbytes.functional") if torch and importlib.util.find_spec("bitsandbytes") else None
    )
    for table, beside in (("nf4", "nf4, bf16"), ("fp4", "fp4, bf16")):
        call = None
        if functional:
            call = lambda table=table: functional.quantize_4bit(tensor, blocksize=64, quant_type=table)  # noqa: E731
        yield Case(f"bitsandbytes {table}, bf16", call, "" if call else "not installed: bitsandbytes", beside)
    for name, beside in (("bf16", "int8, bf16"), ("fp16", "int8, fp16")):
        call = None
        if functional:
            taken = tensor if name == "bf16" else tensor.half()
            call = lambda taken=taken: functional.int8_vectorwise_quant(taken.half())  # noqa: E731
        yield Case(f"bitsandbytes int8, {name}", call, "" if call else "not installed: bitsandbytes", beside)
    state: list[Any] = []

    def measure() -> Any:
        if not state:
            state.append(functional.quantize_4bit(tensor, blocksize=64, quant_type="nf4"))
        back = functional.dequantize_4bit(*state[0])
        error = tensor.float() - back.float()
        flat = (tensor.float().flatten(), back.float().flatten())
        return error.square().mean(), error.abs().max(), torch.nn.functional.cosine_similarity(*flat, dim=0)

    beside = "nf4 decode + compare (measuring)"
    missing = "" if functional else "not installed: bitsandbytes"
    yield Case("bitsandbytes dequantize + torch errors", measure if functional else None, missing, beside)

    def three() -> Any:
        values = tensor.float()
        codes = (values * (1 / values.abs().mean().clamp(min=1e-5))).round().clamp(-1, 1).to(torch.int8) + 1
        quarters = codes.to(torch.uint8).reshape(4, -1)
        return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6

    missing = "" if torch else "not installed: torch"
    yield Case("torch, ternary by its definition", three if torch else None, missing, "ternary, bf16")
    yield from mlx.peers(weight, _library("mlx.core"))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# --- loading


def loaders(
    path: str | None, gb: float, folder: str | None, names: Sequence[str], repeats: int, cold: bool, root: Path,
    tracking: TrackingSpec,
) -> Said:  # fmt: skip
    """Every strategy on a checkpoint, with a plot beside the outputs and a tracked run for each.

    Raises:
        BadSpec: no weights there, or an unknown strategy.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as work:
        if path is None:
            path = str(Path(work) / "random-llama")
            note(f"making a random Llama of {gb:g} GB in {path}")
            make_llama(Path(path), gb)
        document = loading.measure(path, names, repeats, cold=cold)
    plot = loading_report.draw(document, root / f"loaders-{Path(path).name}.png")
    tracked = loading_report.track(document, tracking, root, plot)
    return Said({**document, "plot": str(plot), "tracked": tracked}, loading_report.table(document, plot))


def load(path: str | None, gb: float, quant: str, folder: str | None, repeats: int) -> Said:
    """Weights into tensors and models, from the page cache, beside safetensors' and transformers' own way.

    Raises:
        BadSpec: no weights there.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as work:
        source = Path(path) if path is not None else Path(work) / "random-llama"
        if path is None:
            note(f"making a random Llama of {gb:g} GB in {source}")
            make_llama(source, gb)
        checkpoint, busy = open_checkpoint(source), Busy()
        with ThreadPoolExecutor(usable_cpus()) as pool:
            made = list(into_memory.cases(source, quant, pool))
            note(f"timing {len(made)} cases, {repeats} laps each, after one that does not count")
            rotate(made, repeats, shuffled=True)
        about = {"source": str(source), "bytes": checkpoint.size, "repeats": repeats, "quant": quant}
        return _said(made, checkpoint.size, busy, about)


# --- a sweep


def sweep(
    path: str | None, gb: float, quants: Sequence[str], rate: float | None, folder: str | None, repeats: int
) -> Said:
    """Several schemes in one pass, beside the same as single jobs. See jobs/benches/sweeping.py."""

    def make(source: Path) -> None:
        note(f"making a random Llama of {gb:g} GB in {source}")
        make_llama(source, gb)

    return sweeping.sweep(path, quants, rate, repeats, folder, make)


# --- a whole job


def job(path: str | None, gb: float, quant: str, peer: str | None, folder: str | None, repeats: int) -> Said:
    """A whole command, from the page cache, beside copying the same files and beside another tool's command.

    Raises:
        BadSpec: the peer's command lacks its places, or the source is no checkpoint.
    """
    if peer is not None and not ("{source}" in peer and "{output}" in peer):
        raise BadSpec("peer: expected a command with {source} and {output} in it")
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as work:
        if path is None:
            source = Path(work) / "source"
            note(f"making a random Llama of {gb:g} GB in {source}")
            make_llama(source, gb)
        else:
            source = Path(path)
        checkpoint = open_checkpoint(source)
        files = [source / tag.name for tag in checkpoint.files]
        ours = [
            sys.executable,
            "-m",
            "jobs.run",
            f"model.path={source}",
            f"quant={quant}",
            "tracking=none",
            "cluster=local",
        ]
        name, work_path = f"weightmill {quant}", Path(work)
        cases = [
            Case("copy the weight files, and sync", _Command(None, files, work_path)),
            Case(name, _Command([*ours, "output.path={output}"], files, work_path)),
        ]
        if peer is None:
            cases.append(Case("another tool", None, "not given: peer='TOOL {source} {output}'"))
        else:
            command = [part.replace("{source}", str(source)) for part in shlex.split(peer)]
            cases.append(Case(f"peer: {peer}", _Command(command, files, work_path), beside=name))
        note(f"timing {len(cases)} cases, {repeats} laps each, the source read into the page cache before each")
        busy = Busy()
        rotate(cases, repeats, warm_up=0)
        about = {"source": str(source), "bytes": checkpoint.size, "repeats": repeats, "quant": quant}
        return _said(cases, checkpoint.size, busy, about)


class _Command:
    """A process that reads the source and writes an output, which is removed after; None copies and syncs."""

    def __init__(self, command: list[str] | None, files: list[Path], work: Path) -> None:
        self.peak_bytes = 0
        self._command = command
        self._files = files
        self._work = work

    def __call__(self) -> float:
        """Run it once; the seconds it took."""
        for file in self._files:
            hash_file(file)  # into the page cache
        output = self._work / "output"
        try:
            began = time.perf_counter()
            if self._command is None:
                self._copy(output)
            else:
                self._run([part.replace("{output}", str(output)) for part in self._command])
            return time.perf_counter() - began
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _copy(self, output: Path) -> None:
        output.mkdir()
        for file in self._files:
            with io_errors("copying", file):
                shutil.copyfile(file, output / file.name)
                with (output / file.name).open("rb+") as copy:
                    os.fsync(copy.fileno())

    def _run(self, command: list[str]) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": path})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                lines = said.read().strip().splitlines() or ["no message"]
                raise RuntimeError(f"exit status {process.returncode}: {lines[-1]}")
        self.peak_bytes = max(self.peak_bytes, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def make_llama(folder: Path, gb: float, shards: int = 8) -> None:
    """A Llama-shaped checkpoint of random bfloat16 weights of about so many gigabytes."""
    hidden, inner, vocabulary = 2048, 5632, 32000
    layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, round((gb * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for index in range(layers):
        name = f"model.layers.{index}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{name}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    folder.mkdir(parents=True)
    pool = _random_bf16(np.random.default_rng(0), vocabulary * hidden)
    names = sorted(shapes)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        laid = safetensors.lay_out(file, [StoredTensor(n, StoredSpec(DTYPES["BF16"], shapes[n])) for n in part])
        writer = writer_of(folder / file, laid)
        for slot in laid.slots:
            start = hash(slot.name) % 4096 * 64
            data = np.roll(pool[: slot.size // 2], start)
            writer.write(slot, 0, data.view(np.uint8).data)
        writer.seal()
        writer.close()
        weight_map.update(dict.fromkeys(part, file))
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# --- what is said


def _said(cases: list[Case], size: int, busy: Busy, about: Mapping[str, Any]) -> Said:
    taken = busy.document()
    rows = [_row(case, size, {c.name: c for c in cases}) for case in cases]
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = ("best s", "median s", "GB/s best", "GB/s median", "ours is faster", "measured", "peak RSS MB")
    for column in ("case", *numbers):
        table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    for row in rows:
        if row["missing"]:
            table.add_row(row["case"], row["missing"])
            continue
        faster = f"{row['times_faster']:.1f} x" if row["times_faster"] else ""
        measured = f"{row['times_encoding']:.2f}" if row["times_encoding"] else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else ""
        table.add_row(
            row["case"], f"{row['best_s']:.4g}", f"{row['median_s']:.4g}", f"{row['gbps_best']:.3g}",
            f"{row['gbps_median']:.3g}", faster, measured, peak,
        )  # fmt: skip
    here, said = machine(), warning(taken)
    lines = ", ".join(f"{key} {value}" for key, value in about.items())
    text = Group(f"{here}; {lines}", table, SAID, *([] if said is None else [Text(said, style="yellow")]))
    return Said({"status": "done", "machine": here, "busy": taken, **about, "rows": rows}, text)


def _row(case: Case, size: int, cases: Mapping[str, Case]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case.name,
        "missing": case.missing,
        "times_faster": None,
        "times_encoding": None,
        "peak_bytes": 0,
    }
    if case.missing or not case.seconds:
        return {**row, "missing": case.missing or "not run"}
    best, median = min(case.seconds), statistics.median(case.seconds)
    ours, encoder = cases.get(case.beside), cases.get(case.after)
    return {
        **row,
        "best_s": best,
        "median_s": median,
        "gbps_best": size / best / 1e9,
        "gbps_median": size / median / 1e9,
        "times_faster": median / statistics.median(ours.seconds) if ours and ours.seconds else None,
        "times_encoding": 1 + median / statistics.median(encoder.seconds) if encoder and encoder.seconds else None,
        "peak_bytes": getattr(case.call, "peak_bytes", 0),
    }
