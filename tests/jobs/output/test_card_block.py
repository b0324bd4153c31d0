"""The marked blocks of a card: what is hashed and compared without them."""

from __future__ import annotations

import pytest

from jobs.output.card_block import BEGIN, END, card_digest, with_block, without_blocks

pytestmark = pytest.mark.quick

CARD = f"---\nlicense: mit\n# weightmill begin\n{{}}# weightmill end\n---\n\n{BEGIN}\n{{}}{END}\n\n# A\n{{}}"


def card(front: str = "", block: str = "", text: str = "") -> bytes:
    return CARD.format(front, block, text).encode()


def test_what_stands_in_the_blocks_does_not_count() -> None:
    assert card_digest(card("base_model: a/b\n", "# x in nf4\n")) == card_digest(card())
    assert card_digest(card(text="more")) != card_digest(card())
    assert card_digest(card().replace(b"mit", b"apache")) != card_digest(card())


def test_only_the_first_block_is_left_out() -> None:
    """A second one could hide what was changed."""
    assert card_digest(card(text=f"{BEGIN}\nhidden\n{END}")) != card_digest(card(text=f"{BEGIN}\n{END}"))


def test_a_card_without_blocks_is_hashed_as_it_is() -> None:
    for raw in (b"# A\n", b"", f"{BEGIN}\nno end".encode(), f"{END}\n{BEGIN}".encode(), b"---\n# weightmill begin\n"):
        assert without_blocks(raw) == raw


def test_marks_of_metadata_count_only_there() -> None:
    raw = b"# A\n# weightmill begin\nx\n# weightmill end\n"
    assert without_blocks(raw) == raw


def test_a_block_is_replaced() -> None:
    assert with_block(card("b: c\n", "old\n", "text"), "new") == card("b: c\n", "new\n", "text")
    assert with_block(b"# A\n", "new") == b"# A\n"
