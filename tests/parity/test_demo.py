"""The demo model as a user runs it: transformers loads both, the original predicts text, NF4 hardly worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.places import DEMO

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.engine

UNIGRAM = 404.8  # perplexity of the training text's token frequencies: see the model's card
# in the manner of the text that it was trained on, and not part of it
TEXT = """\
If the file does not exist, an exception is raised and the method returns without changing the object.
The value returned by this function is a list of strings, one for each of the arguments passed to the constructor.
When the optional argument is given, it must be a callable object that takes a single parameter.
This module defines a class that can be used to read the contents of a directory and to write them to a file.
"""


def perplexity(folder: Path) -> float:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss.item())


def test_nf4_of_the_demo_model_predicts_text_as_the_original_does(
    weightmill: Callable[..., Any], tmp_path: Path
) -> None:
    assert weightmill("run", f"output.path={tmp_path / 'out'}").status == 0
    before, after = perplexity(DEMO), perplexity(tmp_path / "out")
    assert before < UNIGRAM / 8
    assert after < before * 1.2
