"""Whether an output may go where it is asked to."""

from __future__ import annotations

from pathlib import Path

from jobs.output.journal import find_journals
from jobs.output.publish import check_replaceable
from jobs.spec.job import JobSpec
from loaders.checkpoints.aux_files import OUR_REPORT
from loaders.errors import BadSpec


def check_output(spec: JobSpec) -> None:
    """Raises BadSpec: nothing may be written where the output is to be."""
    check_place(spec, spec.output_path)
    check_free(spec, spec.output_path)


def check_place(spec: JobSpec, output: Path) -> None:
    source = Path(spec.model.path).resolve() if spec.model.path is not None else None
    real = output.resolve()
    if source is not None and (real == source or real.is_relative_to(source) or source.is_relative_to(real)):
        raise BadSpec(f"output.path: {output} and the source {source} lie in one another; choose another path")
    around = next((parent for parent in output.parents if (parent / OUR_REPORT).is_file()), None)
    if around is not None:
        raise BadSpec(f"output.path: {output} lies within another output, {around}; choose another path")


def check_free(spec: JobSpec, output: Path) -> None:
    if output.exists() and spec.output.overwrite:
        check_replaceable(output)
    elif (output.exists() or output.is_symlink()) and not _left_over(output):
        raise BadSpec(f"output.path: {output} exists; output.overwrite=true replaces it, or choose another path")


def _left_over(output: Path) -> bool:
    """Whether an interrupted job has published this output and only not cleaned up behind itself."""
    return (output / OUR_REPORT).is_file() and bool(find_journals(output.parent, output.name))
