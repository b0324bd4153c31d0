"""Jobs that write HQQ and PyTorch files: what the plan refuses and says, files to the byte, damage that is found."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.planning.build import make_plan
from jobs.planning.targets import Target
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.quantization.schemes.hqq import Hqq
from tests.making import llama_tensors, read_safetensors, weights, write_checkpoint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("quant=hqq4",), r"5 groups of 64 are no multiple of 2, and a byte holds the 4-bit codes of 2 groups"),
        (("quant=hqq2", "quant.group_size=32"), "10 groups of 32 are no multiple of 4"),
        (("quant=hqq8", "quant.group_size=200"), "its 320 weights do not divide into groups of 200"),
        (("quant=hqq8", "quant.group_size=12"), "quant.group_size"),
        (("quant=hqq8", "output.container=safetensors"), "safetensors is not read there; layout hqq takes pytorch"),
        (("quant=nf4", "output=hqq"), "hqq holds what hqq quantizes, not bnb4"),
    ],
)
def test_what_hqq_cannot_hold_is_refused_in_the_plan(
    settings: tuple[str, ...], said: str, tmp_path: Path, weightmill: Any
) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"] = weights(np.ones((5, 64), np.float32), "BF16")
    source = write_checkpoint(tmp_path / "source", tensors)
    ran = weightmill("plan", f"model.path={source}", f"output.path={tmp_path / 'out'}", *settings)
    assert ran.status == 2
    assert re.search(said, ran.err), ran.err


def test_hqqs_one_file_is_planned_to_the_byte(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill(
        "run",
        f"model.path={source}",
        f"output.path={tmp_path / 'out'}",
        "quant=hqq4",
        "unit_mb=0.05",
        "format=json",
    )
    assert ran.status == 0, ran.err
    [file] = ran.document["files"]
    assert len(file["pieces"]) > 3  # units are those of any other target
    assert file["name"] == "qmodel.pt"
    [planned] = make_plan(open_checkpoint(source), [Target(id="x", scheme=Hqq())], 0.05).targets["x"].finals
    assert planned.size == file["bytes"] == (tmp_path / "out" / "qmodel.pt").stat().st_size
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0


def test_the_units_do_not_change_hqqs_one_file(source: Path, tmp_path: Path, weightmill: Any) -> None:
    torch = pytest.importorskip("torch")
    found = []
    for unit_mb in (0.02, 1000):
        out = tmp_path / f"out{unit_mb}"
        ran = weightmill("run", f"model.path={source}", f"output.path={out}", "quant=hqq4", f"unit_mb={unit_mb}")
        assert ran.status == 0, ran.err
        with zipfile.ZipFile(out / "qmodel.pt") as archive:
            assert archive.testzip() is None
        modules = torch.load(out / "qmodel.pt", weights_only=True)
        flat = {(module, key): value for module, values in modules.items() for key, value in values.items()}
        found.append({k: (v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for k, v in flat.items()})
    assert len(found[0]) > 100
    assert found[0] == found[1]


def test_damage_behind_the_tensors_is_found(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "quant=hqq4").status == 0
    data = bytearray((out / "qmodel.pt").read_bytes())
    data[data.rindex(b"qmodel/data/0") - 46 + 16] ^= 1  # a checksum in the directory
    (out / "qmodel.pt").write_bytes(data)
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert "qmodel.pt: what follows its tensors is not as it was written" in ran.out + ran.err


def test_transformers_form_of_hqq_warns_of_transformers_5(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("plan", f"model.path={source}", f"output.path={tmp_path / 'out'}", "quant=hqq4", "output=hf")
    assert ran.status == 0, ran.err
    assert "computes with random ones" in " ".join(ran.out.split())


@pytest.mark.parametrize("container", ["safetensors", "pytorch"])
def test_one_flipped_bit_is_found(container: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    layout = "hqq" if container == "pytorch" else "hf"
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "quant=hqq4", f"output={layout}").status == 0
    name = "model.layers.1.mlp.up_proj.W_q"
    [spec] = [each for each in open_checkpoint(out).weights if each.name == name]
    data = bytearray((out / spec.file).read_bytes())
    data[spec.offset + 7] ^= 1
    (out / spec.file).write_bytes(data)
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert f"{spec.file}: {name}: its bytes are not those that were written" in ran.out + ran.err


@pytest.mark.parametrize("quant", ["none", "nf4", "ternary"])
def test_pytorch_files_hold_what_safetensors_files_hold(
    quant: str, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    torch = pytest.importorskip("torch")
    double = ["quant.double_quant=true"] if quant == "nf4" else []
    for container in ("safetensors", "pytorch"):
        ran = weightmill(
            "run", f"model.path={source}", f"output.path={tmp_path / container}", f"quant={quant}", *double,
            f"output.container={container}", "unit_mb=0.05",
        )  # fmt: skip
        assert ran.status == 0, ran.err
    assert weightmill("verify", f"output.path={tmp_path / 'pytorch'}").status == 0
    assert (tmp_path / "pytorch" / "pytorch_model.bin.index.json").is_file()
    wanted, found = read_safetensors(tmp_path / "safetensors"), {}
    for path in (tmp_path / "pytorch").glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert tuple(tensor.shape) == wanted[name].data.shape
        assert bytes(tensor.view(torch.uint8).numpy()) == wanted[name].data.tobytes()
    configs = [(tmp_path / each / "config.json").read_bytes() for each in ("safetensors", "pytorch")]
    assert configs[0] == configs[1]
    back = weightmill("run", f"model.path={tmp_path / 'pytorch'}", f"output.path={tmp_path / 'back'}", "quant=none")
    assert back.status == 0, back.err
    assert {n: r.data.tobytes() for n, r in read_safetensors(tmp_path / "back").items()} == {
        n: r.data.tobytes() for n, r in wanted.items()
    }


def test_a_module_without_its_facts_is_refused(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "quant=hqq8", "output=hf").status == 0
    path = out / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"layers.0.mlp.up_proj.nbits", b"layers.0.mlp.up_proj.nbitz", 1))
    ran = weightmill(
        "plan", f"model.path={out}", f"output.path={tmp_path / 'again'}", "quant=none", "quant.dtype=bfloat16"
    )
    assert ran.status == 1
    assert "up_proj.nbits is missing" in ran.err
