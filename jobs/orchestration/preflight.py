"""The preflight of a job: its exact plan, and all checks that need no weights. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from jobs.execution.choose import check_cluster, is_joined, is_local
from jobs.execution.cluster import LocalCluster
from jobs.orchestration.earlier import check_passed, lacks_judging, made_before
from jobs.output.destination import check_free, check_ours, check_place
from jobs.output.journal import Journal
from jobs.output.report import Report
from jobs.planning.build import make_plan
from jobs.planning.plan import Plan, TargetPlan
from jobs.planning.targets import TARGET, target_of
from jobs.planning.work_key import work_key
from jobs.spec.job import JobSpec
from jobs.spec.strategy import reading
from jobs.spec.verify import JudgedSpec
from jobs.tracking.run import check_tracking
from jobs.verification.logits import Judging, judging_of
from loaders.backends import check_backend, may_differ
from loaders.backends.fastest import fastest
from loaders.backends.memory import no_collection
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.lint import Finding
from loaders.storage.address import Address
from loaders.strategies import WeightLoader

LEVELS = 6  # of the key of a job: its work, an assembly of it, the assembly's fields, and in them each file


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job and its plan."""

    spec: JobSpec
    plan: Plan
    journal: Journal
    done: Report | None = None  # the report of an earlier run of this very job, if it need not run again, but be judged
    judging: Judging | None = None  # the planned evaluation, with verify=logits or verify=embeddings
    findings: tuple[Finding, ...] = ()  # what the engine's own code found, where it was asked

    @property
    def target(self) -> TargetPlan:
        return self.plan.targets[TARGET]

    @property
    def doubled_bytes(self) -> int:
        """The bytes that the disk holds twice while pieces of other processes are joined: those of one piece."""
        is_in_place = is_local(self.spec.cluster) and self.journal.destination.is_local
        return 0 if is_in_place else max((piece.size for piece in self.target.pieces), default=0)

    @cached_property
    def strategy(self) -> tuple[WeightLoader, str]:
        """The strategy that reads the source, and the reason."""
        return reading(self.spec.strategy, self.plan.checkpoint)

    @cached_property
    def backend(self) -> tuple[str, str]:
        """The backend on which encoders run, and the reason."""
        return backend_of(self.spec, self.target)


def plan_job(
    spec: JobSpec, opened: Callable[[Address, str], Checkpoint] = open_checkpoint, *, again: bool = False
) -> Planned:
    """Plan a job from headers, and check its rules, its sizes and its output's address. Nothing is written.

    With `again`, an output that this very job made before is accepted: see `Planned.done`.

    Raises:
        BadSpec: the job cannot be done; all faults of one kind at once.
        BadCheckpoint: the source is damaged.
        VerifyFailed: the output that is accepted does not pass what is asked for now.
    """
    output = spec.output_address
    check_place(spec, output)
    if again:
        check_ours(spec, output)
    else:
        check_free(spec, output)
    target = target_of(spec)
    # Raises BadSpec now if the backend does not exist, and not in the first unit. The machines of a cluster may have
    # what this one lacks; they are asked before they get work.
    if not is_joined(spec.cluster):
        check_backend(spec.backend.asked)
    check_cluster(spec.cluster)
    check_tracking(spec.tracking)
    with no_collection():
        checkpoint = opened(spec.source_address, spec.source.container)
        plan = make_plan(checkpoint, [target], spec.unit_mb)
    made = plan.targets[TARGET]
    # The key covers everything that determines the output's bytes: the units' work, the config, and files made from
    # metadata. Another key means another journal, so a changed request never resumes old work.
    backend = _of_the_bytes(made, spec.backend.kind)
    units = [unit.key(TARGET) for unit in plan.units]
    key = work_key(units, made.config, made.assembly, made.made, *backend, levels=LEVELS)
    planned = Planned(spec=spec, plan=plan, journal=Journal(output, key))
    _ = planned.strategy  # the property raises BadSpec for a strategy that cannot read this source
    found = made_before(spec, plan, planned.journal) if again else None
    if isinstance(found, Report):
        check_passed(found, spec, plan, output)
        planned = replace(planned, done=found)
    elif again:
        check_free(spec, output, found)
    is_wanted = planned.done is None or lacks_judging(planned.done, spec)
    if is_wanted and isinstance(spec.verify, JudgedSpec):
        return replace(planned, judging=judging_of(spec.verify, plan, made, output))
    return planned


def _of_the_bytes(target: TargetPlan, backend: str) -> list[str]:
    """Return the backend if the output's bytes may depend on it, else nothing."""
    schemes = {decision.scheme for decision in target.decisions if decision.scheme is not None}
    return [backend] if may_differ(schemes, backend) else []


def backend_of(spec: JobSpec, target: TargetPlan) -> tuple[str, str]:
    """Return the backend on which a job's encoders run, and the reason; `auto` is measured for the job's own scheme."""
    if spec.backend.kind != "auto":
        return spec.backend.kind, "as asked"
    if not is_local(spec.cluster):
        return "cpu", "nothing is measured on the cluster's machines; backend=cuda asks for their GPUs"
    sizes = Counter[str]()
    for decision in target.decisions:
        if decision.scheme == spec.quant.scheme:
            sizes[decision.tensor.dtype.name] += decision.tensor.source_bytes
    [(dtype, _)] = sizes.most_common(1) or [("BF16", 0)]
    return fastest(spec.quant.scheme, dtype, sizes.total(), LocalCluster(spec.cluster).threads)
