"""What was not said is a sentence, whatever verb it was not said to."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.quick
@pytest.mark.parametrize("verb", ["run", "plan", "inspect", "recommend"])
@pytest.mark.parametrize("path", ["null", "''"])
def test_a_missing_checkpoint_is_named(verb: str, path: str, weightmill: Any) -> None:
    ran = weightmill(verb, f"model.path={path}")
    assert ran.status == 2
    assert "model.path: missing; give model.path=DIR" in ran.err or "model.path: expected a path" in ran.err


@pytest.mark.parametrize("quant", ["quant=auto", "quant=nf4,fp4"])
def test_so_it_is_where_several_jobs_or_schemes_wait_for_it(quant: str, weightmill: Any) -> None:
    more = ["quant.engine=mlx", "quant.target_bits=4"] if quant == "quant=auto" else ["-m"]
    ran = weightmill("run", "model.path=null", quant, *more)
    assert ran.status == 2
    assert "model.path: missing" in ran.err


def test_an_output_is_never_the_root_of_the_disk_by_mistake(weightmill: Any) -> None:
    ran = weightmill("run", "output.path=''")
    assert ran.status == 2
    assert "output.path: expected a path, found an empty one" in ran.err
