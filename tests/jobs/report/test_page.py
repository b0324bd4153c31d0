"""report.html: what it says, that it fetches and runs nothing, and that it belongs to its output."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.report import charts, html
from tests.making import llama_tensors, make_source, snapshot

PAGE, REPORT = "report.html", "weightmill.json"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "span", "table", "thead", "tbody",
    "tr", "th", "td", "code", "pre", "ul", "li", "a", "figure", "figcaption", "svg", "rect", "text", "path", "circle",
    "polyline",
}  # fmt: skip


class Looked(HTMLParser):
    """What a browser would make of a page: its elements, where they lead, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.leads_to: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.leads_to += [value or "" for name, value in attrs if name in ("href", "src", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def made(weightmill: Any, source: Path, out: Path, *more: str) -> Looked:
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", *more)
    assert ran.status == 0, ran.err
    return Looked((out / PAGE).read_text())


@pytest.mark.quick
def test_a_page_says_what_counts(weightmill: Any, tmp_path: Path) -> None:
    page = made(weightmill, make_source(tmp_path / "m"), tmp_path / "out", "quant=nf4")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert page.tags <= TAGS
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.leads_to == []
    for said in (
        f"{report['totals']['bits_per_weight']:.2f}",
        f"{report['totals']['relative_error']:.5f}",
        "from_pretrained(",
        "Size by role of tensors",
        "Relative error by layer",
        report["damage"]["worst"][0]["name"],
        report["files"][0]["xxh3"],
        "weightmill run",
    ):
        assert said in page.text, said
    assert str(tmp_path) not in page.text


@pytest.mark.quick
def test_strangers_texts_are_only_shown(weightmill: Any, tmp_path: Path) -> None:
    bad = "<script>alert(1)<\\script>\"'><img src=x onerror=alert(2)>\u202e&amp;"
    tensors = llama_tensors()
    tensors[f"model.layers.0.mlp.{bad}.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    source = make_source(tmp_path / bad, tensors)
    page = made(weightmill, source, tmp_path / "out", "quant=nf4", "lint=warn")
    assert page.tags <= TAGS
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.text.count("<script>alert(1)") > 1
    assert "\u202e" not in page.text


def test_texts_of_every_part_are_escaped() -> None:
    bad = '<script>x</script>"><img src=x onerror=y>\u202e\x1b[2J'
    for part in (
        html.text(bad), html.code(bad), html.block(bad), html.items([bad]), html.table([bad], [[bad]]),
        html.numbers([(bad, bad)]), html.section(bad, [bad]), html.link(bad, f"https://x/{bad}"),
        html.figure(bad, charts.bars([(bad, 1.0, 2.0)], (bad, bad), str)), html.page(bad, [bad]).decode(),
        html.figure(bad, charts.scatter([charts.Point(bad, 1.0, 2.0)], [bad], bad, bad)),
        html.figure(bad, charts.grid({(0, bad): 1.0, (1, bad): 4.0}, bad)),
        html.figure(bad, charts.line({0: 1.0, 1: 2.0}, bad, bad)),
    ):  # fmt: skip
        found = Looked(str(part))
        assert found.tags <= TAGS, part
        assert not {name for name in found.attributes if name.startswith("on")}, part
        assert "\x1b" not in part
    assert "href" not in html.link("x", "javascript:alert(1)")


def test_a_policy_forbids_whatever_is_not_of_the_page() -> None:
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'" in html.page("x", []).decode()


@pytest.mark.quick
def test_labels_are_not_cut() -> None:
    """Every text of a chart lies within its frame, as far as the widest usual letters tell."""
    long = "a_role_of_tensors_with_a_name_of_many_letters_that_nobody_would_choose"
    rows = [(long, 1e9, 2e8), ("mlp", 3.0, 4.0)]
    points = [charts.Point(f"{long}-{n}", n / 7, 0.1 + n % 5, (0.1, 9.0)) for n in range(30)]
    for svg in (
        charts.bars(rows, ("before", "after"), "{:,.0f} bytes".format),
        charts.line({n: n / 3 for n in range(100)}, "layer", "error"),
        charts.scatter(points, [points[0].name], "bits", "error"),
        charts.grid({(n, long): float(n) for n in range(5)}, "bits"),
    ):
        root = ElementTree.fromstring(svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            at, wide = float(text.attrib["x"]), len(text.text or "") * 7.4 * float(text.attrib["font-size"]) / 12
            left = at - {"start": 0.0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
            assert left >= -1, text.text
            assert left + wide <= width + 1, text.text
            assert 0 <= float(text.attrib["y"]) <= height


def test_the_page_belongs_to_its_output(weightmill: Any, tmp_path: Path) -> None:
    """It is the same wherever the job ran, verified, not taken over by a later job, and replaced with its output."""
    source = make_source(tmp_path / "m")
    made(weightmill, source, tmp_path / "one", "quant=nf4")
    made(weightmill, source, tmp_path / "other", "quant=nf4")
    assert snapshot(tmp_path / "one", ignore=[REPORT]) == snapshot(tmp_path / "other", ignore=[REPORT])

    again = made(weightmill, tmp_path / "one", tmp_path / "again", "quant=none", "quant.dtype=bfloat16")
    assert "nf4" not in re.sub(r"\W", " ", again.text).split("Plan")[0].split()
    assert PAGE not in json.loads((tmp_path / "again" / REPORT).read_text())["aux"]
    made(weightmill, source, tmp_path / "one", "quant=int8", "output.overwrite=true")

    out = tmp_path / "other"
    assert weightmill("verify", f"output.path={out}").status == 0
    (out / PAGE).write_text((out / PAGE).read_text().replace("nf4", "int8"))
    assert "report.html: it is not as it was written" in weightmill("verify", f"output.path={out}").out
    (out / PAGE).unlink()
    assert "report.html: missing from the output" in weightmill("verify", f"output.path={out}").out


def test_a_strangers_page_is_not_taken_over_and_that_is_said(weightmill: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    (source / PAGE).write_text("<script>theirs</script>")
    page = made(weightmill, source, tmp_path / "out", "quant=nf4")
    assert "theirs" not in page.text
    assert "report.html is not carried over" in page.text


@pytest.mark.quick
def test_an_older_output_has_no_page(weightmill: Any, tmp_path: Path) -> None:
    from tests.jobs.verification.test_output import forge

    made(weightmill, make_source(tmp_path / "m"), tmp_path / "out", "quant=nf4")
    (tmp_path / "out" / PAGE).unlink()
    forge(tmp_path / "out", lambda report: report["run"].pop("page"))
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0
