"""Libraries that only some work needs: what is said where one is not installed, in one form, with the command.

The base install quantizes on this machine's CPU; all else is an extra of pyproject.toml, or another tool's package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from loaders.errors import BadSpec

# What pip is given for the libraries whose package has another name than their module.
INSTALLED_BY = {
    "ray": "'weightmill[ray]'",
    **dict.fromkeys(("mlflow", "sqlalchemy", "alembic"), "'weightmill[mlflow]'"),
    "matplotlib": "'weightmill[plots]'",
    **dict.fromkeys(("torch", "transformers", "accelerate", "safetensors"), "'weightmill[models]'"),
    "peft": "'weightmill[qlora]'",
    "huggingface_hub": "'weightmill[hub]'",
    **dict.fromkeys(("obstore", "botocore", "azure"), "'weightmill[stores]'"),
    "gguf": "'weightmill[gguf]'",
    "fastsafetensors": "'weightmill[fastsafetensors]'",
    "runai_model_streamer": "'weightmill[runai]'",
    "llama_cpp": "'weightmill[llama-cpp]'",
    "py_spy": "'weightmill[bench]'",
    "mlx": "mlx, on Linux 'mlx[cpu]'",
    "mlx_lm": "mlx-lm",
    "compressed_tensors": "compressed-tensors",
}


class MissingLibrary(BadSpec, ImportError):
    """A request needs a library that is not installed, or does not work here; nothing was started."""


def not_installed(what: str, libraries: Sequence[str], instead: str = "") -> MissingLibrary:
    """Return the error for work (`what`) whose libraries are not installed; `instead` says what goes without them."""
    commands = " ".join(dict.fromkeys(INSTALLED_BY.get(name, name) for name in libraries))
    are = "is" if len(libraries) == 1 else "are"
    needs = f"{what} needs {', '.join(libraries)}, which {are} not installed: pip install {commands}"
    return MissingLibrary(f"{needs}; {instead}" if instead else needs)


def absent(*libraries: str) -> tuple[str, ...]:
    """Return those of some libraries that are not installed. Nothing is imported."""
    found = {name: find_spec(name) for name in libraries}
    # A folder of the name, without code, in which the program was started looks like a package, but has no file.
    return tuple(name for name, spec in found.items() if spec is None or spec.origin is None)


@contextmanager
def needed_for(what: str, instead: str = "") -> Iterator[None]:
    """Say of a library that the block cannot import what it was for, and what to do.

    Raises:
        MissingLibrary: it is not installed; or it is, and does not work here.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(what, [(error.name or str(error)).partition(".")[0]], instead) from error
    except ImportError as error:
        name = (error.name or "a library").partition(".")[0]
        said = (str(error).splitlines() or ["no reason given"])[0]
        raise MissingLibrary(f"{what} needs {name}, which is installed and cannot be imported ({said})") from error
