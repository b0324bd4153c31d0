"""Asks an engine's own code about a planned output: a question as JSON on standard input, answered on output.

It is a process of its own, so that whoever asks imports no torch, and survives what a stranger's config.json makes of
the engine: too many layers, an endless loop, a crash.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from loaders.lint.engines.base import Answer, Question, Unanswerable

MOST_BYTES = 8 << 30  # that the process may take; classes without weights take some hundred MB
# The module that asks each engine, and the package that must be there.
ASKING = {
    "bitsandbytes": ("transformers", "transformers"),
    "bitnet": ("transformers", "transformers"),
    "compressed-tensors": ("transformers", "transformers"),
    "diffusers": ("diffusers", "transformers"),  # whose classes text encoders are; diffusers is asked for by itself
    "mlx": ("mlx", "mlx-lm"),
    "ggml": ("gguf", "gguf"),
}

# How transformers says that it lacks a package for a class.
NEEDED = re.compile(r"requires the (\S{1,80}) library but it was not found")


def answer_of(question: Question) -> Answer:
    """Ask the engine; whatever its code raises is a reason why it does not answer."""
    module, package = ASKING[question.engine]
    try:
        installed = f"{package} {version(package)}"
    except PackageNotFoundError:
        return Answer(unanswered=f"{package} is not installed")
    try:
        made: Answer = import_module(f"loaders.lint.engines.{module}").check(question, installed)
    except Unanswerable as error:
        return Answer(by=installed, unanswered=f"{installed} {error}")
    except MemoryError:
        return Answer(by=installed, unanswered=f"{installed} took more than {MOST_BYTES >> 30} GB to build the model")
    # The engine's code may raise anything over a config that it does not understand.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        needed = NEEDED.search(lines[0])
        if needed:
            return Answer(by=installed, unanswered=f"{installed} needs the package {needed[1]}, which is not installed")
        return Answer(by=installed, unanswered=f"{installed}: {type(error).__name__}: {lines[0][:200]}")
    return made


def main() -> None:
    """Answer the question on standard input."""
    # Whatever libraries print goes to standard error, since standard output is for the answer.
    out = os.dup(1)
    os.dup2(2, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MOST_BYTES if hard == resource.RLIM_INFINITY else min(hard, MOST_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    said = answer_of(Question.from_json(sys.stdin.read())).to_json().encode()
    with os.fdopen(out, "wb") as stream:
        stream.write(said)


if __name__ == "__main__":
    main()
    # The answer is out; the interpreter's shutdown with torch in it takes half a second more.
    sys.stderr.flush()
    os._exit(0)
