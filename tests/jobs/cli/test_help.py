"""What `--help` says of a verb: its choices, its settings, examples."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.cli.compose import CONF, choices_of
from jobs.cli.main import VERBS

GROUPS = choices_of("run")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_worth_reading(verb: str, weightmill: Any) -> None:
    ran = weightmill(verb, "--help")
    assert ran.status == 0
    assert "usage: python -m jobs." in ran.out
    assert "examples:" in ran.out
    assert "exit status:" in ran.out


@pytest.mark.quick
def test_help_lists_every_choice_with_what_it_says_of_itself(weightmill: Any) -> None:
    said = weightmill("run", "--help").out
    for group, options in GROUPS.items():
        for option in options:
            first = [
                line for line in (CONF / group / f"{option}.yaml").read_text().splitlines() if line.startswith("# ")
            ]
            assert first[-1 if "@package" in first[0] else 0][2:] in said
