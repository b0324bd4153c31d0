"""Checks that an output may be written at its address."""

from __future__ import annotations

from pathlib import PurePosixPath

from jobs.cli.meant import WEIGHTS
from jobs.output.leftovers import find_leftovers
from jobs.output.publish import check_replaceable
from jobs.spec.job import JobSpec
from loaders.errors import BadSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT


def check_output(spec: JobSpec) -> None:
    """Check that the output may be written at its address.

    Raises:
        BadSpec: it may not; see `check_place` and `check_free`.
    """
    check_place(spec, spec.output_address)
    check_free(spec, spec.output_address)


def check_place(spec: JobSpec, output: Address) -> None:
    """Check that the output is not inside the source or another output, and the source is not inside the output.

    Nor may a new folder have the name of a file of weights.

    Raises:
        BadSpec: it is.
    """
    # Links are resolved: an output behind a link into the source would replace what is being read.
    source, real = spec.source_address.real, output.real
    if source == real or source in real.parents or real in source.parents:
        raise BadSpec(f"output.path: {output} and the source {source} lie in one another; choose another path")
    around = next((above for above in output.parents if open_store(above).find(OUR_REPORT) is not None), None)
    if around is not None:
        raise BadSpec(f"output.path: {output} lies within another output, {around}; choose another path")
    suffix = PurePosixPath(output.name).suffix
    if suffix.lower() in WEIGHTS and output.is_local and open_store(output).absence() is not None:
        raise BadSpec(
            f"output.path: {output}: expected a folder, found the name of a file; give"
            f" output.path={output.parent / output.name.removesuffix(suffix)}, in which the file will be"
        )


def check_free(spec: JobSpec, output: Address, why: str | None = None) -> None:
    """Check that nothing exists at the output's address, or that it may be replaced.

    `why` completes "it exists, ..." with what is known of it: that another job made it, whatever that one left.

    Raises:
        BadSpec: something exists that may not be replaced.
    """
    is_there = open_store(output).is_taken()
    if is_there and spec.output.overwrite:
        check_replaceable(output)
    elif is_there and (why is not None or not _left_over(output)):
        check_replaceable(output)  # or else overwriting would be refused, too
        what = f"exists, {why}" if why else "exists"
        raise BadSpec(f"output.path: {output} {what}; output.overwrite=true replaces it, or choose another path")


def check_ours(spec: JobSpec, output: Address) -> None:
    """Check that what exists at the output's address, if anything does, is an output of weightmill, or may be replaced.

    Raises:
        BadSpec: it is something else.
    """
    if open_store(output).find(OUR_REPORT) is None:
        check_free(spec, output)


def _left_over(output: Address) -> bool:
    """Whether an interrupted job published this output, and only removing its journal is left."""
    return open_store(output).find(OUR_REPORT) is not None and bool(find_leftovers(output.parent, output.name))
