"""Run a job: weightmill run [key=value ...]."""

from __future__ import annotations

from jobs.cli.compose import Request
from jobs.cli.verb import Said, Verb, leave
from jobs.spec.job import JobSpec
from jobs.tracking.sources import located


def act(spec: JobSpec) -> Said:
    """Run one job."""
    from jobs.orchestration.source_pass import run_job

    return run_job(spec)


def sweep(config: str, request: Request) -> Said:
    """Run all jobs of a sweep; jobs with the same source share one pass over it."""
    from jobs.orchestration.sweep import run_sweep

    return run_sweep(config, request)


VERB = Verb(
    name="run",
    is_said=False,
    summary="Quantize a checkpoint: read, encode, measure, verify, publish, track.",
    spec=JobSpec,
    act=act,
    located=located,
    examples=(
        ("", "the demo model to NF4"),
        ("model.path=DIR quant=nf4 output.path=OUT", "any folder"),
        ("model=llama70b quant=nf4 cluster=ray", "a preset, on Ray"),
        ("quant=gguf_q4_k_m rules=mine.yaml", "with rules of your own"),
        ("quant=none quant.dtype=bfloat16", "cast"),
        ("quant=auto quant.engine=mlx quant.target_bits=4.25", "a budget"),
        ("quant=nf4 verify=logits", "KL and perplexity, too"),
        ("-m quant=nf4,fp4 quant.group_size=64,128", "a sweep, in one pass"),
        ("-m experiment=four_bit_shootout", "a ready-made sweep"),
    ),
    positional=("model.path",),
    sweep=sweep,
)
main = VERB.main

if __name__ == "__main__":
    leave(main())
