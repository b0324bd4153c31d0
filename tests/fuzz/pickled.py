"""Inputs of the readers of PyTorch's files: zips, the format before them, and hqq's qmodel.pt."""

from __future__ import annotations

import io
import itertools
import pickletools
import zipfile
from functools import cache

import torch
from hypothesis import strategies as st

from tests.fuzz import whole
from tests.fuzz.cases import Case, Reader
from tests.fuzz.mutations import Draw, chance, damaged, pickles
from tests.fuzz.seeds import seed
from tests.fuzz.weights import read_file

KINDS = ("plain", "tied", "nested", "parameters")
ODD_MEMBERS = (
    "archive/data/0", "archive/data/99", "../data.pkl", "a/b/data.pkl", "data.pkl", "archive/byteorder", "x" * 300, "é",
    "archive/data.pkl/",
)  # fmt: skip
READ = st.sampled_from((("specs",), ("load",)))
Members = list[tuple[str, bytes]]


def zip_of(members: Members, deflated: int | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number, (name, data) in enumerate(members):
            method = zipfile.ZIP_DEFLATED if number == deflated else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return out.getvalue()


@cache
def saved(kind: str) -> tuple[tuple[str, bytes], ...]:
    """The members of a file that torch wrote, data.pkl first."""
    tree = {"a": torch.zeros(4, 4, dtype=torch.bfloat16), "b": torch.ones(3)}
    made = {
        "plain": tree,
        "tied": {**tree, "c": tree["a"].t(), "d": tree["a"]},
        "nested": {"state_dict": tree, "epoch": 3, "args": {"lr": 0.1}},
        "parameters": torch.nn.Linear(4, 4).state_dict(),
    }[kind]
    out = io.BytesIO()
    torch.save(made, out)
    with zipfile.ZipFile(out) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    return tuple(sorted(members, key=lambda member: not member[0].endswith("data.pkl")))


@st.composite
def pytorch_cases(draw: Draw) -> Case:
    members: Members = list(saved(draw(st.sampled_from(KINDS))))
    how = draw(st.sampled_from(("pickle", "pickle", "member", "directory", "deflated")))
    if how == "pickle":
        members[0] = members[0][0], draw(pickles(members[0][1]))
    if how == "member":
        at = draw(st.integers(0, len(members) - 1))
        data = draw(st.sampled_from((b"", b"big", b"little", members[at][1], bytes(5000))))
        members[at] = draw(st.sampled_from(ODD_MEMBERS)), data
    raw = zip_of(members, draw(st.integers(0, len(members) - 1)) if how == "deflated" else None)
    if how == "directory":
        start = int.from_bytes(raw[-6:-2], "little")  # of the central directory: its end says where
        raw = raw[:start] + draw(damaged(raw[start:])) if draw(st.booleans()) else draw(damaged(raw))
    return Case(files={"pytorch_model.bin": raw}, words=draw(READ))


@cache
def legacy() -> tuple[tuple[bytes, ...], bytes]:
    """The five pickles of a file in the old format, and its storages."""
    square = torch.zeros(4, 4)
    out = io.BytesIO()
    tree = {"a": square, "b": square.t(), "c": torch.ones(3, dtype=torch.int64)}
    torch.save(tree, out, _use_new_zipfile_serialization=False)
    out.seek(0)
    stops = [0]
    for _ in range(5):
        list(pickletools.genops(out))
        stops.append(out.tell())
    raw = out.getvalue()
    return tuple(raw[a:b] for a, b in itertools.pairwise(stops)), raw[stops[-1] :]


@st.composite
def legacy_cases(draw: Draw) -> Case:
    parts, tail = legacy()
    made = [*parts, tail]
    at = draw(st.sampled_from((3, 0, 1, 2, 4, 5)))
    made[at] = draw(damaged(tail) if at == 5 else pickles(made[at]))
    raw = b"".join(made)
    return Case(files={"pytorch_model.bin": draw(damaged(raw)) if chance(draw, 6) else raw}, words=draw(READ))


@st.composite
def qmodel_cases(draw: Draw) -> Case:
    with zipfile.ZipFile(seed("qmodel.pt") / "qmodel.pt") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    made = [(name, draw(pickles(data)) if name.endswith("data.pkl") else data) for name, data in members]
    return Case("qmodel.pt", {"qmodel.pt": zip_of(made)}, draw(st.sampled_from(whole.WAYS)))


READERS = {
    "pytorch": Reader(pytorch_cases(), read_file, 150),
    "legacy": Reader(legacy_cases(), read_file, 100),
    "qmodel": Reader(qmodel_cases(), whole.read, 30),
}
