"""What is said where torch, which this package needs, is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loaders.words import listed

INSTALL = "pip install 'weightmill[models]'"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from loaders.models import load_model_and_tokenizer", "loaders.models: load_model_and_tokenizer needs torch"),
        ("from loaders.backends.devices import torch_device; torch_device('cpu')", "backend=cpu needs torch"),
    ],
)
def test_it_says_what_to_install(code: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert last.endswith(INSTALL)


@pytest.mark.quick
def test_one_is_and_several_are() -> None:
    assert listed(["torch"], "is", "are") == "torch is"
    assert listed(["torch", "transformers"], "is", "are") == "torch, transformers are"
