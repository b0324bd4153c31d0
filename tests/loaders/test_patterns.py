"""Regular expressions of strangers: what Python's own engine finds, and an end for those that would take for ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.checkpoints.adapter_config import Patterns
from loaders.checkpoints.name_patterns import Named
from loaders.errors import BadCheckpoint
from loaders.limits import PATTERN, PATTERNS
from loaders.patterns import Allowance, compiled
from loaders.tensors.quantized_sources.auto_round import _Extra
from loaders.tensors.quantized_sources.awq_gptq import Dynamic
from loaders.tensors.quantized_sources.compressed_tensors import _Groups

pytestmark = pytest.mark.quick

NAME = "model.layers.10.mlp.experts.3.gate_proj"
TEXTS = ("", "a", "aab", "foo", NAME, "a{x}", "a{e}", "[", "]b", ":]", "{}", "na\u00efve", "x\ny", "\u212a", "\u0663")
WRITTEN = (
    r".*mlp\.(gate|up|gate_up|down)_proj.*", r"^(?!.*visual).*$", r"model\.layers\.(?:[0-9]|1[0-9])\..*", "[+*]+x",
    r"(?=(.+)proj)", r"a{,3}b", r"a{,}b", "a{x}", "a{e<=1}", "[[:alpha:]]+", r"[\[a]+", "[]a]+", "[^]a]+b", r"\Aa\Z",
    ".*y$", "{}+", r"(a)\1+b", "(?i)FOO+", "(?i)k+", r"\d+", r"\w+$", "x{1001}", "(?x) a b+", r"[a&&b]+",
    "y?$", r"[a||b~~c]+", r"(?:a|ab)(?:c|b)+", "(a)(b)?(?(2)x|y)+", r"\x61+", r"\u0061+", r"[\b]+", r"\101+",
)  # fmt: skip


@pytest.mark.parametrize("pattern", WRITTEN)
@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.filterwarnings("ignore:Possible set")
def test_a_pattern_finds_what_python_s_engine_finds(pattern: str) -> None:
    found = compiled(pattern, "here")
    for text in TEXTS:
        for how in ("match", "search", "fullmatch"):
            assert getattr(found, how)(text) == (getattr(re, how)(pattern, text) is not None), (text, how)


@given(pattern=st.text("ab.*+?|()[]{}^$\\d,1:-", max_size=9), text=st.text("ab1-:{}[]", max_size=5))
@pytest.mark.filterwarnings("ignore:Possible")
def test_any_pattern_finds_what_python_s_engine_finds(pattern: str, text: str) -> None:
    try:
        wanted = re.search(pattern, text) is not None
    except re.error:
        with pytest.raises(BadCheckpoint, match="is no regular expression"):
            compiled(pattern, "here")
        return
    assert compiled(pattern, "here").search(text) == wanted


@pytest.mark.parametrize(
    "pattern", [r"(.+)+\!$", "(a|aa)*b", "(?:.*)*b", "((ab)*c)+", ".*.*.*.*.*.*b!", r"(\w+|\.)+!$"]
)
def test_patterns_that_python_never_ends_are_matched(pattern: str) -> None:
    assert not compiled(pattern, "here").search("a" * 5000)


@pytest.mark.parametrize("pattern", [r"(?:(?:a|aa)+)+(?<!b)!", r"(?:(?:a|aa|aaa)+)+(?<!x)!"])
def test_what_no_engine_ends_is_given_up(pattern: str) -> None:
    with pytest.raises(BadCheckpoint, match=r"here: the pattern .* takes too long to match; write it more simply"):
        compiled(pattern, "here").search("a" * 5000)


def test_the_patterns_of_a_list_share_what_slow_engines_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many names takes a moment alone."""
    monkeypatch.setattr("loaders.patterns.LIST_SECONDS", 0.05)
    allowance = Allowance()
    one, other = (compiled(rf"(?>.*?{word})(?<!b)!", "here", allowance) for word in ("layers", "mlp"))
    with pytest.raises(BadCheckpoint, match="takes too long to match"):
        any(one.match(f"model.layers.{number}.mlp") for number in range(1_000_000))
    with pytest.raises(BadCheckpoint, match="takes too long to match"):
        other.match("model.layers.0.mlp")
    assert not compiled(one.pattern, "there").match("model.layers.0.mlp")  # another document's


def test_the_patterns_of_a_list_meet_so_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.patterns.PATTERN_TRIES", 1000)
    settings = {"dynamic": {f"-:model.*{number}": {} for number in range(11)}}
    dynamic = Dynamic(settings)
    with pytest.raises(BadCheckpoint, match=r"GPTQ's dynamic settings: its patterns .* more than 1,000; write fewer"):
        [dynamic.settings_of(f"layers.{number}") for number in range(100)]


def test_a_long_pattern_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match=f"at most {PATTERN}"):
        compiled("a" * (PATTERN + 1), "here")


@pytest.mark.parametrize("pattern", ["(", "a**", r"\p{L}", "(?P>x)", "(?u)(?i)(", "(" * 5000])
def test_what_python_does_not_take_is_refused(pattern: str) -> None:
    with pytest.raises(BadCheckpoint, match="here: .* is no regular expression"):
        compiled(pattern, "here")


TOO_MANY: dict[str, Any] = {f"(a|b)*{number}.*": {} for number in range(PATTERNS + 1)}
LISTS: dict[str, Callable[[], object]] = {
    "names": lambda: Named([f"re:{each}" for each in TOO_MANY], "a list"),
    "globs": lambda: Named([f"a*{each}" for each in TOO_MANY], "a list"),
    "GPTQ": lambda: Dynamic({"dynamic": TOO_MANY}),
    "AutoRound": lambda: _Extra({"extra_config": {each: {"bits": 4} for each in TOO_MANY}}, {}),
    "compressed-tensors": lambda: _Groups({"config_groups": {"a": {"targets": [f"re:{each}" for each in TOO_MANY]}}}),
    "peft": lambda: Patterns("rank_pattern", dict.fromkeys(TOO_MANY, 1)),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_too_many_patterns_is_refused(kind: str) -> None:
    """Each would meet every name; the ways by which a config lists them are those of the tools that write it."""
    with pytest.raises(BadCheckpoint, match=f"{PATTERNS + 1} patterns, at most {PATTERNS} are read"):
        LISTS[kind]()


def test_lists_of_plain_names_may_be_longer() -> None:
    assert "a.7" in Named([f"a.{number}" for number in range(PATTERNS + 1)], "a list")
