"""Whole jobs from and to the Hub, against the test-suite's own."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from jobs.output.leftovers import find_leftovers
from loaders.storage import open_store
from loaders.storage.address import Address
from tests.failing import fail_at
from tests.hub.server import Fault, Hub
from tests.jobs.test_over_stores import PRESETS, comparable, given
from tests.making import make_source, snapshot

REPO = "org/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_source_on_the_hub_is_as_a_folder(
    preset: str, model: Path, tmp_path: Path, hub: Hub, weightmill: Any
) -> None:
    files = snapshot(model)
    commit = hub.put(REPO, files)
    assert weightmill("run", *given(model, tmp_path / "here", preset)).status == 0
    ran = weightmill("run", *given(f"hf://{REPO}", tmp_path / "from", preset))
    assert ran.status == 0, ran.err
    made = snapshot(tmp_path / "from")
    assert comparable(made) == comparable(snapshot(tmp_path / "here"))
    assert json.loads(made["weightmill.json"])["source"]["path"] == f"hf://{REPO}@{commit}"
    assert weightmill("verify", f"output.path={tmp_path / 'from'}").status == 0


def test_a_name_of_the_hub_stands_for_its_address(model: Path, hub: Hub, weightmill: Any) -> None:
    commit = hub.put("Org/Model-1.5", snapshot(model))
    ran = weightmill("inspect", "model.path=Org/Model-1.5", "format=json")
    assert ran.document["path"] == f"hf://Org/Model-1.5@{commit}"
    assert "Org/Model-1.5 is no folder here: it is read from the Hub, as hf://Org/Model-1.5" in ran.err
    Path("Org/Model-1.5").mkdir(parents=True)
    ran = weightmill("inspect", "model.path=Org/Model-1.5")
    assert ran.status == 2
    assert "model.path: expected safetensors" in ran.err


@pytest.mark.parametrize(
    ("page", "meant"),
    [
        ("https://huggingface.co/Org/Model-1.5", "hf://Org/Model-1.5"),
        ("https://hf.co/Org/Model-1.5/tree/v2/", "hf://Org/Model-1.5@v2"),
    ],
)
def test_a_page_for_browsers_is_no_source(page: str, meant: str, weightmill: Any) -> None:
    ran = weightmill("inspect", f"model.path={page}")
    assert ran.status == 2
    assert f"model.path: {page}: that is a page for browsers; the repository is {meant}\n" in ran.err


def test_a_revision_is_not_ignored_beside_a_path(weightmill: Any) -> None:
    ran = weightmill("plan", "model.path=hf://Org/Model-1.5", "model.revision=v2", "quant=nf4")
    assert ran.status == 2
    assert "give path=hf://OWNER/NAME@REVISION" in ran.err


def test_a_slip_of_a_folders_name_is_not_taken_for_the_hubs(hub: Hub, weightmill: Any) -> None:
    Path("models/llama-8b").mkdir(parents=True)
    for given_name in ("models/llama-8", "model/llama-8b"):
        ran = weightmill("inspect", f"model.path={given_name}")
        assert ran.status == 2
        assert f"is it models/llama-8b? the Hub's repository of that name is hf://{given_name}" in ran.err
    ran = weightmill("inspect", "model.path=models/other")
    assert "there is no such folder here, though there is models/;" in ran.err
    assert "the Hub's repository of that name is hf://models/other" in ran.err
    assert hub.asked == []


def test_presets_are_read_from_the_hub(model: Path, hub: Hub, weightmill: Any) -> None:
    hub.put("Qwen/Qwen3-8B", snapshot(model))
    ran = weightmill("run", "model=qwen3_8b", "quant=nf4", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"].endswith("/outputs/qwen3_8b-nf4")
    before = hub.get("Qwen/Qwen3-8B").branches["main"]
    hub.put("Qwen/Qwen3-8B", {"config.json": b"{}"})
    assert weightmill("verify", "output.path=outputs/qwen3_8b-nf4").status == 0  # of that commit
    ran = weightmill("run", f"model.revision={before}", "model=qwen3_8b", "quant=fp4", "format=json")
    assert ran.document["source"]["path"] == f"hf://Qwen/Qwen3-8B@{before}"


def test_outputs_are_named_by_the_model_not_by_its_commit(model: Path, hub: Hub, weightmill: Any) -> None:
    commit = hub.put(REPO, snapshot(model))
    ran = weightmill("run", f"model.path=hf://{REPO}@{commit}", "quant=nf4", "format=json")
    assert ran.document["output"].endswith("/outputs/model-nf4")


# --- to the Hub


def published(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.get(name)
    files = {path: repository.objects[file.sha256] for path, file in repository.files(branch).items()}
    del files[".gitattributes"]
    return files


@pytest.mark.parametrize("preset", PRESETS)
def test_an_output_on_the_hub_is_one_commit(
    preset: str, model: Path, tmp_path: Path, mine: Hub, weightmill: Any
) -> None:
    assert weightmill("run", *given(model, tmp_path / "here", preset)).status == 0
    mine.put(REPO, snapshot(model))
    ran = weightmill("run", *given(f"hf://{REPO}", "hf://me/model-4bit", preset))
    assert ran.status == 0, ran.err
    assert comparable(published(mine, "me/model-4bit")) == comparable(snapshot(tmp_path / "here"))
    assert len(mine.get("me/model-4bit").commits) == 2
    assert set(mine.uploaded.values()) == {1}
    assert weightmill("verify", "output.path=hf://me/model-4bit").status == 0
    assert list((tmp_path / "cache" / "journals").iterdir()) == []


def test_an_interrupted_push_goes_on_and_uploads_nothing_twice(
    model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *given(model, "hf://me/out", "none"), "cluster.units_at_once=1")
    assert sum(mine.uploaded.values()) == 3
    assert open_store("hf://me/out").absence() == "nothing there"
    [left] = find_leftovers(Address.of("hf://me/out"), "out")
    assert left.units_done == 3
    # A kill between an upload and its record: the unit is done again, and the Hub has the bytes.
    records = sorted((left.address.path / "records").iterdir())
    records[-1].unlink()
    again = weightmill("run", *given(model, "hf://me/out", "none"), "format=json").document
    assert again["run"]["units_resumed"] == 2
    assert set(mine.uploaded.values()) == {1}
    assert len(mine.get("me/out").commits) == 2
    assert find_leftovers(Address.of("hf://me/out"), "out") == ()


def test_what_the_hub_has_collected_is_made_again(
    model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *given(model, "hf://me/out"), "cluster.units_at_once=1")
    gone = next(iter(mine.uploaded))
    del mine.get("me/out").objects[gone]
    again = weightmill("run", *given(model, "hf://me/out"), "format=json").document
    assert again["run"]["units_resumed"] == 2
    assert mine.uploaded[gone] == 2
    assert weightmill("verify", "output.path=hf://me/out").status == 0


@pytest.mark.parametrize("when", ["complete", "publish"])
def test_interrupted_at_the_end(
    when: str, model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"jobs.orchestration.job.{when}", stop)
        assert weightmill("run", *given(model, "hf://me/out")).status == 130
    again = weightmill("run", *given(model, "hf://me/out"), "format=json").document
    assert again["run"]["units_resumed"] == again["run"]["units"]
    assert set(mine.uploaded.values()) == {1}


def test_a_commit_whose_answer_was_lost_is_found(model: Path, mine: Hub, weightmill: Any) -> None:
    mine.faults.append(Fault("/commit/", cut_at=0))
    ran = weightmill("run", *given(model, "hf://me/out"))
    assert ran.status == 0, ran.err
    assert len(mine.get("me/out").commits) == 2


def test_a_commit_of_somebody_else_in_between_is_an_error(model: Path, mine: Hub, weightmill: Any) -> None:
    mine.create("me/out")
    mine.faults.append(Fault("/commit/", before=lambda: mine.put("me/out", {".gitignore": b"x"})))
    ran = weightmill("run", *given(model, "hf://me/out"))
    assert ran.status == 1
    assert "somebody else committed to it while the job ran; run the same command again" in ran.err
    assert open_store("hf://me/out").absence() == "nothing there"
    assert weightmill("run", *given(model, "hf://me/out")).status == 0
    assert set(mine.uploaded.values()) == {1}


def test_an_output_that_came_into_being_is_not_replaced(model: Path, mine: Hub, weightmill: Any) -> None:
    mine.create("me/out")
    mine.faults.append(Fault("/commit/", before=lambda: mine.put("me/out", {"config.json": b"theirs"})))
    ran = weightmill("run", *given(model, "hf://me/out"))
    assert ran.status == 2
    assert "hf://me/out came into being while the job ran; output.overwrite=true replaces it" in ran.err


def test_an_output_is_replaced_only_when_asked_and_wholly(model: Path, mine: Hub, weightmill: Any) -> None:
    assert weightmill("run", *given(model, "hf://me/out")).status == 0
    ran = weightmill("run", *given(model, "hf://me/out"), "quant=gguf_q8_0")
    assert ran.status == 2
    assert "exists, made by another request: quant was nf4, now gguf_q8_0; output.overwrite=true replaces" in ran.err
    ran = weightmill("run", *given(model, "hf://me/out"), "quant=gguf_q8_0", "output.overwrite=true")
    assert ran.status == 0, ran.err
    assert not any(name.endswith(".safetensors") for name in published(mine, "me/out"))
    assert weightmill("verify", "output.path=hf://me/out").status == 0
    mine.put("me/out", {"notes.txt": b"mine"})
    ran = weightmill("run", *given(model, "hf://me/out"), "output.overwrite=true")
    assert ran.status == 2
    assert "notes.txt" in ran.err


def test_branches_privacy_and_messages(model: Path, mine: Hub, weightmill: Any) -> None:
    assert weightmill("run", *given(model, "hf://me/out"), "output.private=true").status == 0
    assert mine.get("me/out").is_private
    settings = ("output.branch=int4/mlx", "output.commit_message=four bits")
    ran = weightmill("run", *given(model, "hf://me/out", "mlx_int4"), *settings)
    assert ran.status == 0, ran.err
    repository = mine.get("me/out")
    assert repository.messages[repository.branches["int4/mlx"]] == "four bits"
    assert repository.messages[repository.branches["main"]] == "nf4 of model, by weightmill"
    assert set(published(mine, "me/out", "int4/mlx")) != set(published(mine, "me/out"))
    assert weightmill("verify", "output.path=hf://me/out@int4%2Fmlx").status == 0
    assert weightmill("verify", "output.path=hf://me/out").status == 0
    mine.create("me/public")
    ran = weightmill("run", *given(model, "hf://me/public"), "output.private=true")
    assert ran.status == 2
    assert "the repository is public" in ran.err


@pytest.mark.parametrize("setting", ["private=true", "branch=x", "commit_message=x", "journal=x"])
def test_what_is_for_the_hub_is_refused_elsewhere(setting: str, model: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", *given(model, tmp_path / "out"), f"output.{setting}")
    assert ran.status == 2
    assert "it is for outputs on the Hub, such as output.path=hf://OWNER/NAME" in ran.err


def test_who_may_not_write_hears_it_before_any_work(
    model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.create("other/out")
    ran = weightmill("run", *given(model, "hf://other/out"))
    assert ran.status == 1
    assert "the Hub forbids it to this account" in ran.err
    ran = weightmill("run", *given(model, "hf://other/new"))
    assert ran.status == 1
    assert "the Hub forbids it to this account" in ran.err
    monkeypatch.delenv("HF_TOKEN")
    ran = weightmill("run", *given(model, "hf://me/out"))
    assert ran.status == 2
    assert "writing to the Hub needs a token with write permission: log in" in ran.err
    assert mine.uploaded == {}


def test_large_files_are_uploaded_in_parts(model: Path, mine: Hub, weightmill: Any) -> None:
    mine.part = 6000
    planned = weightmill("plan", *given(model, "hf://me/out", "gguf_q8_0"))
    assert "pieces: the Hub joins no parts: they are kept in" in planned.out
    ran = weightmill("run", *given(model, "hf://me/out", "gguf_q8_0"))
    assert ran.status == 0, ran.err
    assert weightmill("verify", "output.path=hf://me/out").status == 0


def test_a_journal_elsewhere_lets_other_machines_go_on(
    model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch, place_of: Any, tmp_path: Path
) -> None:
    journal = place_of("shelf").address / "journals"
    settings = (*given(model, "hf://me/out", "gguf_q8_0"), f"output.journal={journal}")
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(ValueError, match="a bug"):
            weightmill("run", *settings, "cluster.units_at_once=1")
    assert not (tmp_path / "cache").exists()
    again = weightmill("run", *settings, "format=json").document
    assert again["run"]["units_resumed"] == 2
    assert weightmill("verify", "output.path=hf://me/out").status == 0


def test_journals_of_outputs_on_the_hub_are_seen_and_cleaned(
    model: Path, mine: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", stop)
        for name in ("one", "two"):
            assert weightmill("run", *given(model, f"hf://me/{name}")).status == 130
    ran = weightmill("status", "hf://me/one", "format=json")
    assert (ran.status, ran.document["state"], ran.document["output"]) == (1, "stopped", "hf://me/one")
    rows = weightmill("list", "hf://me", "format=json").document["outputs"]
    assert [(row["output"], row["state"]) for row in rows] == [("hf://me/one", "stopped"), ("hf://me/two", "stopped")]
    assert weightmill("status", "hf://me/three").status == 2
    Path("here").mkdir()
    listed = weightmill("clean", "output.root=here", "format=json").document["found"]
    assert [row["status"] for row in listed] == ["abandoned", "abandoned"]
    found = weightmill("clean", "output.path=hf://me/one", "delete=true", "format=json").document["found"]
    assert [row["status"] for row in found] == ["removed"]
    assert weightmill("clean", "output.root=hf://you", "format=json").document["found"] == []
    assert len(weightmill("clean", "output.root=hf://me", "delete=true", "format=json").document["found"]) == 1
    assert weightmill("clean", "output.root=here", "format=json").document["found"] == []


def test_every_verb_reads_the_hub(model: Path, mine: Hub, weightmill: Any, tmp_path: Path) -> None:
    commit = mine.put(REPO, snapshot(model))
    source = f"hf://{REPO}"
    ran = weightmill("run", "-m", f"model.path={source}", "output.root=hf://me", "quant=nf4,mlx_int4", "format=json")
    assert ran.status == 0, ran.err
    assert [job["output"] for job in ran.document["jobs"]] == ["hf://me/model-nf4", "hf://me/model-mlx_int4"]
    again = weightmill("run", "-m", f"model.path={source}", "output.root=hf://me", "quant=nf4,mlx_int4")
    assert "2 of them done before" in again.err
    assert weightmill("plan", f"model.path={source}", "output.path=hf://me/new", "quant=hqq4").status == 0
    assert not mine.exists("me/new")
    assert weightmill("inspect", f"model.path={source}", "format=json").document["path"] == f"{source}@{commit}"
    assert weightmill("lint", "output.path=me/model-nf4").status == 0
    assert weightmill("verify", "output.path=me/model-nf4").status == 0
    assert weightmill("recommend", f"model.path={source}").status == 0
    found = weightmill("diff", f"a={source}", "b=me/model-nf4", "format=json").document
    assert found["different"] > 0
    assert found["only_in_a"] == found["only_in_b"] == []
    compared = weightmill("compare", "runs=[hf://me/model-nf4,hf://me/model-mlx_int4]", f"output.root={tmp_path / 'o'}")
    assert compared.status == 0, compared.err
    assert "model-mlx_int4" in compared.out


def test_one_file_of_a_repository_is_a_source(model: Path, mine: Hub, weightmill: Any, tmp_path: Path) -> None:
    for preset in ("gguf_q8_0", "gguf_bf16"):
        assert (
            weightmill("run", f"model.path={model}", f"quant={preset}", f"output.path={tmp_path / preset}").status == 0
        )
    files = {path.name: path.read_bytes() for path in tmp_path.glob("gguf_*/*.gguf")}
    mine.put("org/model-GGUF", files)
    ran = weightmill("run", "model.path=org/model-GGUF", "quant=mlx_int4")
    assert ran.status == 2
    assert all(name in ran.err for name in files)
    name = next(name for name in files if "Q8_0" in name)
    ran = weightmill("run", f"model.path=hf://org/model-GGUF/{name}", "quant=mlx_int4", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"].endswith(f"/outputs/{name.removesuffix('.gguf')}-mlx_int4")
    assert weightmill("verify", f"output.path={ran.document['output']}").status == 0


def test_no_secret_is_in_what_is_left(
    model: Path, mine: Hub, weightmill: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine.tokens["hf_SECRET"] = "me"
    mine.put("me/private", snapshot(model))
    mine.get("me/private").is_private = True
    mine.faults += [Fault("/lfs/me/", status=503), Fault("/objects/", status=503)]  # retries are warned of
    ran = weightmill("run", *given("hf://me/private", "hf://me/out", "none"), "tracking=mlflow")
    assert ran.status == 0, ran.err
    texts = [ran.out.encode(), ran.err.encode(), caplog.text.encode(), *published(mine, "me/out").values()]
    texts += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (b"hf_mine", b"X-Signature", b"sig0000", b"signed=1"):
        assert not any(secret in text for text in texts)


def test_without_a_network_the_cache_is_enough(
    model: Path, hub: Hub, weightmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    hub.put(REPO, snapshot(model))
    huggingface_hub.snapshot_download(REPO, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    ran = weightmill("run", *given(f"hf://{REPO}", tmp_path / "out"), "strategy=lazy")
    assert ran.status == 0, ran.err
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0
    assert len(hub.asked) == asked


def test_what_the_cache_has_is_read_where_the_hub_is_out_of_reach(
    model: Path, hub: Hub, weightmill: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    import loaders
    from loaders.storage.hub import client

    commit = hub.put(REPO, snapshot(model))
    folder = Path(huggingface_hub.snapshot_download(REPO, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE))
    with socket.socket() as closed:  # a port at which nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(client, "REACH_S", 0.0)
        ran = weightmill("run", REPO, "quant=nf4", "format=json")
        assert ran.status == 0, ran.err
        assert ran.document["source"]["path"] == f"hf://{REPO}@{commit}"
        assert Path(ran.document["output"]).name == "model-nf4"
        assert weightmill("run", REPO, "quant=nf4", "format=json").document["already"] is True
        assert "is out of reach; what its cache has is read" in caplog.text
        for where in (REPO, f"hf://{REPO}@{commit}", folder):
            found, _ = loaders.load_weights(where)
            assert found.keys() == loaders.load_weights(model)[0].keys()
        monkeypatch.setattr("loaders.storage.patience.UNREACHED_S", 0.0)
        assert "no connection to the Hub" in weightmill("plan", "org/missing").err
    ran = weightmill("plan", folder, "quant=fp4", "format=json")
    assert Path(ran.document["output"]["path"]).name == "model-fp4"


def test_the_library_reads_the_hub(model: Path, hub: Hub) -> None:
    import loaders

    hub.put(REPO, snapshot(model))
    wanted, _ = loaders.load_weights(model)
    for where in (REPO, f"hf://{REPO}", f"hf://{REPO}@main"):
        found, _ = loaders.load_weights(where)
        assert found.keys() == wanted.keys()
        assert all(bool((found[name] == wanted[name]).all()) for name in wanted)
    with pytest.raises(loaders.BadSpec, match="no such repository, or a private one"):
        loaders.load_weights("org/missing")
