"""A source's own card: what of a stranger's metadata and text is taken over."""

from __future__ import annotations

import pytest

from jobs.output.card_block import BEGIN, END
from jobs.report.source_card import FRONT_LIMIT, parsed

pytestmark = pytest.mark.quick


def test_what_holds_for_the_output_is_taken_and_the_rest_left() -> None:
    card = parsed(
        b"---\nlicense: other\nlicense_name: llama3\nlanguage:\n- en\n- no\npipeline_tag: text-generation\n"
        b"datasets: [a/b]\nbase_model: org/base\nextra_gated_prompt: sign here\nmodel-index:\n- {name: x}\n---\n"
        b"# A\nB\n"
    )
    assert card.metadata == {
        "license": "other", "license_name": "llama3", "language": ["en", "no"], "datasets": ["a/b"],
        "pipeline_tag": "text-generation", "base_model": "org/base",
    }  # fmt: skip
    assert card.text == "# A\nB"
    assert card.note is None


def test_a_path_of_a_machine_is_no_base() -> None:
    assert parsed(b"---\nbase_model: /home/me/llama\nbase_model_relation: adapter\n---\n").metadata == {}
    assert parsed(b"---\nbase_model: [/home/me/llama, org/name]\n---\n").metadata == {"base_model": "org/name"}


@pytest.mark.parametrize(
    "front",
    [
        b"license: [unclosed",
        b"a: &a [x]\nb: *a",
        b"- a\n- list",
        b"only a text",
        b"? [a, b]\n: {c: d}",
        b"license: \x07",
        b"[" * 20000,
        b"a: " + b"x" * FRONT_LIMIT,
        b"\tlicense: mit",
    ],
    ids=["yaml", "alias", "list", "text", "key", "control", "deep", "long", "tab"],
)
def test_metadata_that_cannot_be_parsed_is_kept_as_text(front: bytes) -> None:
    raw = b"---\n" + front + b"\n---\n# A\n"
    card = parsed(raw)
    assert card.metadata == {}
    assert card.text == raw.decode().strip()
    assert card.note is not None
    assert "its metadata is kept as text" in card.note


def test_a_tag_makes_no_object() -> None:
    card = parsed(b"---\nlicense: !!python/object/apply:os.system [touch x]\nlanguage: !!timestamp en\n---\n")
    assert card.metadata == {"license": ["touch x"], "language": "en"}


def test_values_of_other_kinds_are_left_out() -> None:
    card = parsed(b"---\nlicense: {a: b}\nlanguage: null\ntags: [a, [b], {c: d}, '']\npipeline_tag:\n---\n")
    assert card.metadata == {"tags": ["a"]}


@pytest.mark.parametrize("raw", [b"", b"---", b"---\n", b"---\nlicense: mit\n", b"\xef\xbb\xbf# A"])
def test_a_card_without_whole_metadata_is_text(raw: bytes) -> None:
    card = parsed(raw)
    assert card.metadata == {}
    assert card.note is None
    assert card.text == raw.decode("utf-8-sig").strip()


def test_what_is_no_utf8_is_said_and_kept_as_far_as_it_goes() -> None:
    card = parsed(b"---\nlicense: mit\n---\n# caf\xe9\n")
    assert card.metadata == {"license": "mit"}
    assert card.text == "# caf�"
    assert card.note == "it is not UTF-8"


def test_windows_line_ends_are_read() -> None:
    card = parsed(b"---\r\nlicense: mit\r\n---\r\n# A\r\nB\r\n")
    assert (card.metadata, card.text, card.note) == ({"license": "mit"}, "# A\nB", None)


def test_an_earlier_block_of_ours_is_not_taken_for_the_sources_text() -> None:
    assert parsed(f"---\nlicense: mit\n---\n\n{BEGIN}\n# old\n{END}\n\n# A\n".encode()).text == "# A"
    assert parsed(f"{BEGIN}\n# no end".encode()).text == f"{BEGIN}\n# no end"
