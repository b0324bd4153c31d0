"""What llama.cpp makes of planned names: the tensors that its architectures have, as gguf-py lists them.

The table here may be newer than the `gguf` package that is installed, or older: either may know a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loaders.architectures import gguf_names
from loaders.lint.base import fault
from loaders.lint.engines.base import Answer, Question, Unanswerable, patterns

ENGINE = "llama.cpp"
NUMBER = re.compile(r"\{(?:[bx]id)?\}")


def check(question: Question, installed: str) -> Answer:
    """Hold every planned name against the architecture's list."""
    import gguf

    known = [*gguf_names.tensor_names(question.architecture or "")]
    for architecture, name in gguf.MODEL_ARCH_NAMES.items():
        if name == question.architecture:
            known += [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]]
    if not known:
        raise Unanswerable(f"has no architecture {question.architecture!r}")
    found = unknown(list(question.stored), known)
    what = f"tensors that architecture {question.architecture} does not have: {patterns(found)}"
    findings = [fault(ENGINE, what, "does not load (wrong number of tensors)", "drop them by a rule")] if found else []
    matrices = [tensor for tensor in question.tensors if len(tensor.shape) > 1 and tensor.action != "drop"]
    done = sum(tensor.numel for tensor in matrices if tensor.is_quantized)
    return Answer(f"{installed}, {question.architecture}", tuple(findings), "", (sum(t.numel for t in matrices), done))


def unknown(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names that none of an architecture's stand for, which have {} or {bid} for a layer's number."""
    shapes = [r"\d+".join(map(re.escape, NUMBER.split(name))) for name in known]
    pattern = re.compile(rf"(?:{'|'.join(shapes)})(?:\.(?:weight|bias|scale|input_scale))?")
    return [name for name in names if not pattern.fullmatch(name)]
