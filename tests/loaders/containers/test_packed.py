"""Packed folders: what is right is read by name, and hostile manifests are refused before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.checkpoints.detect import WeightFormat, detect_weight_format
from loaders.containers import packed
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec
from loaders.loading.load import load_weights
from loaders.specs import StoredSpec, StoredTensor
from loaders.tensors.sources import tensors_of
from tests.making import LLAMA
from tests.reading import files_of

EXPERT = 1024 + 2 * 64  # one part of an expert: words of 4 bits, scales, biases


def write(folder: Path) -> Path:
    """A quantized matrix, a norm, and two layers of three experts, the format written out by hand."""
    folder.mkdir()
    entries = {
        "model.layers.0.mlp.gate.biases": {"offset": 0, "size": 8, "shape": [4, 1], "dtype": "BF16"},
        "model.layers.0.mlp.gate.scales": {"offset": 64, "size": 8, "shape": [4, 1], "dtype": "BF16"},
        "model.layers.0.mlp.gate.weight": {"offset": 128, "size": 256, "shape": [4, 16], "dtype": "U32", "bits": 8},
        "model.norm.weight": {"offset": 384, "size": 8, "shape": [2], "dtype": "F32"},
    }
    document = {"model": "m", "num_tensors": 4, "tensors": entries, "config": {}}
    (folder / "model_weights.json").write_text(json.dumps(document))
    (folder / "model_weights.bin").write_bytes(bytes(range(196)) * 2)
    components, at = [], 0
    for part in ("gate_proj", "up_proj", "down_proj"):
        for name, dtype, shape, size in (
            ("weight", "U32", [32, 8], 1024), ("scales", "BF16", [32, 1], 64), ("biases", "BF16", [32, 1], 64)
        ):  # fmt: skip
            components.append({"name": f"{part}.{name}", "offset": at, "size": size, "dtype": dtype, "shape": shape})
            at += size
    layout = {
        "expert_size": at, "num_layers": 3, "num_experts": 3, "components": components, "moe_layers": [0, 2],
    }  # fmt: skip
    (folder / "packed_experts").mkdir()
    (folder / "packed_experts" / "layout.json").write_text(json.dumps(layout))
    for layer in (0, 2):
        (folder / "packed_experts" / f"layer_{layer:02d}.bin").write_bytes(bytes(3 * at))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "model_type": "qwen3_moe"}))
    return folder


@pytest.mark.quick
def test_every_tensor_is_found_by_its_name(tmp_path: Path) -> None:
    found = packed.read(files_of(write(tmp_path / "m")))
    assert len(found.by_name) == 4 + 2 * 3 * 9
    norm = found["model.norm.weight"]
    assert (norm.dtype.name, norm.shape, norm.file, norm.offset) == ("F32", (2,), "model_weights.bin", 384)
    scales = found["model.layers.2.mlp.experts.1.up_proj.scales"]
    assert (scales.file, scales.offset) == ("packed_experts/layer_02.bin", 3 * EXPERT + EXPERT + 1024)
    assert found.bits["model.layers.0.mlp.gate.weight"] == 8


def test_a_checkpoint_is_recognized_and_its_bits_become_settings(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    assert checkpoint.container == "packed"
    assert [tag.name for tag in checkpoint.files] == [
        "model_weights.bin", "packed_experts/layer_00.bin", "packed_experts/layer_02.bin"
    ]  # fmt: skip
    assert checkpoint.aux == ("config.json",)
    tensors = {tensor.name: tensor for tensor in tensors_of(checkpoint, decode=True).tensors}
    assert len(tensors) == 2 + 2 * 9
    assert tensors["model.layers.0.mlp.gate.weight"].decode.bits == 8  # type: ignore[union-attr]
    expert = tensors["model.layers.0.mlp.experts.2.down_proj.weight"]
    assert (expert.shape, expert.decode.bits) == ((32, 64), 4)  # type: ignore[union-attr]


def test_names_and_config_may_come_from_the_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    edit(folder / "model_weights.json", lambda d: d.update(config={**LLAMA, "model_type": "mixtral"}))
    (folder / "config.json").unlink()
    names = {spec.name for spec in open_checkpoint(folder).weights}
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names


def test_four_bits_are_assumed_where_the_manifest_says_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")

    def four(document: Any) -> None:
        entry = document["tensors"]["model.layers.0.mlp.gate.weight"]
        del entry["bits"]
        entry.update(shape=[4, 8], size=128)

    edit(folder / "model_weights.json", four)
    tensors = {tensor.name: tensor for tensor in tensors_of(open_checkpoint(folder), decode=True).tensors}
    gate = tensors["model.layers.0.mlp.gate.weight"]
    assert (gate.shape, gate.decode.bits) == ((4, 64), 4)  # type: ignore[union-attr]


def test_a_pickle_of_that_name_is_still_pytorch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2)}, tmp_path / "model_weights.bin")
    assert open_checkpoint(tmp_path).container == "pytorch"
    with pytest.raises(BadCheckpoint, match=r"model_weights.json: missing"):
        open_checkpoint(tmp_path, "packed")


# --- hostile folders


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def entry(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "model_weights.json", lambda d: d["tensors"]["model.norm.weight"].update(changes))


def listed(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "model_weights.json", lambda d: d.update(changes))


def layout(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "packed_experts" / "layout.json", lambda d: d.update(changes))


def component(index: int = 0, **changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "packed_experts" / "layout.json", lambda d: d["components"][index].update(changes))


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda root: (root / file).write_text(content) and None


def twice(root: Path) -> None:
    raw = (root / "model_weights.json").read_text()
    (root / "model_weights.json").write_text(raw.replace("gate.biases", "gate.scales"))


def lost(name: str) -> Callable[[Path], None]:
    def damage(document: Any) -> None:
        del document["tensors"][name]
        document["num_tensors"] -= 1

    return lambda root: edit(root / "model_weights.json", damage)


def bits(count: Any) -> Callable[[Path], None]:
    def damage(document: Any) -> None:
        document["tensors"]["model.layers.0.mlp.gate.weight"]["bits"] = count

    return lambda root: edit(root / "model_weights.json", damage)


def clash(root: Path) -> None:
    def damage(document: Any) -> None:
        norm = document["tensors"].pop("model.norm.weight")
        document["tensors"]["model.layers.0.mlp.experts.0.up_proj.scales"] = norm

    edit(root / "model_weights.json", damage)


LAYOUT, LAYER = "packed_experts/layout.json", "packed_experts/layer_02.bin"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a span that leaves the file": (
        entry(offset=448), r"'model.norm.weight' spans bytes \[448, 456\) of the file's 392"
    ),
    "a huge offset": (entry(offset=64 << 80), "offset .* must be whole numbers from 0"),
    "a negative offset": (entry(offset=-64), "offset -64 .* must be whole numbers from 0"),
    "an offset with a point": (entry(offset=384.0), "offset 384.0 .* must be whole numbers"),
    "an offset of text": (entry(offset="384"), "must be whole numbers"),
    "an offset that is true": (entry(offset=True), "must be whole numbers"),
    "an offset that is not aligned": (entry(offset=380), "380, which is no multiple of 64"),
    "a size that is another": (entry(size=16), r"F32 \[2\] takes 8 bytes, it says 16"),
    "a shape that is another": (entry(shape=[2, 2]), r"F32 \[2, 2\] takes 16 bytes, it says 8"),
    "a shape beyond all files": (entry(shape=[1 << 40, 1 << 40]), "more numbers than any file"),
    "a negative shape": (entry(shape=[-1, -2]), "expected whole numbers from 0"),
    "a shape of text": (entry(shape="2"), "expected a list of whole numbers"),
    "an unknown dtype": (entry(dtype="U4"), "model.norm.weight': unknown dtype 'U4'"),
    "a dtype that is none": (entry(dtype=["F32"]), "lacks offset, size, shape or dtype|unknown dtype"),
    "a dtype of another container": (entry(dtype="Q8_0", shape=[32], size=34), "no dtype of this container"),
    "one on another": (
        entry(offset=320), "'model.norm.weight' begins at byte 320, within 'model.layers.0.mlp.gate.weight'"
    ),
    "a name twice": (twice, "'model.layers.0.mlp.gate.scales' appears twice"),
    "a name here and there": (clash, "is in model_weights.bin and in packed_experts/"),
    "an entry that is none": (listed(tensors={"a": 7}, num_tensors=1), "'a' lacks offset, size, shape or dtype"),
    "no entries": (listed(tensors=[]), "expected tensors, an object"),
    "a lying count": (listed(num_tensors=5), "num_tensors 5 and lists 4"),
    "bits that are none": (bits(7), "bits is 7, known are 2, 3, 4, 5, 6, 8"),
    "bits that do not fit": (bits(4), "4 bits .* do not fit words .*the manifest must say its bits"),
    "bits of another type": (bits([8]), r"bits is \[8\]"),
    "no scales": (lost("model.layers.0.mlp.gate.scales"), "its scales or biases are missing"),
    "no JSON": (text("model_weights.json", "{"), "model_weights.json: not JSON"),
    "another JSON": (text("model_weights.json", "[]"), "expected a JSON object, found list"),
    "a number without end": (text("model_weights.json", '{"tensors": ' + "9" * 9999 + "}"), "model_weights.json: "),
    "endless brackets": (text("model_weights.json", "[" * 200_000), "not JSON"),
    "no weights": (lambda root: (root / "model_weights.bin").unlink(), "model_weights.bin: missing"),
    "weights cut short": (text("model_weights.bin", "x"), "of the file's 1"),
    "no layout": (lambda root: (root / LAYOUT).unlink(), f"{LAYOUT}: missing, though there are layers"),
    "a layout that is no JSON": (text(LAYOUT, "nope"), f"{LAYOUT}: not JSON"),
    "a layer that is missing": (lambda root: (root / LAYER).unlink(), f"{LAYER}: missing"),
    "a layer cut short": (text(LAYER, "x"), f"{LAYER}: 1 bytes; .* says 3 experts of 3456"),
    "a path as a layer": (layout(moe_layers=["../../etc/passwd"]), "moe_layers .* must be different whole numbers"),
    "a layer twice": (layout(moe_layers=[0, 0]), "must be different whole numbers"),
    "a layer beyond the model": (layout(moe_layers=[0, 3]), "below num_layers"),
    "layers without end": (layout(num_layers=1 << 70, moe_layers=None), "moe_layers None"),
    "a path as a component": (component(name="../../weights"), "a component is called '../../weights'"),
    "a component without a name": (component(name=None), "a component is called None"),
    "a component twice": (component(3, name="gate_proj.weight"), "a component appears twice"),
    "a component that leaves its expert": (component(8, offset=3400), r"\[3400, 3464\) of an expert's 3456"),
    "a component on another": (
        component(1, offset=1000), "'gate_proj.scales' begins at byte 1000, within 'gate_proj.weight'"
    ),
    "a component of another size": (component(size=1020), "takes 1024 bytes, it says 1020"),
    "a negative expert": (layout(expert_size=-1), "expert_size is -1"),
    "no expert": (layout(num_experts=0), "num_experts is 0; expected a whole number from 1"),
    "more experts than there are": (layout(num_experts=4), "says 4 experts"),
    "experts without end": (layout(num_experts=1 << 40), "num_experts is 1099511627776, at most 65536"),
    "no components": (layout(components={}), "expected components, a list"),
    "an expert's bits that do not fit": (component(bits=8), "8 bits .* do not fit"),
}  # fmt: skip


OF_IT = ("", "model_weights.bin", "model_weights.json", "packed_experts/layer_02.bin", "packed_experts/layout.json")


@pytest.mark.parametrize("part", OF_IT)
def test_the_folder_and_each_of_its_files_load(part: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m") / part
    assert detect_weight_format(path) is WeightFormat.PACKED
    found, stats = load_weights(path)
    assert len(found) == 4 + 2 * 3 * 9
    assert stats.load.files == 3
    at = (bytes(range(196)) * 2)[384:392]
    assert found["model.norm.weight"].numpy().tobytes() == at
    decoded, _ = load_weights(path, dtype="float32", layer_filter="mlp.gate")
    assert decoded["model.layers.0.mlp.gate.weight"].shape == (4, 64)


def test_a_packed_file_whose_first_byte_is_that_of_a_pickle_is_packed(tmp_path: Path) -> None:
    path = write(tmp_path / "m") / "model_weights.bin"
    path.write_bytes(b"\x80" + path.read_bytes()[1:])
    assert detect_weight_format(path) is WeightFormat.PACKED


LIES = ("a span that leaves the file", "weights cut short", "a layer cut short", "no JSON", "bits that are none")


@pytest.mark.parametrize("part", OF_IT[:3])
@pytest.mark.parametrize("name", LIES)
def test_truncated_and_lying_ones_are_neither_detected_nor_loaded(name: str, part: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = write(tmp_path / "m")
    damage(folder)
    for call in (detect_weight_format, load_weights):
        with pytest.raises(BadCheckpoint, match=message):
            call(folder / part)


def test_a_file_without_its_manifest_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / "model_weights.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"says pytorch, but it begins with .* with model_weights.json beside it"):
        load_weights(folder / "model_weights.bin")
    (folder / "model_weights.bin").unlink()
    assert detect_weight_format(folder) is WeightFormat.UNKNOWN


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_hostile_folders_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = write(tmp_path / "m")
    damage(folder)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_hostile_folder_is_one_line_in_the_plan(tmp_path: Path, weightmill: Any) -> None:
    folder = write(tmp_path / "m")
    entry(offset=448)(folder)
    ran = weightmill("plan", f"model.path={folder}", "quant=none")
    assert ran.status == 1
    assert "spans bytes [448, 456) of the file's 392" in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


# --- writing


def test_tensors_begin_at_multiples_of_64_in_the_order_of_their_names() -> None:
    spec = StoredSpec(DTYPES["BF16"], (3,))
    file = packed.lay_out("model_weights.bin.00001", [StoredTensor(name, spec) for name in ("b", "a", "c")])
    assert [(slot.name, slot.offset) for slot in file.slots] == [("a", 0), ("b", 64), ("c", 128)]
    assert (file.size, packed.frame(file, packed.place(file, {}), lambda a, b: 0)) == (
        192,
        [(6, bytes(58)), (70, bytes(58)), (134, bytes(58))],
    )


def test_what_the_container_has_no_dtype_for_is_refused() -> None:
    with pytest.raises(BadSpec, match="a would be Q8_0, which packed cannot hold"):
        packed.lay_out("model_weights.bin.00001", [StoredTensor("a", StoredSpec(DTYPES["Q8_0"], (32,)))])


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    folder, rng = write(tmp_path / "m"), np.random.default_rng(0)
    for file in ("model_weights.json", LAYOUT):
        whole = (folder / file).read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            data[rng.integers(len(data))] = rng.integers(32, 127)
            (folder / file).write_bytes(data)
            try:
                checkpoint = open_checkpoint(folder)
            except BadCheckpoint:
                continue
            for spec in checkpoint.weights:
                assert spec.offset + spec.size <= (folder / spec.file).stat().st_size
        (folder / file).write_bytes(whole)
