"""What is said of an output's predictions, held against torch; and the same weights in another engine are no worse."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.places import DEMO
from tests.engines import mlx_lm_or_skip
from tests.passes import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

from loaders.models import evaluate  # noqa: E402

from loaders.models import evaluating, quality, runners  # noqa: E402  # isort: skip

SMALL = {"tokens": 320, "window": 32}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo in several forms, and the folder of its logits."""
    made = tmp_path_factory.mktemp("outputs")
    presets = ["nf4", "w4a16"] + (["gguf_q8_0"] if util.find_spec("llama_cpp") else [])
    folders = {preset: each.folder for preset, each in run(DEMO, made, *presets).items()}
    return {**folders, "cache": made / "cache"}


def test_an_original_is_as_good_as_itself(outputs: dict[str, Path]) -> None:
    found = evaluate(DEMO, DEMO, cache=outputs["cache"], **SMALL)
    assert (found.kl, found.kl_max, found.kl_high, found.perplexity_ratio, found.top1) == (0, 0, 0, 1, 1)
    assert found.perplexity == found.perplexity_original
    assert (found.windows, found.tokens) == (10, 10 * 31)
    assert found.kl_by_window == (0.0,) * 10


def test_the_numbers_are_those_of_torch(outputs: dict[str, Path]) -> None:
    found = evaluate(DEMO, outputs["w4a16"], cache=outputs["cache"], **SMALL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer(evaluating.TEXT.read_text(), add_special_tokens=False).input_ids
    runs = torch.tensor([[0, *ids[at : at + 31]] for at in range(0, 10 * 31, 31)])
    load = transformers.AutoModelForCausalLM.from_pretrained
    one, other = load(DEMO, dtype=torch.float32), load(outputs["w4a16"], dtype=torch.float32)
    with torch.no_grad():
        p, q = (torch.log_softmax(model(runs).logits[:, :-1].double(), -1).flatten(0, 1) for model in (one, other))
    each = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    nll = [torch.nn.functional.nll_loss(log, runs[:, 1:].flatten()) for log in (p, q)]
    # float32 logits in other batches: relative errors of 1e-6 in logits of about 10
    assert found.kl == pytest.approx(float(each.mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(each.max()), rel=1e-2)
    assert found.perplexity_original == pytest.approx(float(nll[0].exp()), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(float((nll[1] - nll[0]).exp()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.003)
    assert found.kl_low < found.kl < found.kl_high < found.kl_max
    assert np.mean(found.kl_by_window) == pytest.approx(found.kl)
    assert "compressed-tensors" in found.engine


def test_bitsandbytes_is_held_against_what_its_weights_decode_to(
    outputs: dict[str, Path], weightmill: Any, tmp_path: Path
) -> None:
    ran = weightmill("run", f"model.path={outputs['nf4']}", f"output.path={tmp_path / 'plain'}", "quant=none",
                     "quant.dtype=float32")  # fmt: skip
    assert ran.status == 0, ran.err
    found = evaluate(DEMO, outputs["nf4"], cache=outputs["cache"], **SMALL)
    plain = evaluate(DEMO, tmp_path / "plain", cache=outputs["cache"], **SMALL)
    assert found.kl > 0.005
    # bitsandbytes rounds decoded weights to bfloat16: 2^-9 of each, in a model that is off by a tenth
    assert found.kl == pytest.approx(plain.kl, rel=0.02)
    assert plain.reference_seconds == 0  # the original's logits were there


def test_the_same_weights_compute_the_same_in_mlx_lm(weightmill: Any, tmp_path: Path, outputs: dict[str, Path]) -> None:
    mlx_lm_or_skip()
    ran = weightmill("run", f"output.path={tmp_path / 'mlx'}", "quant=none", "output=mlx")
    assert ran.status == 0, ran.err
    found = evaluate(DEMO, tmp_path / "mlx", cache=outputs["cache"], **SMALL)
    assert found.engine.startswith("mlx-lm")
    assert found.kl < 1e-6  # float32 in another order


def test_the_same_weights_compute_the_same_in_llama_cpp(
    weightmill: Any, tmp_path: Path, outputs: dict[str, Path]
) -> None:
    pytest.importorskip("llama_cpp")
    ran = weightmill("run", f"output.path={tmp_path / 'gguf'}", "quant=none", "output=gguf",
                     "quant.dtype=float32")  # fmt: skip
    assert ran.status == 0, ran.err
    found = evaluate(DEMO, tmp_path / "gguf", cache=outputs["cache"], **SMALL)
    assert found.kl < 1e-6  # float32 in another order
    # a GGUF as the original: its tokenizer is taken out of it, its weights are decoded
    again = evaluate(tmp_path / "gguf", outputs["gguf_q8_0"], **SMALL)
    assert 0 < again.kl < 1e-3
    assert again.perplexity_original == pytest.approx(found.perplexity_original, rel=1e-3)


def causal(folder: Path, **changes: Any) -> Path:
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_what_cannot_be_judged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = open_checkpoint(DEMO)
    short, empty, binary = (tmp_path / name for name in ("short.txt", "empty.txt", "binary.txt"))
    short.write_text("Too short a text.")
    empty.write_text(" \n")
    binary.write_bytes(b"ab\xff\xfe")
    for path, said in (
        (short, r"expected at least 254 tokens, two windows of window=128, found \d+ in .*short.txt"),
        (empty, "is empty"),
        (binary, r"is not UTF-8 text \(byte 2\)"),
        (tmp_path / "none.txt", "cannot read .*none.txt: No such file"),
    ):
        with pytest.raises(BadSpec, match=said):
            evaluating.read_windows(demo, path, window=128)
    with pytest.raises(BadSpec, match=r"window: 1024 tokens, but the model has 512 positions"):
        evaluating.read_windows(demo, window=1024)
    masked = open_checkpoint(causal(tmp_path / "masked", model_type="bert", architectures=["BertForMaskedLM"]))
    with pytest.raises(BadSpec, match=r"is no causal language model of transformers \(model_type 'bert'"):
        evaluating.read_windows(masked)
    mute = causal(tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    with pytest.raises(BadSpec, match="no tokenizer that transformers loads"):
        evaluating.read_windows(open_checkpoint(mute))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(BadSpec, match=r"llama_cpp, which is not installed: pip install 'weightmill\[llama-cpp\]'"):
        runners.check_engine(runners.engine_of("gguf", None), "cpu", "the output")
    with pytest.raises(BadSpec, match="checkpoints of gptq are not run here"):
        runners.engine_of("hf", {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(BadSpec, match="nothing here runs packed"):
        runners.engine_of("packed", None)


def test_nothing_is_compiled_for_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> Any:
        raise AssertionError("it was compiled")

    doubled = torch.compile(lambda x: 2 * x, backend=refuse)
    monkeypatch.setitem(runners.LOADERS, "hqq", lambda *given: (lambda ids: doubled(torch.ones(2)), lambda: None))
    engine = runners.Engine("hqq", ())
    with runners.running(open_checkpoint(DEMO), engine, device="cpu", dtype="float32", window=2, key="x") as runner:
        assert runner(np.zeros((1, 2))).tolist() == [2, 2]


def test_scores_of_known_distributions() -> None:
    p, q = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.25, 0.5]]))
    found = quality.scores(p.astype(np.float32), q.astype(np.float32), np.array([0]))
    assert found.kl[0] == pytest.approx(0.25 * np.log(2), rel=1e-6)  # 0.5 ln 2 + 0 - 0.25 ln 2
    assert (found.nll_original[0], found.nll[0]) == pytest.approx((np.log(2), np.log(4)), rel=1e-6)
    assert not found.agrees[0]
    masked = np.array([[0, 1, -np.inf]], np.float32)
    assert quality.scores(masked, masked, np.array([1])).kl[0] == 0
    assert not quality.scores(np.zeros((1, 3), np.float32), masked, np.array([1])).is_finite


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    found = [quality.interval(random.normal(1, 0.3, 40)) or (np.nan, np.nan) for _ in range(300)]
    inside = [low <= 1.0 <= high for low, high in found]
    assert 0.86 < np.mean(inside) < 1  # 95 %, less what percentile bootstraps of 40 lose, within three deviations
    assert quality.interval(np.ones(9)) is None
