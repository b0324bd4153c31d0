"""Quantizing checkpoints, as jobs and in memory: `import weightmill`.

Everything public is here: the verbs as functions, and all of the library `loaders`. Names are imported when they are
first used: importing this package alone takes no time, and needs neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import loaders

if TYPE_CHECKING:
    from loaders import *  # noqa: F403
    from weightmill.results import JobPlan as JobPlan
    from weightmill.results import JobResult as JobResult
    from weightmill.results import LintResult as LintResult
    from weightmill.results import PlannedTensor as PlannedTensor
    from weightmill.results import Result as Result
    from weightmill.results import StatusResult as StatusResult
    from weightmill.results import SweepResult as SweepResult
    from weightmill.results import VerifyResult as VerifyResult
    from weightmill.verbs import compare as compare
    from weightmill.verbs import inspect as inspect
    from weightmill.verbs import lint as lint
    from weightmill.verbs import list_outputs as list_outputs
    from weightmill.verbs import plan as plan
    from weightmill.verbs import run as run
    from weightmill.verbs import status as status
    from weightmill.verbs import track as track
    from weightmill.verbs import verify as verify

    __version__: str

# What is added to the library's list, which is the other part of the list of public names:
# tests/weightmill/test_public_names.py holds both.
_OWN = {
    "results": (
        "JobPlan",
        "JobResult",
        "LintResult",
        "PlannedTensor",
        "Result",
        "StatusResult",
        "SweepResult",
        "VerifyResult",
    ),
    "verbs": ("compare", "inspect", "lint", "list_outputs", "plan", "run", "status", "track", "verify"),
}
_PLACE_OF = {name: f"weightmill.{module}" for module, names in _OWN.items() for name in names}
_PUBLIC = sorted({"__version__", *_PLACE_OF, *loaders.__all__})
# What is a command, and no function.
_COMMANDS = {
    "recommend": "get_recommended_loader_config recommends in a program",
    "list": "list_outputs lists in a program",
    **{verb: f"it is a command: `weightmill {verb}`" for verb in ("bench", "clean", "diff")},
}


def _instead(name: str) -> str:
    """Say what there is instead of a name."""
    from loaders.near_misses import near

    said = f"; {_COMMANDS[name]}" if name in _COMMANDS else "" if name.startswith("_") else near(name, _PUBLIC)
    return f"{said}; verbs that are functions: {', '.join(_OWN['verbs'])}" if name in _COMMANDS else said


if not TYPE_CHECKING:  # a checker takes the imports above for the list, and would believe any name of a function
    __all__ = _PUBLIC  # noqa: PLE0605  # made of two lists

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("weightmill")
        if name not in _PUBLIC:
            raise AttributeError(f"module 'weightmill' has no attribute {name!r}{_instead(name)}")
        return getattr(importlib.import_module(_PLACE_OF.get(name, "loaders")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
