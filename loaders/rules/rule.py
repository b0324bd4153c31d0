"""Rules, which say which tensor is quantized, kept, cast or dropped: an ordered list, of which the first match decides.

A user's rules come first. The engine's own follow: what its loader does and does not quantize, by the family's roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from loaders.dtypes import dtype_named
from loaders.patterns import compiled
from loaders.quantization.scheme import Scheme
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor

Action = Literal["quantize", "keep", "cast", "drop"]
MOST_DTYPES = 8  # of a condition, that are named one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Conditions on a tensor, of which all that are given must hold, and what is then done with it.

    why: the reason, for plans and reports. name: a regular expression, searched in the tensor's name. shape: one entry
    a dimension, None for any size. dtype: names such as "BF16". role: see `loaders.architectures.family.ROLES`.
    names: exact names; a mix chooses by these. cast_to: the dtype for the action "cast". scheme: the scheme for the
    action "quantize" where it is not the target's. label: where the user wrote the rule; empty for the engine's own.
    """

    action: Action
    why: str
    name: str | None = None
    shape: tuple[int | None, ...] | None = None
    dtype: tuple[str, ...] | None = None
    role: tuple[str, ...] | None = None
    cast_to: str | None = None
    label: str = ""
    scheme: Scheme | None = None
    names: frozenset[str] | None = None

    def matches(self, tensor: LogicalTensor) -> bool:
        return (
            (self.names is None or tensor.name in self.names)
            and (self.role is None or tensor.role in self.role)
            and (self.dtype is None or tensor.dtype.name in self.dtype)
            and (self.shape is None or _fits(self.shape, tensor.shape))
            and (self.name is None or compiled(self.name, self.label or "rules").search(tensor.name))
        )

    def __str__(self) -> str:
        conditions = [f"name ~ {self.name}"] if self.name is not None else []
        if self.shape is not None:
            conditions.append(f"shape {'x'.join('*' if n is None else str(n) for n in self.shape)}")
        conditions += [f"dtype {_listed(self.dtype)}"] if self.dtype else []
        conditions += [f"role {', '.join(self.role)}"] if self.role else []
        conditions += [f"{len(self.names)} by name"] if self.names is not None else []
        return " and ".join(conditions) or "everything else"


def _listed(dtypes: Sequence[str]) -> str:
    """Return dtypes as words; those that the engines' own rules name by the dozen have none of the floats."""
    has_float = any(dtype_named(name).is_float for name in dtypes)
    return ", ".join(dtypes) if has_float or len(dtypes) <= MOST_DTYPES else "not a float"


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(w is None or w == n for w, n in zip(wanted, shape, strict=True))


def dropping(rows: Iterable[tuple[str, str]]) -> tuple[Rule, ...]:
    """Return rules that drop what patterns name, from rows of a pattern and the reason."""
    return tuple(Rule(action="drop", why=why, name=name) for name, why in rows)


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about a tensor, and the rule that made it. Without an encoding the tensor is dropped."""

    tensor: LogicalTensor
    rule: Rule
    encoding: Encoding | None

    @property
    def action(self) -> str:
        return "drop" if self.encoding is None else self.encoding.action

    @property
    def scheme(self) -> Scheme | None:
        return None if self.encoding is None else self.encoding.scheme


class Mix(Protocol):
    """A preset that gives tensors different schemes: a function from the whole list of tensors to rules."""

    def rules(self, tensors: Sequence[LogicalTensor], config: Mapping[str, Any]) -> tuple[Rule, ...]: ...
