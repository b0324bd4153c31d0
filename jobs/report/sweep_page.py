"""The page of a sweep for a browser: its jobs beside each other, for each source by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jobs.report import html
from jobs.report.comparison import GAINS, SHOWN_TENSORS, ComparedJob, Comparison, words_of
from jobs.report.html import code
from jobs.report.pictures import size_and_error
from loaders.words import counted


def make_sweep_page(title: str, by_source: Mapping[str, Comparison], links: Mapping[str, str]) -> bytes:
    """Return the page; `links` are the addresses of jobs' own pages, by the jobs' names."""
    jobs = [job for compared in by_source.values() for job in compared.jobs]
    done = sum(job.status == "done" for job in jobs)
    parts: list[str] = [
        html.tag("h1", title),
        html.tag("p", f"{counted(len(jobs), 'job')}, {done} of them done, by weightmill.", "dim"),
    ]
    for source, compared in by_source.items():
        parts.append(html.section(source, _source(compared, links)))
    return html.page(title, parts)


def _source(compared: Comparison, links: Mapping[str, str]) -> Iterator[str]:
    cells = {job.name: compared.cells(job) for job in compared.jobs}
    of_done = [cells[job.name] for job in compared.jobs if job.status == "done"]
    same = {at for at, values in enumerate(zip(*of_done, strict=True)) if len(of_done) > 1 and len({*values}) == 1}
    titles = [(at, title) for at, title in enumerate(compared.titles)]
    if same:
        all_have = "; ".join(f"{title} {of_done[0][at]}" for at, title in titles if at in same)
        yield html.tag("p", f"The same for all: {all_have}.")
    rows = [
        (html.tag("span", "★", "star") if job.name in compared.front else "", _name(job, links), _status(job),
         *(cells[job.name][at] for at, _ in titles if at not in same))
        for job in compared.jobs
    ]  # fmt: skip
    yield html.table(("", "job", "status", *(f"-{title}" for at, title in titles if at not in same)), rows)
    error, better = words_of(compared.error), "higher" if compared.error in GAINS else "lower"
    yield html.tag("p", f"★ is on the Pareto front: no other job is both smaller and of a {better} {error}.", "dim")
    if (drawn := size_and_error(compared.jobs, compared.front, compared.error)) is not None:
        yield html.figure(f"Size and {error}; the line is the Pareto front", drawn)
    if differing := compared.differing[:SHOWN_TENSORS]:
        listed = [
            (code(row["tensor"]), f"{row['ratio']:.2f}", f"{row['errors'][row['least']]:.5f}", row["least"],
             f"{row['errors'][row['most']]:.5f}", row["most"])
            for row in differing
        ]  # fmt: skip
        yield html.table(("tensors that differ most", "-times", "-least error", "of", "-most error", "of"), listed)


def _name(job: ComparedJob, links: Mapping[str, str]) -> str:
    return html.link(job.name, links[job.name]) if job.name in links else html.text(job.name)


def _status(job: ComparedJob) -> str:
    return job.status if job.status == "done" else html.tag("span", job.status_text, "fault")
