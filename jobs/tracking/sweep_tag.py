"""The tag that says of which sweeps a run is, and how its runs are found.

A run may be of several: a sweep that is repeated, or another one over outputs that are there already. Their names stand
in the tag, the newest last, with commas between.
"""

from __future__ import annotations

SWEEP = "weightmill.sweep"
MOST_SWEEPS = 200  # that a tag names, of which MLflow takes 5000 characters


def of_sweep(name: str) -> str:
    """Return MLflow's filter for the runs of a sweep. It has no OR, and finds what has the name in it."""
    return f"tags.`{SWEEP}` LIKE {quoted(f'%{name}%')}"


def sweeps_in(tag: str) -> list[str]:
    """Return the sweeps that a run's tag names, the newest last."""
    return [each for each in tag.split(",") if each]


def with_sweep(tag: str, sweep: str) -> str:
    """Return a run's tag with another sweep, which comes last."""
    return ",".join([*(each for each in sweeps_in(tag) if each != sweep), sweep][-MOST_SWEEPS:])


def quoted(text: str) -> str:
    """Quote a name for MLflow's filters, which have quotes of both kinds, and no way to write one inside of its own."""
    mark = '"' if "'" in text else "'"
    return f"{mark}{text}{mark}"
