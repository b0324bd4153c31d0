"""Inputs of the readers of what weightmill itself wrote, which others may have damaged, and of command lines."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jobs.cli.compose import compose, take_apart
from jobs.cli.main import VERBS
from jobs.output.journal import Journal
from jobs.output.publish import check_replaceable, complete, is_published
from loaders.errors import WeightmillError
from loaders.loading.load import load_weights
from loaders.loading.resources import configure
from loaders.storage.address import Address
from tests import passes
from tests.fuzz import seeds, whole
from tests.fuzz.cases import Case, Reader
from tests.fuzz.mutations import WORDS, Draw, chance, damaged, json_texts
from tests.fuzz.seeds import seed

# --- report


def _output(preset: str) -> seeds.Build:
    def build(root: Path) -> Path:
        out = root / "out"
        words = [f"model.path={seed('safetensors')}", f"quant={preset}", f"output.path={out}"]
        assert whole.run_verb("run", *words, "tracking=none", "cluster=local", "format=json") == 0
        return out

    return build


OUTPUTS = ("nf4", "gguf_q8_0", "w4a16")
seeds.BUILDERS |= {f"output_{preset}": _output(preset) for preset in OUTPUTS}
REPORT = "weightmill.json"


@st.composite
def report_cases(draw: Draw) -> Case:
    name = f"output_{draw(st.sampled_from(OUTPUTS))}"
    document = json.loads((seed(name) / REPORT).read_text())
    words = draw(st.sampled_from((("verify",), ("verify",), ("replace",), ("compare",))))
    return Case(name, {REPORT: draw(json_texts(document))}, words)


def read_report(folder: Path, words: tuple[str, ...]) -> None:
    if words == ("verify",):
        whole.refuse(whole.run_verb("verify", str(folder), "cluster=local"))
    elif words == ("replace",):
        check_replaceable(Address.of(folder))
    else:
        whole.refuse(whole.run_verb("compare", f"runs=[{folder}]", f"output.root={folder.parent}", "tracking=none"))


# --- journal

KEY = "0" * 12


def _journal(root: Path) -> Path:
    passes.run(seed("safetensors"), root / "made", "nf4")
    return root / "made"


seeds.BUILDERS["journal"] = _journal


@cache
def _plan() -> Any:
    return passes.plan(seed("safetensors"), "nf4")


@st.composite
def journal_cases(draw: Draw) -> Case:
    folder = seed("journal")
    [record] = folder.glob(".nf4.*/records/*.json")
    root = record.parents[1].relative_to(folder)
    files = {str(record.relative_to(folder)): record.read_bytes()}
    if chance(draw, 3):
        job = json.loads((folder / root / "job.json").read_text())
        files[str(root / "job.json")] = draw(json_texts(job))
        files[str(root / "published.json")] = draw(json_texts({"format": 1}))
    else:
        [name] = files
        raw = files[name]
        files[name] = draw(damaged(raw)) if chance(draw, 4) else draw(json_texts(json.loads(raw)))
    return Case("journal", files)


def read_journal(folder: Path, _: tuple[str, ...]) -> None:
    """Take up a job: what counts as done must make a report, and be the files that were planned."""
    # `complete` changes the unpublished output.
    work = folder.parent / "job"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    plan, journal = _plan(), Journal(Address.of(work / "nf4"), KEY)
    with journal.hold({}, overwrite=False):
        is_published(journal)
        done = journal.done(plan.units[0], "nf4")
        if done is not None:
            assert {file.name for file in done.files} == {file.name for file in plan.units[0].outputs["nf4"].files}
            complete(plan, plan.targets["nf4"], journal, [done])


# --- cache entry

seeds.BUILDERS["cache"] = lambda root: _cached(root / "kept")


def _cached(folder: Path) -> Path:
    configure(cache_folder=folder)
    load_weights(seed("safetensors"), "nf4", use_cache=True)
    return folder


@st.composite
def cache_cases(draw: Draw) -> Case:
    folder = seed("cache")
    path = draw(st.sampled_from(sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors"))))
    raw = path.read_bytes()
    made = draw(json_texts(json.loads(raw)) if path.suffix == ".json" else damaged(raw, 4000))
    return Case("cache", {path.name: made})


def read_cache(folder: Path, _: tuple[str, ...]) -> None:
    """Load over a damaged entry, which counts as absent: no error is right."""
    configure(cache_folder=folder)
    try:
        load_weights(seed("safetensors"), "nf4", use_cache=True)
    except WeightmillError as error:
        raise AssertionError("a damaged entry is to count as absent") from error


# --- command line

ARGUMENTS = (
    "quant=nf4", "model.path=/x", "output.path=/y", "quant.group_size=64", "rules=[{action: keep, name: a}]",
    "cluster=local", "source.unit_mb=1", "verify.max_relative_error=0.1", "tracking=none", "objective=[error/relative]",
    "quant=auto", "quant.target_bits=4.2", "quant.engine=mlx", "strategy=read", "transform=block_expansion",
    "transform.num_blocks=2", "experiment=bits4", "store.cache_gb=1", "format=json", "/tmp/a=b/c", "tensors=all",
)  # fmt: skip


@st.composite
def arguments(draw: Draw) -> str:
    word = draw(st.sampled_from(ARGUMENTS))
    key, _, value = word.partition("=")
    forms = (
        word, f"{key}={draw(st.sampled_from(WORDS))}", f"{key}.x={value}", f"+{word}", f"~{key}",
        f"{key}=${{oc.env:HOME}}", f"{key}=${{{key}}}", f"{key}=" + "[" * 200,
        word[: draw(st.integers(0, len(word)))], f"{key}='", f"{key}={{a:{value}}}", f"hydra.{word}",
        f"{key}=${{now:%Y}}", f"{key}@x={value}", f"{key}=???", f"{key}=null", f"{key}=1e308", f"--{key}",
    )  # fmt: skip
    found = draw(st.sampled_from(forms))
    return draw(damaged(found.encode("utf-8", "replace"))).decode("utf-8", "replace") if chance(draw, 8) else found


@st.composite
def command_cases(draw: Draw) -> Case:
    verb = draw(st.sampled_from(("run", "run", *VERBS)))
    return Case(words=(verb, *draw(st.lists(arguments(), min_size=1, max_size=3))))


def read_command(_: Path, words: Sequence[str]) -> None:
    name, *given = words
    verb = importlib.import_module(f"jobs.{name}").VERB
    request = take_apart(verb.config or verb.name, verb.spec, verb._named([word for word in given if word]))
    if not request.flags:
        compose(verb.config or verb.name, verb.spec, request)


READERS = {
    "report": Reader(report_cases(), read_report, 15),
    "journal": Reader(journal_cases(), read_journal, 30),
    "cache": Reader(cache_cases(), read_cache, 20),
    "command": Reader(command_cases(), read_command, 15),
}
