"""Benchmark kernels, loading, planning, jobs, sweeps, Ray, GPUs and quant=auto: weightmill bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Calibration, Format, LocalPath, Spec
from jobs.spec.tracking import TrackingSpec

QUANTS = ("nf4", "mlx_int4", "w4a16", "fp8_dynamic")


class BenchModel(Spec):
    """The checkpoint that is read."""

    path: LocalPath | None = Field(
        description="loaders, load, plan, sweep, stores, budget, gpu, cluster: its folder; null: one that is made"
    )


class BenchOutput(Spec):
    """The folder of the results."""

    root: LocalPath = Field(description="loaders, cores: the folder of the plot; loaders: of the tracking store, too")


class BenchSpec(Spec):
    """The settings of `bench`."""

    what: Literal[
        "kernels", "job", "loaders", "load", "layers", "plan", "sweep", "stores", "budget", "gpu", "cluster"
    ] = Field(
        description="kernels: encoders and decoders alone; job: a whole command; loaders: strategies on your storage;"
        " load: weights into tensors and models; layers: small layers to ternary, beside published figures; plan:"
        " planning a large model, by phases; sweep: several schemes in one pass beside the same as single jobs; stores:"
        " a job whose source comes by HTTP, beside plain reads, and a plan of 640 GB;"
        " budget: what quant=auto loses, beside uniform schemes and presets of its sizes; gpu: what a GPU gives beside"
        " the CPU, and what more cores give; cluster: what Ray costs a job, and its driver for each unit"
    )
    model: BenchModel
    rows: int = Field(gt=0, multiple_of=4, description="kernels, gpu: rows of the weight")
    columns: int = Field(gt=0, multiple_of=64, description="kernels: its columns")
    threads: int = Field(ge=1, description="kernels: threads of each case")
    repeats: int | None = Field(
        ge=1,
        description="laps; in each, every case runs once, in turn (gpu: each case by itself); null: 7, gpu, stores,"
        " cluster and job 3, profile and cores 1",
    )
    path: LocalPath | None = Field(description="job: the source's folder; null makes a random Llama")
    gb: float | None = Field(
        gt=0,
        description="job, loaders, load, sweep, stores, gpu, cluster: gigabytes of the random Llama; null: 1, gpu"
        " and cluster 4",
    )
    quant: str = Field(description="job, load, stores, cluster: the scheme")
    quants: tuple[str, ...] | None = Field(
        description="sweep, plan, job: the schemes; null: sweep and plan take nf4, mlx_int4, w4a16 and fp8_dynamic,"
        " job takes quant"
    )
    sweep: tuple[str, ...] = Field(description="job: schemes of a sweep that is timed, too; none given: none")
    profile: bool = Field(
        description="job: where its seconds go, by phase, instead; needs py-spy, and ptrace for it; tracking=none: of"
        " a job without MLflow"
    )
    cores: tuple[int, ...] = Field(
        description="job: run it on so many of this machine's cores instead, more and more; Linux"
    )
    llmcompressor: LocalPath | None = Field(
        description="job: the Python of an environment that has llm-compressor, to time it beside w4a16 and the like"
    )
    tensors: int = Field(
        ge=1, description="plan: how many tensors the made checkpoint has, of which only headers exist"
    )
    units: int = Field(ge=10, description="cluster: how many empty units the driver is timed with")
    stored: Literal["fp8", "bf16"] = Field(description="plan: their dtype; fp8 has scales beside the weights")
    rate: float | None = Field(
        gt=0,
        description="sweep: MB/s to which the kernel limits reads from the disk (root on Linux); null: no limit;"
        " stores: MB/s of the server; null: 100",
    )
    peer: str | None = Field(description="job: another tool's command with {source} and {output}")
    folder: LocalPath | None = Field(description="where outputs and the random Llama are written and removed again")
    strategies: tuple[str, ...] = Field(description="loaders: which to time; none given: all")
    cold: bool | None = Field(
        description="loaders, job: time reading without the page cache, too; null: loaders yes, job no"
    )
    engine: Literal["mlx", "gguf"] = Field(description="budget: the engine whose schemes are mixed")
    text: LocalPath | None = Field(description="budget: a file of text that the model has not seen")
    calibration: Calibration | None = Field(description="budget: a text file that mixes are weighted by, or self")
    in_engine: bool = Field(description="budget: run outputs in their engine, rather than decoded in transformers")
    tokens: int = Field(ge=512, description="budget: how many tokens of the text are predicted")
    device: Literal["cuda", "mps", "cpu"] = Field(
        description="gpu: the device; cpu is torch's CPU device, to try everything on a machine without a GPU"
    )
    parts: tuple[str, ...] = Field(
        description="gpu: some of bytes, speed, jobs, cores, loading, models; none given: all; cores needs no GPU"
    )
    minutes: float = Field(gt=0, description="gpu: what has not begun by then is left out, which counts as failed")
    output: BenchOutput
    tracking: TrackingSpec
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: BenchSpec) -> Said:
    """Run the benchmark that the request names."""
    is_gpu = spec.what == "gpu"
    gb = spec.gb if spec.gb is not None else 4.0 if is_gpu or spec.what == "cluster" else 1.0
    laps = {"gpu": 3, "stores": 3, "cluster": 3, "job": 1 if spec.profile or spec.cores else 3}
    repeats = spec.repeats if spec.repeats is not None else laps.get(spec.what, 7)
    quants = spec.quants if spec.quants is not None else (spec.quant,) if spec.what == "job" else QUANTS
    if is_gpu:
        from jobs.benchmarks.gpu.run import time_gpu

        return time_gpu(
            spec.device, spec.parts, spec.model.path, gb, (spec.rows, spec.columns), repeats, spec.minutes, spec.folder,
            as_json=spec.format == "json",
        )  # fmt: skip
    if spec.what == "budget":
        from jobs.benchmarks import mixed_precision

        mixed_precision.check(spec.model.path, spec.text, spec.engine)
        assert spec.model.path is not None
        assert spec.text is not None
        return mixed_precision.budget(
            spec.model.path, spec.text, spec.engine, spec.calibration, Path(spec.output.root), spec.folder, spec.tokens,
            in_engine=spec.in_engine,
        )  # fmt: skip
    if spec.what == "loaders":
        from jobs.benchmarks.loaders import time_loaders

        return time_loaders(
            spec.model.path, gb, spec.folder, spec.strategies, repeats, spec.cold is not False, Path(spec.output.root),
            spec.tracking,
        )  # fmt: skip
    if spec.what == "sweep":
        from jobs.benchmarks.sweep import time_sweep

        return time_sweep(spec.model.path, gb, quants, spec.rate, spec.folder, repeats)
    if spec.what == "cluster":
        from jobs.benchmarks.cluster import time_cluster

        return time_cluster(spec.model.path, gb, spec.quant, spec.units, spec.folder, repeats)
    if spec.what == "stores":
        from jobs.benchmarks.stores import time_stores

        return time_stores(spec.model.path, gb, spec.quant, spec.rate, spec.folder, repeats)
    if spec.what == "plan":
        from jobs.benchmarks.planning import time_plans

        return time_plans(spec.model.path, spec.tensors, quants, spec.stored, spec.folder)
    if spec.what == "load":
        from jobs.benchmarks.load import time_load

        return time_load(spec.model.path, gb, spec.quant, spec.folder, repeats)
    if spec.what == "layers":
        from jobs.benchmarks.layers import time_layers

        return time_layers(spec.folder, repeats)
    if spec.what == "kernels":
        from jobs.benchmarks.kernels.run import time_kernels

        return time_kernels(spec.rows, spec.columns, spec.threads, repeats)
    if spec.profile:
        from jobs.benchmarks.job.profile import profile_job

        return profile_job(spec.path, gb, quants[0], "mlflow" if spec.tracking.is_on else "none", spec.folder, repeats)
    if spec.cores:
        from jobs.benchmarks.job.cores import time_cores

        return time_cores(spec.path, gb, quants, spec.cores, spec.folder, repeats, Path(spec.output.root))
    from jobs.benchmarks.job.beside import time_job

    return time_job(
        spec.path, gb, quants, spec.sweep, spec.peer, spec.llmcompressor, spec.folder, repeats, cold=bool(spec.cold)
    )


VERB = Verb(
    name="bench",
    is_said=False,
    summary="Time kernels and loading beside installed libraries, planning, jobs, a sweep, Ray, a GPU, quant=auto.",
    spec=BenchSpec,
    act=act,
    examples=(
        ("kernels", "one thread, a weight of 4096 x 14336"),
        ("loaders model.path=DIR", "every strategy on your storage, cold and warm; the winner as YAML"),
        ("plan tensors=500000 quants=[nf4]", "half a million tensors, headers only, in the shape of DeepSeek V3"),
        ("load gb=1 repeats=3", "tensors and models from the page cache, beside safetensors and transformers"),
        ("layers", "small layers to ternary and other types while loading, beside a published loader's figures"),
        ("job gb=4 repeats=3", "a random Llama of 4 GB to NF4, from the page cache, beside copying it"),
        ("job gb=1 profile=true", "where its seconds go, by phase; how long it holds the interpreter's lock"),
        ("job gb=8 cores=[1,2,4,8,16] folder=/dev/shm", "the same job on more and more cores, in a table and a plot"),
        (
            "job quants=[w4a16,mlx_int4] llmcompressor=PYTHON cold=true",
            "beside the engines' own tools, and from the disk",
        ),
        ("job path=DIR peer='TOOL {source} {output}'", "your checkpoint, in turn with another tool's command"),
        (
            "sweep model.path=DIR rate=100 repeats=1",
            "four schemes in one pass, and one by one, from a disk of 100 MB/s",
        ),
        ("budget model.path=DIR text=FILE engine=gguf", "quant=auto by KL and perplexity, in a table and a plot"),
        ("gpu folder=/dev/shm", "this machine's GPU: bytes, speed, jobs, loading, models; exit status 1 without one"),
        ("cluster gb=8", "a job on Ray beside the same in this process, and what its driver takes for each unit"),
        ("gpu parts=[cores] gb=8", "one job on 1, 2, 4, ... of this machine's cores"),
    ),
    positional=("what",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
