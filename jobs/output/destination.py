"""Whether an output may go where it is asked to."""

from __future__ import annotations

from jobs.output.leftovers import find_leftovers
from jobs.output.publish import check_replaceable
from jobs.spec.job import JobSpec
from loaders.checkpoints.aux_files import OUR_REPORT
from loaders.errors import BadSpec
from loaders.storage import open_store
from loaders.storage.address import Address


def check_output(spec: JobSpec) -> None:
    """Raises BadSpec: nothing may be written where the output is to be."""
    check_place(spec, spec.output_address)
    check_free(spec, spec.output_address)


def check_place(spec: JobSpec, output: Address) -> None:
    """Raises BadSpec: the output and the source, or another output, lie in one another."""
    source, real = spec.source_address.real, output.real
    if source == real or source in real.parents or real in source.parents:
        raise BadSpec(f"output.path: {output} and the source {source} lie in one another; choose another path")
    around = next((above for above in output.parents if open_store(above).find(OUR_REPORT) is not None), None)
    if around is not None:
        raise BadSpec(f"output.path: {output} lies within another output, {around}; choose another path")


def check_free(spec: JobSpec, output: Address) -> None:
    """Raises BadSpec: something is there that may not be replaced."""
    is_there = open_store(output).is_taken()
    if is_there and spec.output.overwrite:
        check_replaceable(output)
    elif is_there and not _left_over(output):
        raise BadSpec(f"output.path: {output} exists; output.overwrite=true replaces it, or choose another path")


def _left_over(output: Address) -> bool:
    """Whether an interrupted job has published this output and only not cleaned up behind itself."""
    return open_store(output).find(OUR_REPORT) is not None and bool(find_leftovers(output.parent, output.name))
