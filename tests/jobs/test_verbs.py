"""inspect, diff and clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.making import Raw, llama_tensors, read_safetensors, values_of, write_checkpoint


def test_inspect_says_what_is_there(source: Path, weightmill: Any) -> None:
    document = weightmill("inspect", f"model.path={source}", "format=json").document
    assert document["family"] == "llama"
    assert document["parameters"] == sum(raw.data.size for raw in llama_tensors().values())
    assert {row["name"] for row in document["tensors"]} == set(llama_tensors())
    said = weightmill("inspect", f"model.path={source}").out
    assert "embedding" in said
    assert "3 file(s), 21 tensors" in said
    assert "model.layers.1.mlp.up_proj.weight" in weightmill("inspect", f"model.path={source}", "tensors=all").out


def test_inspect_knows_what_is_quantized(source: Path, tmp_path: Path, weightmill: Any) -> None:
    for quant, kind in (("nf4", "bnb4"), ("ternary", "ternary")):
        assert (
            weightmill("run", f"model.path={source}", f"output.path={tmp_path / quant}", f"quant={quant}").status == 0
        )
        document = weightmill("inspect", f"model.path={tmp_path / quant}", "format=json").document
        assert document["parameters"] == sum(raw.data.size for raw in llama_tensors().values())
        assert sum(row["stored_as"] == kind for row in document["tensors"]) == 14


def test_inspect_says_what_is_tied(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors(tied=True)
    root = write_checkpoint(tmp_path / "m", tensors)
    from tests.making import write_safetensors

    write_safetensors(root / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    document = weightmill("inspect", f"model.path={root}", "format=json").document
    assert document["tied"] == [{"kept": "model.embed_tokens.weight", "tied": "lm_head.weight"}]


@pytest.mark.parametrize("quant", ["nf4", "ternary"])
def test_diff_decodes_quantized_tensors(quant: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", f"quant={quant}", "format=json")
    recorded = {row["name"]: row for row in ran.document["tensors"]}
    document = weightmill("diff", source, out, "format=json").document
    assert (document["equal"], document["different"]) == (7, 14)
    assert document["only_in_a"] == document["only_in_b"] == []
    for row in document["tensors"]:
        if row["status"] == "different":
            # diff rounds decoded weights to the tensor's bfloat16, as the engine does
            assert row["relative_error"] == pytest.approx(recorded[row["name"]]["relative_error"], rel=2e-2)


def test_diff_names_what_differs_and_what_is_only_on_one_side(tmp_path: Path, weightmill: Any) -> None:
    one, other = llama_tensors(), llama_tensors()
    other["model.norm.weight"].data[3] += 1
    other["extra"] = other.pop("lm_head.weight")
    other["model.layers.0.mlp.up_proj.weight"] = Raw("BF16", other["model.layers.0.mlp.up_proj.weight"].data.T.copy())
    a, b = write_checkpoint(tmp_path / "a", one), write_checkpoint(tmp_path / "b", other)
    document = weightmill("diff", a, b, "format=json").document
    different = {row["name"]: row for row in document["tensors"] if row["status"] == "different"}
    assert set(different) == {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    step = values_of(other["model.norm.weight"])[3] - 1
    assert different["model.norm.weight"]["max_error"] == pytest.approx(step)
    assert different["model.layers.0.mlp.up_proj.weight"]["why"] == "shapes [128, 64] and [64, 128]"
    assert (document["only_in_a"], document["only_in_b"]) == (["lm_head.weight"], ["extra"])
    said = weightmill("diff", a, b).out
    assert "18 tensors equal, 2 different" in said
    assert "only in" in said


def test_diff_of_a_checkpoint_with_itself_is_equal(source: Path, weightmill: Any) -> None:
    assert "21 tensors equal, 0 different" in weightmill("diff", source, source).out


def test_diff_without_its_arguments_is_refused(source: Path, weightmill: Any) -> None:
    ran = weightmill("diff", source)
    assert ran.status == 2
    assert "b: missing; give b=..." in ran.err


def test_none_gives_back_an_equal_checkpoint(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=none").status == 0
    one, other = read_safetensors(source), read_safetensors(tmp_path / "out")
    assert {n: r.data.tobytes() for n, r in one.items()} == {n: r.data.tobytes() for n, r in other.items()}


def test_clean_lists_and_removes_what_no_process_holds(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from jobs.output.journal import Journal

    folder = tmp_path / "cwd" / "weightmill"
    held, left = Journal(folder / "held", "a" * 12), Journal(folder / "left", "b" * 12)
    with left.hold({}):
        pass
    with held.hold({}):
        found = weightmill("clean", "dry_run=true", "format=json").document["found"]
        assert [(Path(row["path"]), row["status"]) for row in found] == [
            (held.root, "in use"),
            (left.root, "abandoned"),
        ]
        found = weightmill("clean", "format=json").document["found"]
        assert [row["status"] for row in found] == ["in use", "removed"]
        assert held.root.exists()
        assert not left.root.exists()
    assert weightmill("clean").status == 0
    assert "nothing abandoned" in weightmill("clean").out
