"""Where models lie: folders, and the Hub's cache without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loaders.errors import BadSpec
from loaders.models.hub_cache import folder_of
from loaders.places import DEMO

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, as `hf download` leaves it: blobs, links to them, and what `main` was."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--tiny-model"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    for file in sorted(DEMO.iterdir()):
        shutil.copyfile(file, model / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


@pytest.mark.quick
def test_a_name_is_looked_for_in_the_hubs_cache(hub: Path) -> None:
    assert folder_of("some/tiny-model") == hub


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_of_the_cache_loads_by_its_name(hub: Path) -> None:
    pytest.importorskip("transformers")
    from loaders.models import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer("some/tiny-model", "cpu")
    assert model.config.model_type == "llama"
    assert tokenizer("the")["input_ids"]


def test_a_folder_comes_before_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "tiny-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_of("some/tiny-model") == Path("some/tiny-model")


@pytest.mark.parametrize("name", ["some/other-model", "gpt2", "some/bad..name"])
def test_what_is_nowhere_says_how_to_fetch_it(hub: Path, name: str) -> None:
    with pytest.raises(
        BadSpec, match=rf"no model of that name in the local .* cache .*; fetch it: hf download {name}$"
    ):
        folder_of(name)


@pytest.mark.parametrize("path", ["./some/model", "/nowhere/at/all", "a/b/c"])
def test_what_can_only_be_a_path_is_one(hub: Path, path: str) -> None:
    assert folder_of(path) == Path(path)
