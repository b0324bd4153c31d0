"""Run a job: python -m jobs.run [key=value ...]."""

from __future__ import annotations

from jobs.console import Said, Verb, leave
from jobs.spec import JobSpec


def act(spec: JobSpec) -> Said:
    """Do the job."""
    from jobs.running import run_job

    return run_job(spec)


VERB = Verb(
    "run",
    "Quantize a checkpoint: read, encode, measure, verify, publish, track.",
    JobSpec,
    act,
    (
        ("", "the demo model to NF4"),
        ("model.path=DIR quant=nf4 output.path=OUT", "any folder of weights"),
        ("model=llama70b model.path=DIR quant=nf4 quant.double_quant=true cluster=ray", "a preset's name, on Ray"),
        ("model.path=DIR rules='[{name: mlp.down_proj, action: keep}]'", "keep some tensors as they are"),
        ("model.path=DIR quant=none quant.dtype=bfloat16", "cast"),
        ("-m model.path=DIR quant=nf4,fp4 quant.group_size=64,128", "a sweep: four jobs"),
    ),
    can_sweep=True,
)
main = VERB.main

if __name__ == "__main__":
    leave(main())
