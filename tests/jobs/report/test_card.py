"""The model card of outputs: what it says, that it is the same wherever a job ran, and that it carries no secret."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from jobs.cli.compose import compose, take_apart
from jobs.output.card_block import BEGIN, END, around_block, card_digest, without_blocks
from jobs.output.report import read_report
from jobs.report.command import command_of
from jobs.spec.job import JobSpec
from loaders.places import DEMO
from loaders.storage.address import Address
from tests.failing import fail_at
from tests.hub.server import Hub
from tests.making import llama_tensors, make_source, snapshot, write_checkpoint
from tests.pipelines import write_pipeline

GOLDEN = Path(__file__).parent / "golden" / "demo_nf4.md"
CARD, PAGE, REPORT = "README.md", "report.html", "weightmill.json"


def front(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def run(weightmill: Any, source: Path, out: Path, *more: str) -> str:
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", *more)
    assert ran.status == 0, ran.err
    return (out / CARD).read_text()


@pytest.mark.quick
def test_the_demos_card(weightmill: Any, tmp_path: Path) -> None:
    assert weightmill("run", f"output.path={tmp_path / 'out'}", "quant=nf4").status == 0
    card = (tmp_path / "out" / CARD).read_text()
    own, theirs = card.split(f"{END}\n\n")
    own = re.sub(r"(weightmill|numpy|numba|xxhash) (?!run )[\w.]+", r"\1 VERSION", own)
    assert own == GOLDEN.read_text(), "where this is meant, write it anew"
    assert theirs == (DEMO / CARD).read_text()


def test_metadata_is_merged(weightmill: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    (source / CARD).write_text(
        "---\nlicense: llama3.1\nlanguage: [en, no]\ntags: [chat, MLX, 4-bit]\nlibrary_name: transformers\n"
        "pipeline_tag: text-generation\nbase_model: org/base\n---\n# Its card\n"
    )
    for quant, library, tag in (
        ("nf4", "transformers", []),
        ("mlx_int4", "mlx", ["mlx"]),
        ("gguf_q8_0", "gguf", ["gguf"]),
    ):
        found = front(run(weightmill, source, tmp_path / quant, f"quant={quant}"))
        assert found == {
            "license": "llama3.1", "language": ["en", "no"], "pipeline_tag": "text-generation",
            "library_name": library, "tags": ["chat", *tag, "weightmill"], "base_model": "org/base",
        }  # fmt: skip


def test_a_model_of_the_hub_is_named_as_the_base(weightmill: Any, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = make_source(tmp_path / "hub" / "models--org--name" / "snapshots" / commit)
    card = run(weightmill, source, tmp_path / "nf4")
    assert front(card)["base_model"] == "org/name"
    assert front(card)["base_model_relation"] == "quantized"
    assert "# name in nf4" in card
    assert f"[org/name](https://huggingface.co/org/name) at `{commit}`" in card
    assert "base_model_relation" not in front(run(weightmill, source, tmp_path / "copy", "quant=none"))
    preset = run(weightmill, make_source(tmp_path / "m"), tmp_path / "preset", "model=llama8b", "quant=fp4")
    assert front(preset)["base_model"].startswith("meta-llama/")


def test_an_output_as_source_gets_its_block_replaced(weightmill: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    (source / CARD).write_text("---\nlicense: mit\n---\n# Its card\n")
    run(weightmill, source, tmp_path / "first", "quant=none")
    card = run(weightmill, tmp_path / "first", tmp_path / "second", "quant=mlx_int4")
    assert card.count(BEGIN) == card.count(END) == 1
    assert card.endswith(f"# The card of its source\n{END}\n\n# Its card\n")
    assert front(card) == {"license": "mit", "library_name": "mlx", "tags": ["weightmill", "mlx"]}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"---\nlicense: [\n---\n# A\n", "its metadata is kept as text: it is not YAML, or has aliases"),
        (b"# A\n" + b"x" * (5 << 20), "it has 5.24 MB, and is left out"),
        (b"# caf\xe9\n", "it is not UTF-8"),
    ],
    ids=["broken", "huge", "latin"],
)
def test_an_odd_card_is_no_error(raw: bytes, said: str, weightmill: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    (source / CARD).write_bytes(raw)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0
    assert f"{CARD} of {source}: {said}" in ran.err
    assert f"*{said}*" in (tmp_path / "out" / CARD).read_text()
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0


def test_names_of_a_stranger_end_no_block(weightmill: Any, tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors[f"model.layers.0.mlp.`|{END}.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    card = run(
        weightmill, write_checkpoint(tmp_path / "m", tensors), tmp_path / "out", "quant=none", "quant.dtype=float16"
    )
    assert card.count(END) == 1
    assert around_block(card.encode())[1].strip() == b""


def test_a_source_without_a_card_gets_ours_alone(weightmill: Any, tmp_path: Path) -> None:
    card = run(weightmill, make_source(tmp_path / "m"), tmp_path / "out")
    assert card.endswith(f"{END}\n")
    assert "The card of its source" not in card
    assert "`m`" in card
    assert str(tmp_path) not in card


def test_without_a_card_the_sources_is_copied(weightmill: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path / "m")
    run_of = (f"model.path={source}", "quant=nf4", "output.card=false")
    assert weightmill("run", *run_of, f"output.path={tmp_path / 'none'}").status == 0
    assert not (tmp_path / "none" / CARD).exists()
    (source / CARD).write_text("# Its card\n")
    assert weightmill("run", *run_of, f"output.path={tmp_path / 'out'}").status == 0
    assert (tmp_path / "out" / CARD).read_text() == "# Its card\n"
    run(weightmill, source, tmp_path / "with")
    with_card, without = (snapshot(tmp_path / name, ignore=[CARD, PAGE, REPORT]) for name in ("with", "out"))
    assert with_card == without


def test_what_may_differ_stands_in_the_blocks(weightmill: Any, tmp_path: Path) -> None:
    cards = []
    for name in ("one", "other"):
        make_source(tmp_path / name)
        cards.append(run(weightmill, tmp_path / name, tmp_path / f"{name}-out", "model.name=m").encode())
    assert cards[0] != cards[1]
    assert without_blocks(cards[0]) == without_blocks(cards[1])
    reports = [read_report(Address.of(tmp_path / f"{name}-out")) for name in ("one", "other")]
    assert [report.aux[CARD] for report in reports] == [card_digest(cards[0])] * 2


def test_a_changed_block_is_no_fault_and_a_changed_text_is(weightmill: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = run(weightmill, make_source(tmp_path / "m"), out)
    (out / CARD).write_text(card.replace("## How to load it", "## Loading"))
    assert weightmill("verify", f"output.path={out}").status == 0
    (out / CARD).write_text(card.replace("tags:", "license: mit\ntags:"))
    assert "README.md: it is not as it was written" in weightmill("verify", f"output.path={out}").out


def test_an_interrupted_job_writes_the_same_card(
    weightmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "m")
    wanted = run(weightmill, source, tmp_path / "whole", "unit_mb=0.02")
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "unit_mb=0.02")
    # The card is no part of the work: a job that was begun without one goes on.
    assert run(weightmill, source, tmp_path / "out", "unit_mb=0.02") == wanted
    again = weightmill("run", "-m", f"model.path={source}", f"output.path={tmp_path / 'out'}", "unit_mb=0.02")
    assert "done before" in again.err


def test_the_damage_stands_in_the_report(weightmill: Any, tmp_path: Path) -> None:
    run(weightmill, make_source(tmp_path / "m"), tmp_path / "out")
    found = read_report(Address.of(tmp_path / "out"))
    assert found.damage is not None
    assert found.damage.bits_per_weight == found.totals.bits_per_weight
    assert set(found.damage.roles) == {"attention", "mlp"}
    errors = [t.relative_error or 0 for t in found.tensors if t.role == "mlp"]
    worst = found.damage.roles["mlp"].worst
    assert worst is not None
    assert worst.relative_error == max(errors)
    assert found.damage.worst[0].name in {t.name for t in found.tensors}
    # Reports of before there were cards are read as ever.
    document = json.loads((tmp_path / "out" / REPORT).read_text())
    del document["damage"], document["run"]["request"]["output"]["card"], document["run"]["xxh3"]
    (tmp_path / "out" / REPORT).write_text(json.dumps(document))
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0


def test_on_the_hub_it_names_ids_and_the_commit(
    weightmill: Any, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["hf_mine"] = "me"
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    source = make_source(tmp_path / "m")
    (source / CARD).write_text("---\nlicense: mit\n---\n# Its card\n")
    commit = hub.put("org/name", snapshot(source))
    given = ("quant=nf4", "model.name=m", f"output.journal={tmp_path / 'journals'}")
    assert weightmill("run", "model.path=hf://org/name", "output.path=hf://me/name-nf4", *given).status == 0
    made = hub.get("me/name-nf4")
    card = made.objects[made.files("main")[CARD].sha256]
    assert front(card.decode()) == {
        "license": "mit", "library_name": "transformers", "tags": ["weightmill"],
        "base_model": "org/name", "base_model_relation": "quantized",
    }  # fmt: skip
    assert f"- source: [org/name](https://huggingface.co/org/name) at `{commit}`" in card.decode()
    assert f"weightmill run model.path=hf://org/name@{commit} model.name=m quant=nf4\n" in card.decode()
    assert 'AutoModelForCausalLM.from_pretrained("me/name-nf4")' in card.decode()
    data = ModelCard(card.decode()).data
    assert (data.base_model, data.license, data.library_name) == ("org/name", "mit", "transformers")
    here = run(weightmill, source, tmp_path / "here", "quant=nf4", "model.name=m")
    assert without_blocks(here.encode()) == without_blocks(card)


def test_a_pipeline_has_one_at_its_top(weightmill: Any, tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "pipeline")
    card = run(weightmill, source, tmp_path / "out", "quant=nf4")
    assert front(card)["library_name"] == "diffusers"
    assert 'DiffusionPipeline.from_pretrained("DIR")' in card
    assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob(CARD)] == [CARD]


def test_every_preset_says_who_loads_it(weightmill: Any, tmp_path: Path) -> None:
    """One preset of each engine and layout."""
    source = make_source(tmp_path / "m")
    said = {
        "int8": "transformers with bitsandbytes", "ternary": "transformers (its quantization `bitnet`)",
        "w8a8": "vLLM, and transformers with compressed-tensors", "hqq4": "hqq",
        "hqq4 output=hf": "transformers 4 with hqq",
        "mlx_int8": "mlx-lm", "gguf_f16": "llama.cpp", "none output=packed": "moeflux, by its format (it was not run)",
        "none": "transformers",
    }  # fmt: skip
    for number, (quant, engine) in enumerate(said.items()):
        out = tmp_path / f"out{number}"
        assert f"Loaded by {engine}" in run(weightmill, source, out, *f"quant={quant}".split())
        damage = read_report(Address.of(out)).damage
        assert damage is not None
        assert damage.engine == engine


# --- the command


@pytest.mark.quick
@pytest.mark.parametrize(
    "given",
    [
        ["model=demo", "quant=nf4"],
        ["model=demo", "quant=mlx_int4", "quant.bits=3", "output=packed", "unit_mb=20.0"],
        ["model=demo", "quant=gguf_q4_k_m", "output.split=true", "output.card=false", "source=gguf"],
        ["model=demo", "quant=nf4", "verify=logits", "verify.max_kl=0.1", "mtp=drop"],
        ["model=demo", "transform=block_expansion", "transform.num_blocks=3", "quant=none"],
        [
            "model=demo",
            "quant=hqq4",
            r"rules=[{action:'keep',name:'layers\.0\.'},{action:'cast',role:'norm',cast_to:'float16'}]",
        ],
        [
            "model=demo",
            "quant=auto",
            "quant.engine=mlx",
            "quant.target_bits=4.25",
            "quant.among=['mlx_int4','mlx_int8']",
        ],
    ],
)
def test_the_command_makes_the_same_request(given: list[str]) -> None:
    spec = compose("run", JobSpec, take_apart("run", JobSpec, given))
    command = shlex.split(command_of(spec.resolved(), str(DEMO)))
    assert command[:2] == ["weightmill", "run"]
    assert set(command[2:]) == set(given)
    assert compose("run", JobSpec, take_apart("run", JobSpec, command[2:])) == spec


@pytest.mark.quick
def test_the_command_shows_no_path_and_no_secret(tmp_path: Path) -> None:
    given = [f"model.path={tmp_path}", "transform=merge_lora", f"transform.path={tmp_path / 'a'}", "model.name=x"]
    spec = compose("run", JobSpec, take_apart("run", JobSpec, given))
    said = command_of(spec.resolved(), str(tmp_path))
    assert said == "weightmill run model.path=DIR model.name=x transform=merge_lora transform.path=ADAPTER quant=nf4"
    assert "model.path=hf://org/name@abc " in command_of(spec.resolved(), "hf://org/name@abc")
    assert "secret" not in command_of(spec.resolved(), "https://me:secret@host/m?sig=secret")
