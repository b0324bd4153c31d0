"""From the command line to a checked request: every fault at once, with its place, and no traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import CONF, choices_of, compose, take_apart
from jobs.spec.job import JobSpec
from loaders.errors import BadSpec

GROUPS = choices_of("run")


NEEDS = {  # what a choice cannot be without
    "quant=auto": ("quant.engine=mlx", "quant.target_bits=4.25"),
    "transform=merge_lora": ("transform.path=adapter",),
}


def spec_of(*arguments: str) -> JobSpec:
    return compose("run", JobSpec, take_apart("run", JobSpec, arguments))


def problems_of(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(BadSpec) as caught:
        spec_of(*arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options if g != "experiment"]
)
def test_every_choice_makes_a_job(group: str, option: str) -> None:
    choice = f"{group}={option}"
    spec_of(choice, *NEEDS.get(choice, ()))


@pytest.mark.parametrize(("q", "quant"), list(enumerate(GROUPS["quant"])))
@pytest.mark.parametrize(("o", "output"), list(enumerate(GROUPS["output"])))
def test_choices_go_together(q: int, quant: str, o: int, output: str) -> None:
    """Every two of them: a quant meets every cluster with some output, and an output with some quant."""
    choice, cluster = f"quant={quant}", GROUPS["cluster"][(q + o) % len(GROUPS["cluster"])]
    made = spec_of(choice, f"output={output}", f"cluster={cluster}", *NEEDS.get(choice, ()))
    assert made.quant.name == quant


@pytest.mark.quick
def test_the_default_is_the_demo_model_to_nf4() -> None:
    spec = spec_of()
    assert spec.model_name == "demo"
    assert spec.output_address.path == Path.cwd() / "outputs" / "demo-nf4"
    assert (spec.source_address.path / "config.json").is_file()


def test_a_model_is_named_by_its_folder_or_its_preset(tmp_path: Path) -> None:
    assert spec_of(f"model.path={tmp_path}/my-model/").model_name == "my-model"
    assert spec_of("model=llama70b", f"model.path={tmp_path}/x").output_address.name == "llama70b-nf4"


@pytest.mark.quick
def test_paths_are_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = spec_of("model.path=../a b,c (1)", "output.path=out=1/'x'")
    assert spec.source_address.path == tmp_path.parent / "a b,c (1)"
    assert spec.output_address.path == tmp_path / "out=1" / "'x'"


@pytest.mark.quick
def test_all_faults_are_told_at_once_with_their_place() -> None:
    found = problems_of("quant=nf5", "qunat=fp4", "unit_mb=-1", "+x=1", "verify.allow_nonfinite=maybe", "loose")
    assert len(found) == 6
    text = "\n".join(found)
    assert "quant: unknown choice 'nf5'; did you mean 'nf4'?" in text
    assert "qunat: unknown key; did you mean 'quant'?" in text
    assert "unit_mb: expected more than 0; found -1" in text
    assert "x: unknown key" in text
    assert "verify.allow_nonfinite: expected true or false" in text
    assert "loose: expected key=value" in text


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("quant.blocksize=64", "did you mean 'quant.group_size'?"),
        ("quant.group_sice=64", "did you mean 'quant.group_size'?"),
        ("quant.group_size=48", "quant.group_size: expected one of 32, 64"),
        ("quant.group_size=64.0", "quant.group_size: expected a whole number; give quant.group_size=64"),
        ("quant.storage_dtype=int8", "quant.storage_dtype: expected one of uint8"),
        ("quant.double_quant=1", "quant.double_quant: expected true or false; give quant.double_quant=true"),
        ("rules=[{name: '['}]", "rules[0].action: missing"),
        ("rules=[{action: keep}]", "this would match everything"),
        ("rules=[{action: keep, name: '('}]", "rules[0].name: not a regular expression"),
        ("rules=[{action: cast, name: x}]", "cast_to is missing"),
        ("rules=[{action: keep, role: nrom}]", "rules[0].role: unknown role"),
        ("model.name=../x", "letters, digits"),
        ("model.path=xyz://bucket/x", "xyz:// is not read or written yet"),
        ("cluster.threads=0", "expected at least 1"),
        ("tracking.port=3", "tracking.port: unknown key"),
        ("quant.group_size=[", "quant.group_size"),
        ("~model", "model: missing"),
    ],
)
def test_a_fault_says_where_and_what(argument: str, said: str) -> None:
    assert said in "\n".join(problems_of(argument))


def test_known_keys_are_those_of_the_chosen_scheme() -> None:
    [problem] = problems_of("quant=ternary", "quant.group_size=64")
    assert problem.startswith("quant.group_size: unknown key; it belongs to quant=fp4|")
    assert problem.endswith("; known: name, linear_class")


@pytest.mark.quick
def test_a_quantization_has_no_other_preset_s_name() -> None:
    found = problems_of("quant=nf4", "quant.name=mlx_int4", "unit_mb=-1")
    assert len(found) == 2
    assert found[0].startswith("quant.name: mlx_int4 is the name of another preset than quant=nf4; quant=mlx_int4")
    assert spec_of("quant=nf4", "quant.name=nf4").quant.name == "nf4"
    assert spec_of("quant=nf4", "quant.name=mine").quant.name == "mine"


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        spec_of().model = None  # type: ignore[assignment, misc]


def test_errors_are_a_document_too(weightmill: Any) -> None:
    ran = weightmill("run", "quant=nf5", "format=json")
    assert ran.status == 2
    assert ran.document["exit_status"] == 2
    assert "nf5" in ran.document["problems"][0]


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path, weightmill: Any) -> None:
    own = tmp_path / "my own"
    (own / "quant").mkdir(parents=True)
    text = (CONF / "quant" / "nf4.yaml").read_text()
    (own / "quant" / "mine.yaml").write_text(text.replace("name: nf4", "name: mine").replace("size: 64", "size: 256"))
    ran = weightmill("plan", "quant=mine", f"--config-dir={own}", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"]["quant"] == "mine"
    assert "mine " in weightmill("help", "quant", f"--config-dir={own}").out
    swept = weightmill("run", "-m", "quant=mine,int8", "quant.group_size=64,128", f"--config-dir={own}")
    assert f"'--config-dir={own}' tracking=none quant=mine quant.group_size=64,128" in swept.err
    (own / "quant" / "nf4.yaml").write_text(text)
    assert "quant/nf4.yaml has the name of one of weightmill's" in weightmill("plan", f"--config-dir={own}").err
    wrong = weightmill("plan", f"--config-dir={tmp_path / 'none'}")
    assert wrong.status == 2
    assert "expected a folder with some of model, " in wrong.err


def test_rules_in_a_file_are_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="latin-1": read(path, encoding))
    (tmp_path / "rules.yaml").write_text("[{action: keep, name: schön}]", "utf-8")
    made = spec_of(f"rules={tmp_path / 'rules.yaml'}")
    assert made.rules[0].name == "schön"


def test_a_name_that_is_not_utf8_is_refused_in_a_line(weightmill: Any) -> None:
    ran = weightmill("plan", f"model.path={os.fsdecode(b'/a/m' + bytes([0xE9]))}", "quant=nf4")
    assert ran.status == 2
    assert ran.err == (
        "weightmill: this cannot be done: model.path=/a/m\\udce9: expected UTF-8, as all paths and values are;"
        " give the file or folder another name\n"
    )


def test_rules_may_lie_in_a_file_or_span_lines(source: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "# mine\n- {action: keep, name: 'layers\\.0\\.'}\n- {action: drop, role: norm}\n"
    (tmp_path / "mine.yaml").write_text(rules)
    planned = weightmill("plan", f"model.path={source}", f"rules={tmp_path / 'mine.yaml'}", "format=json").document
    actions = {row["name"]: row["action"] for row in planned["tensors"]}
    assert actions["model.layers.0.mlp.up_proj.weight"] == "keep"
    assert actions["model.norm.weight"] == "drop"
    lines = "rules=[\n  {action: keep,\n   name: 'layers\\.0\\.'}]"
    assert weightmill("plan", f"model.path={source}", lines).status == 0
    (tmp_path / "mine.yaml").write_text("action: keep")
    ran = weightmill("plan", f"model.path={source}", f"rules={tmp_path / 'mine.yaml'}")
    assert ran.status == 2
    assert "expected a list of rules" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quant=none", "rules=[{action: quantize, name: mlp}]"), "quant=none has no codes"),
        (("rules=[{action: cast, name: mlp}]",), "cast_to is missing"),
        (("quant=nf4", "quant.table=fp4"), "give quant=fp4"),
        (("tracking=mlflow", "tracking.uri=foo:bar"), "tracking.uri: expected a store"),
    ],
)
def test_a_wrong_request_is_refused_in_its_own_words(
    arguments: tuple[str, ...], said: str, source: Path, weightmill: Any
) -> None:
    ran = weightmill("run", f"model.path={source}", *arguments)
    assert ran.status == 2
    assert said in ran.err
