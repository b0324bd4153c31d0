"""verify=logits: outputs are judged before they appear, their original once; what cannot be judged is not begun."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.spec.job import JobSpec
from loaders.errors import BadSpec
from loaders.places import DEMO

pytest.importorskip("torch")
pytest.importorskip("transformers")
from loaders.models import evaluating

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LOGITS = ("verify=logits", "verify.tokens=320", "verify.window=32")


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which originals were evaluated."""
    made: list[Path] = []
    make = evaluating.Reference._make

    def counted(self: Any, folder: Path, *rest: Any) -> None:
        made.append(self.checkpoint.address.path)
        make(self, folder, *rest)

    monkeypatch.setattr(evaluating.Reference, "_make", counted)
    return made


def test_an_output_beyond_a_limit_is_kept_aside_and_judged_once(
    weightmill: Any, tmp_path: Path, originals: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"output.path={tmp_path / 'out'}", *LOGITS)
    ran = weightmill("run", *given, "verify.max_kl=1e-6", "verify.max_perplexity_ratio=1e-3", "verify.min_top1=1")
    assert ran.status == 1
    assert "not published: KL of the logits is 0.0" in ran.err
    assert "above verify.max_perplexity_ratio=0.001; top-1 agreement is 0." in ran.err
    assert not (tmp_path / "out").exists()
    [journal] = [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    assert list((journal / "files").glob("*.safetensors"))
    assert len(originals) == 1
    found = weightmill("clean", tmp_path / "out", "format=json").document["found"]
    assert [row["path"] for row in found] == [str(journal)]

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("it was evaluated again")

    monkeypatch.setattr(evaluating, "judge", never)
    ran = weightmill("run", *given, "verify.max_kl=1", "format=json")
    assert ran.status == 0, ran.err
    quality = ran.document["quality"]
    assert 0.001 < quality["kl_low"] < quality["kl"] < quality["kl_high"] < quality["kl_max"]
    assert quality == json.loads((tmp_path / "out" / "weightmill.json").read_text())["quality"]
    assert ran.document["job"]["verify"]["max_kl"] == 1


def test_a_sweep_evaluates_its_original_once_and_is_compared_by_what_it_found(
    weightmill: Any, tmp_path: Path, originals: list[Path]
) -> None:
    given = (f"output.root={tmp_path}", "quant=none,nf4")
    ran = weightmill("run", "-m", *given, *LOGITS, "objective=[quality/kl]")
    assert ran.status == 0, ran.err
    assert len(originals) == 1
    assert (
        "Pareto front (*) of bits per weight against KL divergence of the logits, nats per token (quality/kl)"
        in ran.out
    )
    assert "top-1 %" in ran.out
    for more in (LOGITS, ()):  # nothing is left to do, nor for those who ask for less
        again = weightmill("run", "-m", *given, *more, "format=json")
        assert again.status == 0, again.err
        assert not again.document["passes"]
    folders = [str(tmp_path / f"demo-{quant}") for quant in ("none", "nf4")]
    compared = weightmill("compare", f"runs=[{','.join(map(repr, folders))}]", "error=quality/kl", "format=json",
                          f"output.root={tmp_path}")  # fmt: skip
    assert compared.status == 0, compared.err
    found = {run["name"]: run["metrics"] for run in compared.document["runs"]}
    assert found["demo-none"]["quality/kl"] == 0
    assert found["demo-none"]["quality/perplexity_ratio"] == 1
    assert found["demo-nf4"]["quality/kl"] > 0.001
    assert set(compared.document["pareto"]) == {"demo-none", "demo-nf4"}
    cleaned = weightmill("clean", f"output.root={tmp_path}", "delete=true")
    assert ".logits.weightmill" in cleaned.out
    assert not (tmp_path / ".logits.weightmill").exists()


@pytest.mark.quick
def test_what_was_made_without_is_judged_later(weightmill: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"output.path={out}").status == 0
    ran = weightmill("verify", f"output.path={out}", *LOGITS, "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["quality"]["tokens"] == 10 * 31
    assert f"MB) go in {out.parent / '.logits.weightmill'}" in ran.err  # what it leaves beside the output
    report = json.loads((out / "weightmill.json").read_text())
    assert report["quality"] == ran.document["quality"]
    assert report["damage"]["quality"]["kl"] == report["quality"]["kl"]
    assert f"KL(original || output): {report['quality']['kl']:.5f} nats a token" in (out / "README.md").read_text()
    assert (out / "README.md").read_text().endswith((DEMO / "README.md").read_text())
    page = (out / "report.html").read_text()
    assert f"{report['quality']['kl']:.5f}" in page
    assert weightmill("verify", f"output.path={out}").status == 0
    # Where judging was killed between the page and the report, judging again mends both.
    (out / "report.html").write_text("another")
    assert weightmill("verify", f"output.path={out}").status == 1
    assert weightmill("verify", f"output.path={out}", *LOGITS).status == 0
    assert (out / "report.html").read_text().count(f"{report['quality']['kl']:.5f}") == page.count(
        f"{report['quality']['kl']:.5f}"
    )
    beyond = weightmill("verify", f"output.path={out}", *LOGITS, "verify.max_kl=1e-6")
    assert beyond.status == 1
    assert "above verify.max_kl=1e-06" in beyond.out
    assert weightmill("verify", f"output.path={out}").status == 0


def test_nothing_begins_that_cannot_be_judged(
    weightmill: Any, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    out = f"output.path={tmp_path / 'out'}"
    for given, said in (
        ((f"verify.text={tmp_path / 'none.txt'}",), "verify.text: cannot read"),
        ((f"verify.text={tmp_path / 'short.txt'}",), "verify.text: expected at least 62 tokens"),
        ((f"model.path={source}",), "no tokenizer that transformers loads"),
        (("output=packed", "quant=mlx_int4"), "nothing here runs packed checkpoints"),
        (("verify.device=mps",), "transformers here has no mps"),
    ):
        ran = weightmill("run", out, *LOGITS, *given)
        assert ran.status == 2, ran.err
        assert said in ran.err
        assert ran.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    ran = weightmill("run", out, *LOGITS, "quant=mlx_int4")
    assert "mlx_lm, which is not installed: pip install mlx-lm; or verify=strict" in ran.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.quick
def test_an_output_that_bitsandbytes_stops_at_on_this_cpu_is_not_begun(
    weightmill: Any, tmp_path: Path, originals: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    given = (f"output.path={tmp_path / 'out'}", "quant.group_size=4096")
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    refused = [weightmill(verb, *given, *LOGITS) for verb in ("plan", "run")]
    assert not (tmp_path / "out").exists()
    assert weightmill("run", *given).status == 0
    refused.append(weightmill("verify", given[0], *LOGITS))
    for ran in refused:
        assert ran.status == 2
        assert "verify=logits: model.layers.0." in ran.err
        assert (
            "columns are no multiple of its group size, 4096, which bitsandbytes needs on a CPU with AVX512" in ran.err
        )
        assert "verify.device=cuda" in ran.err
    with pytest.raises(BadSpec, match="cannot run in 4 bits on this CPU"):
        evaluating.evaluate(DEMO, tmp_path / "out")
    assert originals == []
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    assert weightmill("plan", f"output.path={tmp_path / 'other'}", "quant.group_size=4096", *LOGITS).status == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("verify.max_kl=0.1",), "verify.max_kl: unknown key; it belongs to verify=logits;"),
        (("objective=[quality/kl]",), "objective: quality/kl is measured with verify=logits"),
        (("verify=logits", "verify.min_top1=2"), "verify.min_top1: expected at most 1"),
        (("verify=logits", "verify.window=5000"), "verify.window: expected at most half of verify.tokens=8192"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadSpec) as caught:
        compose("run", JobSpec, take_apart("run", JobSpec, given))
    assert said in caught.value.problems[0]


def test_a_lone_gguf_is_judged_as_a_source(weightmill: Any, tmp_path: Path) -> None:
    q8 = tmp_path / "q8"
    assert weightmill("run", "quant=gguf_q8_0", f"output.path={q8}").status == 0
    shutil.copyfile(next(q8.glob("*.gguf")), tmp_path / "alone.gguf")
    ran = weightmill("run", f"model.path={tmp_path / 'alone.gguf'}", f"output.path={tmp_path / 'out'}", *LOGITS)
    assert ran.status == 0, ran.err
    assert "KL(original || output)" in ran.out
