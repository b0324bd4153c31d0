"""Comparisons: jobs of different models are never mixed, and pictures say what is drawn, with its intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.report import plots
from jobs.report.comparison import BITS, ERROR, HIDDEN_ERROR, KL, ComparedJob, error_of, model_of, pareto, words_of
from jobs.report.comparisons import Comparisons


def job(name: str, source: str, bits: float, error: float, **more: Any) -> ComparedJob:
    values = {BITS: bits, ERROR: error, **more.pop("metrics", {})}
    return ComparedJob(name=name, status="done", source=source, metrics=values, tensors={"w": error}, **more)


def test_each_model_has_a_front_of_its_own() -> None:
    jobs = [job("a4", "a", 4, 0.1), job("a8", "a", 8, 0.01), job("b4", "b", 4.1, 0.5), job("b8", "b", 8.1, 0.05)]
    found = Comparisons(jobs)
    assert {source: each.front for source, each in found.of.items()} == {"a": ["a4", "a8"], "b": ["b4", "b8"]}
    assert [row["source"] for row in found.document(9)] == ["a", "b"]
    # Tensors of the same name are of different models, too.
    assert {row["most"] for model in found.document(9) for row in model["differing"]} == {"a4", "b4"}
    page = found.markdown("title", "compare.png")
    assert page.index("## a") < page.index("a8") < page.index("## b") < page.index("b4")
    assert page.count("on the Pareto front") == 2


def test_models_of_one_name_are_told_apart_by_their_fingerprints() -> None:
    jobs = [job("one", "a", 4, 0.1, fingerprint="1234567890"), job("two", "a", 4, 0.2, fingerprint="abcdef1234")]
    failed = ComparedJob(name="failed", status="failed", source="a")
    assert {source: [j.name for j in each.jobs] for source, each in Comparisons([*jobs, failed]).of.items()} == {
        "a (12345678)": ["one", "failed"], "a (abcdef12)": ["two"],
    }  # fmt: skip
    assert list(Comparisons([jobs[0], failed]).of) == ["a"]


def test_a_model_is_named_by_its_source_and_what_changes_it() -> None:
    assert model_of({"model": {"path": "/m", "hub_id": "o/n", "revision": "x"}}) == "/m"
    assert model_of({"model": {"path": None, "hub_id": "o/n", "revision": "x"}}) == "o/n@x"
    assert model_of({"model": {"path": "/m"}, "transform": {"path": "/lora"}}) == "/m with /lora merged"
    assert model_of({"model": {"path": "/m"}, "transform": {"num_blocks": "2"}}) == "/m with 2 blocks more"


def test_what_is_better_the_larger_it_is_has_a_front_of_the_largest() -> None:
    jobs = [job(name, "a", bits, 0.1, metrics={"quality/cosine": cosine}) for name, bits, cosine in
            (("small", 4, 0.9), ("worse", 5, 0.8), ("large", 8, 0.99))]  # fmt: skip
    assert pareto(jobs, "quality/cosine") == ["small", "large"]


def test_jobs_are_compared_by_what_all_of_them_were_judged_by() -> None:
    one, other = job("x", "a", 4, 0.1, metrics={KL: 0.1}), job("y", "a", 5, 0.1)
    states = job("z", "b", 4, 0.1, metrics={HIDDEN_ERROR: 0.2})
    assert error_of([one]) == KL
    assert error_of([one, other]) == ERROR
    assert error_of([states]) == HIDDEN_ERROR
    assert {s: each.error for s, each in Comparisons([one, states]).of.items()} == {"a": KL, "b": HIDDEN_ERROR}


def test_the_picture_has_intervals_and_words_that_a_reader_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **named: drawn.append(figure))
    ends = {f"{KL}_low": 0.05, f"{KL}_high": 0.2}
    jobs = [job("x", "/m/a", 4, 0.1, metrics={KL: 0.1, **ends}), job("y", "/m/b", 8, 0.2, metrics={KL: 0.1})]
    assert plots.comparison_plot(Comparisons(jobs).of, tmp_path / "p.png")
    [figure] = drawn
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles == ["/m/a", "/m/b"]
    (left, right), (alone, _) = (part.axes for part in figure.subfigs)
    assert (left.get_xlabel(), left.get_ylabel()) == ("bits per weight", "KL divergence of the logits, nats per token")
    assert right.get_ylabel() == words_of(ERROR) == "relative error of the weights"
    [bar] = [line for line in left.collections if len(line.get_segments())]
    [[low, high]] = bar.get_segments()
    assert (low[1], high[1]) == pytest.approx((0.05, 0.2))
    assert "bars: 95 % intervals" in left.get_title()
    assert "bars" not in alone.get_title()
    assert not alone.collections
    assert not plots.comparison_plot({}, tmp_path / "none.png")


def test_sizes_that_the_table_shows_as_one_are_one() -> None:
    jobs = [job("worse", "a", 8.0001, 0.2), job("better", "a", 8.0002, 0.1), job("best", "a", 8.01, 0.05)]
    assert pareto(jobs) == ["better", "best"]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((47e6, 47e6), "not quantized: 47.00 MB of each output ("),
        ((47e6, 1e6), "not quantized: 47.00 MB of one ("),
        ((30e6, 47e6), "not quantized: 30.00 MB of one; 47.00 MB of other ("),
        ((1e6, 2e6), None),
    ],
)
def test_what_is_not_quantized_is_said_where_it_is_much(kept: tuple[float, float], said: str | None) -> None:
    jobs = [
        job(name, "a", 4, 0.1, metrics={"size/kept_bytes": size, "size/output_bytes": 60e6})
        for name, size in zip(("one", "other"), kept, strict=True)
    ]
    [of_a] = Comparisons(jobs).of.values()
    found = [line for line in of_a.lines() if isinstance(line, str) and line.startswith("not quantized")]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)
