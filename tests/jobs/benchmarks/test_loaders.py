"""`weightmill bench loaders`: what it times and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.benchmarks import busy_machine, loader_timings, loaders, timing
from jobs.benchmarks.summing import Summing, total
from jobs.spec.strategy import StrategySpec
from loaders.storage import local
from tests.conftest import Ran


def test_strategies_are_timed_beside_plain_reads_and_the_winner_is_yaml(
    weightmill: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    given = (f"model.path={source}", "strategies=[lazy,read,auto]", "repeats=1", f"output.root={tmp_path / 'out'}")
    ran = weightmill("bench", "loaders", *given, "tracking=none", "format=json")
    assert ran.status == 0, ran.err
    found = ran.document
    rows = {row["case"]: row for row in found["rows"]}
    assert {name for name, row in rows.items() if row["is_strategy"]} == {
        f"strategy={n}" for n in ("lazy", "read", "auto")
    }
    assert not any(row["missing"] for row in rows.values() if "direct" not in row["case"])
    for row in rows.values():
        assert row["missing"] or row["warm_gbps_best"] >= row["warm_gbps_median"] > 0
        assert not row["is_strategy"] or row["first_byte_s"] > 0
        assert not row["is_strategy"] or row["warm_cpu_s"] > 0
    assert set(found["ratios"]["warm"]) == {f"strategy={n}" for n in ("lazy", "read", "auto")}
    assert len(found["spread"]["warm"]["strategy=auto"]) == 1
    assert set(found["busy"]) == {"load_1m", "others_cpu_share", "stolen_cpu_share"}
    assert found["winners"]["warm"]["jobs"] in ("lazy", "read")
    assert Path(found["plot"]).read_bytes()[:4] == b"\x89PNG"
    less = [arg for arg in given if "strategies" not in arg]
    text = weightmill("bench", "loaders", *less, "strategies=[lazy]", "tracking=none", "cold=false").out
    assert "fastest warm, for jobs:  strategy: {kind: " in text
    assert "cold: not measured" in text


def test_the_winner_of_every_strategy_is_a_line_that_the_spec_takes() -> None:
    from pydantic import TypeAdapter

    from loaders.strategies import LOADERS

    for name in LOADERS:
        [(key, values)] = yaml.safe_load(loader_timings.yaml_line(name)).items()
        assert key == "strategy"
        assert TypeAdapter(StrategySpec).validate_json(json.dumps(values)).kind == name


def test_unknown_strategies_are_refused(weightmill: Callable[..., Ran], source: Path) -> None:
    ran = weightmill("bench", "loaders", f"model.path={source}", "strategies=[quick]", "tracking=none")
    assert ran.status == 2
    assert "strategies: unknown 'quick'; known: lazy, eager" in ran.err


def test_a_strategy_that_does_not_work_here_is_a_row_that_says_so(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "runai_model_streamer.file_streamer", None)
    document = loader_timings.measure(str(source), ["lazy", "runai"], 1, cold=False)
    [row] = [row for row in document["rows"] if row["case"] == "strategy=runai"]
    assert row["missing"].startswith(
        "MissingLibrary: strategy=runai needs runai_model_streamer, which is not installed"
    )
    assert "strategy=runai" not in document["ratios"]["warm"]


def test_files_that_stay_in_the_page_cache_are_not_called_cold(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "drop_cached", lambda path: 0.5)
    document = loader_timings.measure(str(source), ["lazy"], 1, cold=True)
    assert (document["is_cold"], document["stayed_in_cache"]) == (False, 0.5)
    assert set(document["winners"]) == {"warm"}


def test_what_auto_says_of_warm_files_is_not_what_it_says_of_cold_ones(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Path] = []
    monkeypatch.setattr(local, "drop_cached", lambda path: dropped.append(path) or 0.0)
    monkeypatch.setattr(local, "cached_share", lambda path: 0.0 if dropped else 1.0)
    document = loader_timings.measure(str(source), ["auto"], 1, cold=True)
    [row] = [row for row in document["rows"] if row["is_strategy"]]
    assert row["said"]["warm"].startswith("lazy: 100% of the files are in the page cache")
    assert row["said"]["cold"].startswith("read: 0% of the files")
    assert loaders._said(row["said"]).startswith("warm: lazy")


def test_a_busy_machine_is_said_aloud(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"load_1m": 0.2, "others_cpu_share": 0.04, "stolen_cpu_share": 0.01}
    assert busy_machine.warning(quiet) is None
    assert busy_machine.warning(dict.fromkeys(quiet)) is None
    said = busy_machine.warning({"load_1m": 9.0, "others_cpu_share": 0.6, "stolen_cpu_share": 0.07})
    assert said is not None
    assert said.startswith("the machine was busy: other processes took 60% and other virtual machines 7% of its CPU")
    monkeypatch.setattr(busy_machine, "_machine", lambda: None)  # a system that does not tell
    assert busy_machine.Busy().document()["others_cpu_share"] is None


def test_what_others_take_of_the_machine_is_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(
        [
            dict.fromkeys(busy_machine.FIELDS, 0.0),
            {**dict.fromkeys(busy_machine.FIELDS, 0.0), "user": 6, "idle": 2, "steal": 2},
        ]
    )
    own = iter([10.0, 13.0])
    monkeypatch.setattr(busy_machine, "_machine", lambda: next(times))
    monkeypatch.setattr(busy_machine, "_own_s", lambda: next(own))
    found = busy_machine.Busy().document()
    assert found["others_cpu_share"] == pytest.approx(0.3)
    assert found["stolen_cpu_share"] == pytest.approx(0.2)


@pytest.mark.quick
def test_laps_are_in_another_order_each_and_the_same_in_every_run() -> None:
    def order() -> list[str]:
        seen: list[str] = []
        cases = [timing.Case(name, lambda name=name: seen.append(name)) for name in "abcdef"]  # type: ignore[misc]
        timing.rotate(cases, 2, shuffled=True)
        return seen

    first = order()
    assert first == order()
    assert len({"".join(first[at : at + 6]) for at in (0, 6, 12)}) > 1
    assert all(sorted(first[at : at + 6]) == list("abcdef") for at in (0, 6, 12))


@pytest.mark.quick
def test_a_slow_case_is_left_out_of_further_laps_once_it_was_timed() -> None:
    slow, quick = timing.Case("slow", lambda: 5.0), timing.Case("quick", lambda: 0.0)
    slow.taken_s = 100.0
    timing.rotate([slow, quick], 3, limit_s=50)
    assert (slow.seconds, quick.seconds) == ([5.0], [0.0, 0.0, 0.0])


def test_a_way_that_reads_other_bytes_is_no_winner() -> None:
    cases = {name: loader_timings.Sums(lambda: 0, 1) for name in "abc"}
    for name, found in zip("abc", (7, 7, 8), strict=True):
        cases[name].sum = found
    rows = {name: loader_timings.StrategyTimings(name, True) for name in "abc"}
    loader_timings._check_sums(cases, rows)
    assert [row.missing for row in rows.values()] == ["", "", "its bytes sum to 8, the others' to 7"]


@pytest.mark.quick
def test_every_byte_counts_in_a_sum() -> None:
    from concurrent.futures import ThreadPoolExecutor

    raw = np.random.default_rng(0).integers(0, 256, (9 << 20) + 3, np.uint8)
    with ThreadPoolExecutor(2) as pool:

        def summed(*arrays: np.ndarray) -> int:
            summing = Summing(pool, 2)
            for array in arrays:
                summing.add(array)
            return summing.total()

        one = total(raw)
        assert summed(raw) == one
        assert summed(raw[:800], raw[800:]) == one
        assert summed(np.concatenate([[np.uint8(9)], raw])[1:]) == one  # not aligned
        for at in (0, 5_000_001, raw.size - 1):
            raw[at] ^= 1
            assert summed(raw) != one
            raw[at] ^= 1
    plain = raw[: raw.size // 8 * 8].view(np.uint64).sum() + np.uint64(int.from_bytes(bytes(raw[-3:]), "little"))
    assert one == int(plain)


def test_each_strategy_is_a_run_of_its_own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Run:
        address = "somewhere"

        def __init__(self, spec: Any, root: Path, name: str, params: Any, tags: Any, key: str) -> None:
            made.append({"name": name, "params": params, "tags": tags})

        def metrics(self, values: Any) -> None:
            made[-1]["metrics"] = values

        def document(self, name: str, value: Any) -> None:
            made[-1]["document"] = name

        def figures(self, draw: Callable[[Path], list[Path]]) -> None:
            made[-1]["figures"] = [path.name for path in draw(tmp_path)]

        def close(self, status: str) -> None:
            made[-1]["status"] = status

    monkeypatch.setattr(loaders, "open_run", Run)
    document = loader_timings.measure(str(source), ["lazy", "read"], 1, cold=False)
    assert loaders.track(document, None, tmp_path, tmp_path / "p.png") == "somewhere"  # type: ignore[arg-type]
    lazy, read, whole = made
    assert (lazy["params"]["case"], read["params"]["case"]) == ("strategy=lazy", "strategy=read")
    assert lazy["metrics"]["warm_gbps_median"] > 0
    assert {run["tags"]["weightmill.sweep"] for run in made} == {whole["tags"]["weightmill.sweep"]}
    assert (whole["document"], whole["figures"]) == ("loaders.json", ["p.png"])
    assert {run["status"] for run in made} == {"FINISHED"}


def test_tensors_and_models_are_timed_beside_safetensors_and_transformers(
    weightmill: Callable[..., Ran], source: Path
) -> None:
    pytest.importorskip("transformers")
    ran = weightmill("bench", "load", f"model.path={source}", "quant=nf4", "repeats=1", "format=json")
    assert ran.status == 0, ran.err
    rows = {row["case"]: row for row in ran.document["rows"]}
    plain = ("load_weights", "safetensors.torch.load_file", "load_model_and_tokenizer", "transformers, from_pretrained")
    for name in plain:
        assert rows[name]["missing"] or rows[name]["gbps_median"] > 0
    assert not rows["load_weights, nf4"]["missing"]
    assert rows["safetensors.torch.load_file"]["times_faster"] > 0
