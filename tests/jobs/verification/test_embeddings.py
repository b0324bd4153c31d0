"""verify=embeddings: encoders are judged by their hidden states, verify=logits of them is refused with that advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli.compose import compose, take_apart
from jobs.spec.job import JobSpec
from loaders.errors import BadSpec
from loaders.places import DEMO
from tests.tiny_models import make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

from loaders.models import evaluating, hidden_states  # noqa: E402

STATES = ("verify=embeddings", "verify.tokens=400", "verify.window=32")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("bert", tmp_path_factory.mktemp("models") / "bert")


def states_of(folder: Path, runs: Any) -> Any:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=runs).last_hidden_state.double()


@pytest.mark.quick
def test_an_encoder_is_judged_by_its_hidden_states_and_not_by_logits(
    weightmill: Any, tmp_path: Path, bert: Path
) -> None:
    out = tmp_path / "out"
    for verb in ("plan", "run"):
        ran = weightmill(verb, f"model.path={bert}", f"output.path={out}", "verify=logits")
        assert ran.status == 2
        assert "is no causal language model of transformers (model_type 'bert', BertModel)" in ran.err
        assert "verify=embeddings judges it by its hidden states; or verify=strict" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["cwd"]

    ran = weightmill("run", f"model.path={bert}", f"output.path={out}", "quant=w4a16", "quant.group_size=32", *STATES,
                     "format=json")  # fmt: skip
    assert ran.status == 0, ran.err
    quality = ran.document["quality"]
    # The same by hand: every window has [CLS] and [SEP] around its 30 tokens.
    ids = transformers.AutoTokenizer.from_pretrained(bert)(evaluating.TEXT.read_text(), add_special_tokens=False)
    runs = torch.tensor([[2, *ids.input_ids[at : at + 30], 3] for at in range(0, 13 * 30, 30)])
    one, other = states_of(bert, runs), states_of(out, runs)
    cosines = torch.cosine_similarity(one, other, dim=-1)
    # float32 in other batches: relative errors of 1e-6 in states that differ by some hundredths
    assert quality["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert quality["cosine_min"] == pytest.approx(float(cosines.min()), abs=1e-5)
    assert quality["hidden_error"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-3)
    assert quality["tokens"] == 13 * 32
    assert quality["cosine_low"] < quality["cosine"] < quality["cosine_high"] < 1
    report = json.loads((out / "weightmill.json").read_text())
    assert report["damage"]["quality"]["cosine"] == report["quality"]["cosine"] == quality["cosine"]
    assert f"cosine of last hidden states: {quality['cosine']:.5f} (95 %:" in (out / "README.md").read_text()


def test_limits_of_hidden_states_are_a_gate_before_and_after(weightmill: Any, tmp_path: Path, bert: Path) -> None:
    given = (f"model.path={bert}", f"output.path={tmp_path / 'out'}")
    ran = weightmill("run", *given, *STATES, "verify.min_cosine=0.99999", "verify.max_hidden_error=1e-4")
    assert ran.status == 1
    assert "not published: the cosine of hidden states is 0.9" in ran.err
    assert "above verify.max_hidden_error=0.0001" in ran.err
    assert not (tmp_path / "out").exists()
    assert weightmill("run", *given).status == 0
    judged = weightmill("verify", given[1], *STATES)
    assert judged.status == 0, judged.err
    assert "cosine of hidden states" in judged.out
    beyond = weightmill("verify", given[1], *STATES, "verify.min_cosine=0.99999")
    assert beyond.status == 1
    assert "below verify.min_cosine=0.99999" in beyond.out


def test_a_sweep_is_compared_by_hidden_states_over_engines(weightmill: Any, tmp_path: Path, bert: Path) -> None:
    pytest.importorskip("llama_cpp")
    quants = "none,nf4,gguf_q8_0"
    ran = weightmill("run", "-m", f"model.path={bert}", f"output.root={tmp_path}", f"quant={quants}", *STATES,
                     "objective=[quality/cosine]")  # fmt: skip
    assert ran.status == 0, ran.err
    folders = [str(tmp_path / f"bert-{quant}") for quant in quants.split(",")]
    compared = weightmill("compare", f"runs=[{','.join(map(repr, folders))}]", "error=quality/hidden_error",
                          "format=json", f"output.root={tmp_path}")  # fmt: skip
    assert compared.status == 0, compared.err
    found = {run["name"]: run["metrics"] for run in compared.document["runs"]}
    assert found["bert-none"]["quality/cosine"] == 1
    assert found["bert-none"]["quality/hidden_error"] == 0
    assert found["bert-nf4"]["quality/cosine"] < found["bert-gguf_q8_0"]["quality/cosine"] < 1


@pytest.mark.parametrize("quant", ["w4a16", "fp8_dynamic", "hqq4", "nf4"])
def test_a_causal_model_is_judged_by_hidden_states_too(weightmill: Any, tmp_path: Path, quant: str) -> None:
    pytest.importorskip({"hqq4": "hqq", "nf4": "bitsandbytes"}.get(quant, "compressed_tensors"))
    ran = weightmill("run", f"output.path={tmp_path / 'out'}", f"quant={quant}", *STATES, "format=json")
    assert ran.status == 0, ran.err
    # The least is that of w4a16, 0.98; what is not unpacked computes something else (0.14).
    assert 0.97 < ran.document["quality"]["cosine"] < 1


def test_a_quantized_encoder_is_an_original_too(weightmill: Any, tmp_path: Path, bert: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert weightmill("run", f"model.path={bert}", f"output.path={tmp_path / 'nf4'}").status == 0
    ran = weightmill("run", f"model.path={tmp_path / 'nf4'}", f"output.path={tmp_path / 'plain'}", "quant=none",
                     "quant.dtype=float32", *STATES, "format=json")  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.document["quality"]["cosine"] == pytest.approx(1, abs=1e-6)


def test_what_has_no_hidden_states_of_text_is_not_begun(weightmill: Any, tmp_path: Path, bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    folder = tmp_path / "model"
    for changes, said in (
        ({"model_type": "nothing"}, "is no model that transformers knows"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is made of an encoder and a decoder"),
        ({"model_type": "clip", "vision_config": {}}, "takes more than text"),
        ({"model_type": "roberta", "pad_token_id": 1}, "verify.window: 64 tokens, but the model has 62 positions"),
    ):
        make("bert", folder)
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        ran = weightmill("plan", f"model.path={folder}", f"output.path={tmp_path / 'out'}", "verify=embeddings",
                         "verify.window=64", "quant=none")  # fmt: skip
        assert ran.status == 2, ran.err
        assert said in ran.err
        assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("verify.min_cosine=0.9",), "verify.min_cosine: unknown key; it belongs to verify=embeddings;"),
        (("verify.text=x",), "verify.text: unknown key; it belongs to verify=embeddings|logits;"),
        (("objective=[quality/cosine]",), "objective: quality/cosine is measured with verify=embeddings"),
        (("verify=embeddings", "objective=[quality/kl]"), "objective: quality/kl is measured with verify=logits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadSpec) as caught:
        compose("run", JobSpec, take_apart("run", JobSpec, given))
    assert said in caught.value.problems[0]


def test_states_of_known_numbers_are_compared() -> None:
    one = np.array([[1, 0], [0, 0], [0, 0], [2, 0]], np.float32)
    other = np.array([[0, 1], [0, 0], [1, 0], [2, 0]], np.float32)
    found = hidden_states.compared(one, other)
    assert found.cosine.tolist() == [0, 1, 0, 1]
    assert (found.error, found.signal) == (3, 5)
    summed = hidden_states.summed_up([found], window=4, seconds=0, reference_seconds=0, engine="", text="")
    assert summed.hidden_error == pytest.approx((3 / 5) ** 0.5)
    assert summed.cosine_low is None  # one window
    assert not hidden_states.compared(one, np.full_like(one, np.nan)).is_finite


def test_few_windows_give_no_interval(weightmill: Any, tmp_path: Path) -> None:
    few = ("verify.tokens=64", "verify.window=32")
    ran = weightmill("run", f"output.path={tmp_path / 'out'}", "verify=logits", *few)
    assert ran.status == 0, ran.err
    assert "(only 2 windows: no intervals)" in ran.out
    assert "95 %" not in ran.out
    report = json.loads((tmp_path / "out" / "weightmill.json").read_text())
    assert report["quality"]["kl_low"] is report["quality"]["perplexity_ratio_high"] is None
    assert "95 %" not in (tmp_path / "out" / "README.md").read_text().partition(str(DEMO))[0].partition("# The card")[0]
    again = weightmill("verify", f"output.path={tmp_path / 'out'}", "verify=logits", *few, "verify.max_kl=1e-6")
    assert again.status == 1
    assert "nats a token, above verify.max_kl=1e-06" in again.out
