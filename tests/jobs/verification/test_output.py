"""The gate and jobs.verify: whatever is not right is found, and named."""

from __future__ import annotations

import errno
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.output.report import Report
from loaders.containers.safetensors import read_specs
from loaders.errors import BadCheckpoint, BadSpec, StorageError, io_errors
from tests.making import write_checkpoint
from tests.reading import files_of


def forge(out: Path, change: Callable[[Any], Any]) -> None:
    """Change the report of an output, with its own hashes."""
    path = out / "weightmill.json"
    report = json.loads(path.read_text())
    change(report)
    report["run"].pop("xxh3")
    path.write_bytes(Report.from_json(json.dumps(report).encode()).to_bytes())


FORGED = {
    "a tensor's role": lambda r: r["tensors"][3].update(role="other"),
    "a tensor's action": lambda r: r["tensors"][0].update(action="drop"),
    "a tensor's dtype": lambda r: r["tensors"][0].update(dtype="F64"),
    "a tensor's shape": lambda r: r["tensors"][0].update(shape=[1, 2]),
    "a tensor's name": lambda r: r["tensors"][0].update(name="other"),
    "a tensor less": lambda r: r["tensors"].pop(),
    "a stored name": lambda r: r["tensors"][0].update(stored={"other": next(iter(r["tensors"][0]["stored"].values()))}),
    "a stored dtype": lambda r: next(iter(r["tensors"][0]["stored"].values())).update(dtype="F64"),
    "a stored size": lambda r: next(iter(r["tensors"][0]["stored"].values())).update(bytes=3),
    "a size": lambda r: r["tensors"][1].update(output_bytes=5),
    "a total": lambda r: r["totals"].update(ratio=99.0),
    "a file's name": lambda r: r["files"][0].update(name="other.safetensors"),
    "a file's size": lambda r: r["files"][0].update(bytes=3),
    "a file less": lambda r: r["files"].clear(),
    "a file of the source": lambda r: r["source"]["files"][0].update(bytes=3),
}  # fmt: skip


@pytest.mark.quick
def test_a_forged_report_is_found_and_ends_in_no_traceback(out: Path, weightmill: Any) -> None:
    raw = (out / "weightmill.json").read_bytes()
    for what, change in FORGED.items():
        (out / "weightmill.json").write_bytes(raw)
        forge(out, change)
        ran = weightmill("verify", f"output.path={out}")
        assert ran.status == 1, what
        assert "weightmill.json" in ran.out + ran.err, what
        assert "Traceback" not in ran.out + ran.err, what


@pytest.mark.quick
def test_what_is_no_report_is_said_in_our_words(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "tracking=none", "quant=nf4").status == 0
    raw = (out / "weightmill.json").read_bytes()
    for old, new, said in (
        (b'"container": "', rb'"container": "\ud800', "its JSON has a text that is none in UTF-8"),
        (b'"files": [', b'"files": "x", "other": [', "(files: expected a list"),
        (b'"run": {', b'"evil": 1, "run": {', "(evil: an unknown key)"),
    ):
        before, found, after = raw.rpartition(old)
        assert found
        with pytest.raises(BadCheckpoint) as caught:
            Report.from_json(before + new + after)
        assert said in str(caught.value)
    report = json.loads(raw)
    report["job"]["quant"]["kind"] = "evil"
    del report["run"]["xxh3"]
    (out / "weightmill.json").write_text(json.dumps(report))
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert "quant: expected a kind of" in " ".join(ran.err.split())
    assert "pydantic" not in ran.err


def test_no_folder_can_be_made_where_there_is_no_place() -> None:
    with pytest.raises(StorageError, match="no folder can be made there"), io_errors("making", "/proc/x"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


@pytest.mark.quick
def test_any_flipped_bit_of_a_report_is_noticed(source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={source}", f"output.path={out}", "tracking=none").status == 0
    raw = (out / "weightmill.json").read_bytes()
    assert Report.from_json(raw).to_bytes() == raw
    for at in range(0, len(raw), max(1, len(raw) // 400)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 7)
        with pytest.raises((BadCheckpoint, BadSpec)):
            Report.from_json(bytes(flipped))
    (out / "weightmill.json").write_bytes(raw.replace(b'"role": "', b'"role": "x', 1))
    for verb in ("verify", "compare"):
        ran = weightmill(verb, f"output.path={out}" if verb == "verify" else f"runs=[{out}]")
        assert ran.status == 1
        assert f"{out / 'weightmill.json'}: it is damaged" in " ".join(ran.err.split())


def test_a_recorded_error_that_was_edited_is_found(source: Path, tmp_path: Path, weightmill: Any) -> None:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}").status == 0
    forge(tmp_path / "out", lambda report: report["tensors"][3].update(relative_error=0.0123))
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert "relative_error in weightmill.json is not what its sums give" in ran.out


WEIGHT = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def out(source: Path, tmp_path: Path, weightmill: Any) -> Path:
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", "unit_mb=0.05")
    assert ran.status == 0, ran.err
    return tmp_path / "out"


def edit(out: Path, name: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """Change the bytes of one stored tensor."""
    for path in out.glob("*.safetensors"):
        for spec in read_specs(files_of(out), path.name):
            if spec.name == name:
                data = bytearray(path.read_bytes())
                span = slice(spec.offset, spec.offset + spec.size)
                changed = change(data[span])
                assert len(changed) == spec.size
                assert changed != data[span]
                data[span] = changed
                path.write_bytes(data)
                return
    raise AssertionError(name)


def faults(weightmill: Any, out: Path, *arguments: str) -> list[str]:
    ran = weightmill("verify", f"output.path={out}", "format=json", *arguments)
    assert ran.status == (1 if ran.document["faults"] else 0)
    found: list[str] = ran.document["faults"]
    return found


def flip(data: bytearray) -> bytearray:
    data[17] ^= 0x10
    return data


def transpose(data: bytearray) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(128, 32).T.tobytes()


@pytest.mark.quick
def test_a_right_output_passes(out: Path, weightmill: Any) -> None:
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 0
    assert "21 tensors, every byte and every error as recorded" in ran.out


DAMAGE: dict[str, tuple[str, Callable[[bytearray], bytes | bytearray]]] = {
    "a flipped nibble": (WEIGHT, flip),
    "a changed byte of a scale": (WEIGHT + ".absmax", flip),
    "a transposed matrix": (WEIGHT, transpose),
    "a changed quant state": (WEIGHT + ".quant_state.bitsandbytes__nf4", lambda d: d.replace(b"64", b"32", 1)),
    "a changed code table": (WEIGHT + ".quant_map", flip),
    "a flipped bit of a copied tensor": ("model.norm.weight", flip),
}


def test_a_limit_given_later_comes_on_top(out: Path, weightmill: Any) -> None:
    found = faults(weightmill, out, "verify.max_relative_error=0.01")
    assert found
    assert all("relative error" in fault for fault in found), found
    assert not faults(weightmill, out, "verify.max_relative_error=0.5")


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_damage_fails_and_is_named(what: str, out: Path, weightmill: Any) -> None:
    name, change = DAMAGE[what]
    edit(out, name, change)
    assert any(name in fault for fault in faults(weightmill, out))


def reseal(out: Path) -> None:
    """Make the report agree with damaged files, as whoever forges an output would."""
    import xxhash

    def change(report: Any) -> None:
        for file in report["files"]:
            file["xxh3"] = xxhash.xxh3_128_hexdigest((out / file["name"]).read_bytes())

    forge(out, change)


@pytest.mark.parametrize("what", sorted(d for d in DAMAGE if "state" not in d and "table" not in d))
def test_the_errors_tell_even_when_the_hashes_are_forged(what: str, out: Path, weightmill: Any) -> None:
    name, change = DAMAGE[what]
    edit(out, name, change)
    reseal(out)
    weight = name.removesuffix(".absmax")
    found = faults(weightmill, out)
    assert any(weight in fault and ("relative error" in fault or "its error is" in fault) for fault in found), found


@pytest.mark.quick
def test_two_swapped_tensors_of_one_shape_fail_the_gate(out: Path, weightmill: Any) -> None:
    for path in out.glob("*.safetensors"):
        data = path.read_bytes()
        if WEIGHT.encode() in data and OTHER.encode() in data:
            length = int.from_bytes(data[:8], "little")
            head = data[8 : 8 + length].replace(WEIGHT.encode(), b"\0").replace(OTHER.encode(), WEIGHT.encode())
            head = head.replace(b"\0", OTHER.encode())
            path.write_bytes(data[:8] + head.ljust(length) + data[8 + length :])
    reseal(out)
    found = faults(weightmill, out)
    assert any(WEIGHT in fault and "not the nearest" in fault for fault in found)
    assert any(OTHER in fault and "not the nearest" in fault for fault in found)


def test_a_source_that_moved_is_found_by_its_new_place(
    out: Path, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    shutil.move(source, tmp_path / "moved")
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 2
    assert "give model.path=DIR" in ran.err
    assert faults(weightmill, out, f"model.path={tmp_path / 'moved'}") == []


def test_no_server_is_asked_because_a_report_names_it(out: Path, weightmill: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}/admin"
        forge(out, lambda report: report["source"].update(path=url))
        ran = weightmill("verify", f"output.path={out}")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ran.status == 2
    assert "no server is asked because a file says so; give the address as model.path=URL" in ran.err
    assert "secret" not in ran.out + ran.err


def test_another_source_is_refused(out: Path, tmp_path: Path, weightmill: Any) -> None:
    other = write_checkpoint(tmp_path / "other", shards=2)
    ran = weightmill("verify", f"output.path={out}", f"model.path={other}")
    assert ran.status == 2
    assert "is not the checkpoint that the output was made from" in ran.err


def test_a_source_with_other_weights_of_the_same_shapes_fails(out: Path, source: Path, weightmill: Any) -> None:
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-4] ^= 0x40
        path.write_bytes(data)
    assert faults(weightmill, out)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "extra/modeling.py", "model.safetensors.index.json"])
def test_changed_and_missing_aux_files_are_named(name: str, out: Path, weightmill: Any) -> None:
    original = (out / name).read_bytes()
    (out / name).write_bytes(original.replace(b"{", b"{ ", 1) if b"{" in original else b"pass")
    assert any(name in fault for fault in faults(weightmill, out))
    (out / name).unlink()
    if "index" not in name:
        assert faults(weightmill, out) == [f"{name}: missing from the output"]


def test_a_truncated_and_a_missing_shard_are_errors(out: Path, weightmill: Any) -> None:
    path = min(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert "truncated" in ran.err
    path.unlink()
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert path.name in ran.err


def test_what_is_no_output_and_another_version_are_refused(out: Path, source: Path, weightmill: Any) -> None:
    ran = weightmill("verify", f"output.path={source}")
    assert ran.status == 2
    assert "found no weightmill.json" in ran.err
    report = json.loads((out / "weightmill.json").read_text())
    (out / "weightmill.json").write_text(json.dumps({**report, "format": 99}))
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 2
    assert "is of format 99" in ran.err


@pytest.mark.parametrize("where", ["tensor", "header"])
def test_bytes_that_change_between_measuring_and_finishing_fail_the_run(
    where: str, source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from loaders.containers import ShardWriter

    honest = ShardWriter.seal

    def flipping(self: Any) -> Any:
        places = honest(self)
        at = places[WEIGHT][0] + 5 if where == "tensor" else self.file.header_bytes - 1
        byte = os.pread(self._descriptor, 1, at)[0]
        os.pwrite(self._descriptor, bytes([byte ^ 1]), at)
        return places

    monkeypatch.setattr(ShardWriter, "seal", flipping)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    said = {
        "tensor": f"{WEIGHT}: its bytes in model.safetensors are not those that were measured",
        "header": "model.safetensors: what stands around its tensors is not as it was written",
    }
    assert said[where] in ran.err
    assert not (tmp_path / "out").exists()


def test_a_wrong_encoder_fails_the_run(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loaders.quantization.kernels.cpu import CpuKernels

    honest = CpuKernels.encode_fourbit

    def wrong(self: Any, x: Any, dtype: str, table: str, group: int, packed: Any, absmax: Any) -> None:
        honest(self, x, dtype, table, group, packed, absmax)
        packed[:] = packed[::-1].copy()

    monkeypatch.setattr(CpuKernels, "encode_fourbit", wrong)
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}")
    assert ran.status == 1
    assert "not published" in ran.err
