"""What `--help` and `weightmill help` say: a screen for a verb, and a page for a group, a choice, a setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.choices import about, values_of
from jobs.cli.compose import CONF, choices_of, compose, files_of, take_apart
from jobs.cli.help import settings_of
from jobs.cli.main import VERBS, completions, main
from jobs.spec.job import JobSpec

GROUPS = choices_of("run")
SCREEN = 30  # lines


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_worth_reading(verb: str, weightmill: Any) -> None:
    ran = weightmill(verb, "--help")
    assert ran.status == 0
    assert f"usage: weightmill {verb} " in ran.out
    assert "examples:" in ran.out
    assert "exit status:" in ran.out
    assert "where to look:" in ran.out
    assert [line for line in ran.out.splitlines() if len(line) > 80] == []


@pytest.mark.quick
def test_the_help_of_run_is_a_screen_with_its_groups_by_name(weightmill: Any) -> None:
    said = weightmill("run", "--help").out
    assert len(said.splitlines()) <= SCREEN
    assert all(f" {group}=" in said for group in GROUPS)
    assert "weightmill help quant=nf4" in said


@pytest.mark.quick
def test_what_the_screen_says_to_look_at_is_there(weightmill: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        for words in re.findall(r"^  weightmill help (\S+(?: all)?) ", weightmill(verb, "--help").out, re.MULTILINE):
            assert main(["help", *words.split()]) == 0, words
            assert capsys.readouterr().out.strip()


@pytest.mark.quick
def test_help_lists_every_choice_with_what_it_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for group, files in files_of("run").items():
        assert main(["help", group]) == 0
        said = capsys.readouterr().out
        for option, path in files.items():
            assert f"    {option} " in said
            assert " ".join(about(path).split()) in " ".join(said.split())
    assert main(["help", "run", "all"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(option in said for options in GROUPS.values() for option in options)
    assert all(f" {name} " in said for name in settings_of(JobSpec))


@pytest.mark.quick
@pytest.mark.parametrize("group", GROUPS)
def test_the_page_of_a_choice_has_its_settings_with_defaults_and_meaning(
    group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, path in files_of("run")[group].items():
        assert main(["help", f"{group}={option}"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{group}={option}: {about(path)}")
        for name, value in values_of(path).items() if group != "experiment" else ():
            if name not in ("kind", "name") and not isinstance(value, list | dict):
                shown = value if isinstance(value, str) else json.dumps(value)
                assert f"  {group}.{name}={shown}" in said


def test_the_defaults_of_a_page_are_those_of_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    """What the page shows, typed, changes nothing."""
    for option in ("nf4", "hqq4", "mlx_int4", "w4a16"):
        assert main(["help", f"quant={option}"]) == 0
        shown = re.findall(r"^  (quant\.\S+=\S+)", capsys.readouterr().out, re.MULTILINE)
        made = [compose("run", JobSpec, take_apart("run", JobSpec, [f"quant={option}", *more])) for more in ([], shown)]
        assert shown
        assert made[0] == made[1]


@pytest.mark.quick
def test_a_setting_has_a_page_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        "quant.double_quant": "default: false",
        "output.overwrite": "default: false",
        "unit_mb": "default: 1000",
        "verify.tokens": "default: 8192",
        "rules": "each of rules: action",
        "clean": "usage: weightmill clean",
        "delete": "default: false",
    }
    for word, wanted in said.items():
        assert main(["help", word]) == 0, word
        assert wanted in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quant=NF4", "did you mean 'nf4'?"),
        ("quant=gptq", "read here and not written"),
        ("nf4", "weightmill help quant=nf4"),
        ("quantt", "did you mean 'quant'?"),
        ("group_sice", "did you mean 'quant.group_size'?"),
        ("zzzzz", "expected a verb (run, plan,"),
    ],
)
def test_a_near_miss_of_a_topic_says_what_it_is(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", word]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.quick
def test_choices_of_ones_own_have_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quant").mkdir()
    text = (CONF / "quant" / "nf4.yaml").read_text().replace("name: nf4", "name: mine").replace("size: 64", "size: 256")
    (tmp_path / "quant" / "mine.yaml").write_text(text)
    assert main(["help", "quant=mine", f"--config-dir={tmp_path}"]) == 0
    assert "quant.group_size=256" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("weightmill help qu", ["quant", "quant.absmean"]),
        ("weightmill help quant=nf", ["quant=nf4"]),
        ("weightmill help in", ["inspect"]),
        ("weightmill help inspect ten", ["tensors"]),
        ("weightmill run quant=ternary quant.", ["quant.linear_class="]),
        ("weightmill run quant.ta", ["quant.table="]),
        ("weightmill run quant=mlx_int8 quant.bits=", ["quant.bits=8"]),
        ("weightmill run quant=w4a16 quant.preset=w4a16_", ["quant.preset=w4a16_asym"]),
        ("weightmill run strategy=streaming strategy.mem", ["strategy.memory_budget_mb="]),
        ("weightmill run strategy.mem", []),
        ("weightmill hel", ["help"]),
    ],
)
def test_completion_offers_what_the_pages_have(line: str, wanted: list[str]) -> None:
    """After a choice, its own settings alone; a setting without words, its default."""
    found = completions(line)
    assert found[: len(wanted)] == wanted
    assert len(found) == len(wanted) or line.endswith("help qu")


def test_help_knows_every_listed_verb_and_what_others_call_a_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("completion", "help"):
        assert main(["help", verb]) == 0
        assert capsys.readouterr().out.startswith(f"{verb} ")
    for word in ("gptq", "awq"):
        assert main(["help", word]) == 2
        assert f"quant: unknown choice '{word}': " in capsys.readouterr().err
