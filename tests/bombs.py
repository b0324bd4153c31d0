"""Small files that would hang a reader, or take all memory: how each is made, and what is said of it.

    python -m tests.bombs FOLDER

opens each in turn and prints a line: its name, the exception's class and the message, or "opened".
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import WeightmillError
from loaders.tensors.sources import tensors_of

Make = Callable[[Path], object]
DOUBLING = b")" + b"2\x86" * 45  # (), then forty-five times (x, x)


def safetensors(header: bytes, data: bytes = b"") -> Make:
    raw = header + b" " * (-len(header) % 8)
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entries(count: int, entry: str) -> bytes:
    return ("{" + ",".join(f'"{i}":{entry}' for i in range(count)) + "}").encode()


def torch_zip(pickled: bytes, *storages: bytes) -> Make:
    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            for index, data in enumerate(storages):
                archive.writestr(f"archive/data/{index}", data)

    return make


def tensor(shape: bytes, stride: bytes) -> bytes:
    """Pickle {"a": a tensor over a storage of four floats}."""
    storage = b"(X\x07\0\0\0storage" + b"ctorch\nFloatStorage\n" + b"X\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
    return (
        b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89NtRs."
    )


def patched(at: int, value: int) -> Make:
    """Make a zip, of which two bytes of the directory's first entry are changed."""

    def make(folder: Path) -> None:
        torch_zip(tensor(b"K\x04\x85", b"K\x01\x85"), bytes(16))(folder)
        raw = bytearray((folder / "pytorch_model.bin").read_bytes())
        struct.pack_into("<H", raw, struct.unpack("<I", raw[-6:-2])[0] + at, value)
        (folder / "pytorch_model.bin").write_bytes(raw)

    return make


def many_members(folder: Path) -> None:
    """Write the end of a zip that announces 1,500,000 members, in a file without them."""
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1_500_000, 1_500_000, 150_000_000, 4)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, 150_000_004, 1)
    with (folder / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(150_000_004)
        file.write(end + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def legacy(rest: bytes) -> Make:
    head = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return lambda folder: (folder / "pytorch_model.bin").write_bytes(head + rest)


def gguf(kind: bytes, size: int, key: bytes = b"x") -> Make:
    """Write one metadata value in a sparse file."""

    def make(folder: Path) -> None:
        with (folder / "model.gguf").open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + kind)
            file.truncate(size)

    return make


def config(text: bytes) -> Make:
    small = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()

    def make(folder: Path) -> None:
        safetensors(small, b"x")(folder)
        (folder / "config.json").write_bytes(text)

    return make


def of_model(document: dict[str, object], name: str, shape: list[int]) -> Make:
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}).encode()

    def make(folder: Path) -> None:
        safetensors(header)(folder)
        (folder / "config.json").write_text(json.dumps(document))

    return make


def packed(experts: int) -> Make:
    part = {"name": "gate_proj.weight", "offset": 0, "size": 0, "shape": [0], "dtype": "U8"}
    about = {"expert_size": 1, "num_layers": 1, "num_experts": experts, "moe_layers": [0], "components": [part]}

    def make(folder: Path) -> None:
        (folder / "packed_experts").mkdir()
        (folder / "model_weights.json").write_text('{"tensors": {}}')
        (folder / "model_weights.bin").write_bytes(b"")
        (folder / "packed_experts" / "layout.json").write_text(json.dumps(about))
        with (folder / "packed_experts" / "layer_00.bin").open("wb") as file:
            file.truncate(experts)

    return make


def many_files(folder: Path) -> None:
    (folder / "0").touch()
    for number in range(1, 40_000):
        (folder / str(number)).hardlink_to(folder / "0")
    safetensors(("{" + f'"a":{EMPTY}' + "}").encode())(folder)


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BOMBS: dict[str, tuple[Make, str]] = {
    "a name twice among many": (safetensors(entries(120_000, "0")[:-1] + b',"119999":0}'), "'119999' appears twice"),
    "a shape of many numbers": (
        safetensors(b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 18] * 100_000) + b'],"data_offsets":[0,0]}}'),
        "100000 dimensions, at most 32",
    ),
    "a product beyond all files": (
        safetensors(b'{"a":{"dtype":"F32","shape":[9999999999,9999999999,0],"data_offsets":[0,0]}}'),
        "more numbers than any file",
    ),
    "many empty tensors": (safetensors(entries(600_001, EMPTY)), "600001 tensors, at most 600000"),
    "many empty values": (safetensors(b'{"__metadata__":{"a":[' + b"[]," * 9_000_000 + b"0]}}"), "values, at most"),
    "a long name": (safetensors(b'{"' + b"a" * 4097 + b'":' + EMPTY.encode() + b"}"), "4097 bytes"),
    "a name of many parts": (safetensors(b'{"' + b"a." * 2000 + b'":' + EMPTY.encode() + b"}"), "2001 parts"),
    "experts of nothing": (
        of_model({"model_type": "gpt_oss"}, "model.layers.0.mlp.experts.down_proj", [1 << 40, 0, 128]),
        "at most 600000",
    ),
    "a key of many leaves": (torch_zip(b"\x80\x02}" + DOUBLING + b"K\x01s."), "a key that is a tuple"),
    "a deep key": (torch_zip(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."), "a key that is a tuple|more operations"),
    "a set of many leaves": (torch_zip(b"\x80\x04\x8f(" + DOUBLING + b"\x90."), "objects of other classes"),
    "a frozen set": (torch_zip(b"\x80\x04(" + DOUBLING + b"\x91."), "objects of other classes"),
    "a call of many leaves": (torch_zip(b"\x80\x02" + DOUBLING + b")R."), "a call of a tuple of 2"),
    "a dict made of many leaves": (
        torch_zip(b"\x80\x02ccollections\nOrderedDict\n](" + DOUBLING + b"K\x01\x86e\x85R."), "a key that is a tuple"
    ),
    "an id of many leaves": (torch_zip(b"\x80\x02(" + DOUBLING + b"NNNNtQ."), "persistent id"),
    "a shape of many leaves": (torch_zip(tensor(DOUBLING, b")"), bytes(16)), "its shape is a tuple of 2"),
    "a long number": (
        torch_zip(tensor(b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"\x85", b"K\x01\x85"), bytes(16)),
        "a number of 7999999 bits",
    ),
    "many operations": (torch_zip(b"\x80\x02" + b"]" * 1_200_000 + b"."), "more operations than weights need"),
    "numbers of stride 0": (
        torch_zip(tensor(b"\x8a\x08" + struct.pack("<q", 1 << 38) + b"\x85", b"K\0\x85"), bytes(16)), "many times"
    ),
    "a zip of many members": (many_members, "1500000 members"),
    "a zip of another version": (patched(6, 99), "zip file version 9.9"),
    "an encrypted member": (patched(8, 1), "is encrypted"),
    "a patch": (patched(8, 0x20), "a patch"),
    "a strongly encrypted member": (patched(8, 0x41), "is encrypted"),
    "a member's name of no text": (patched(8, 0x800), "data.pkl|no state dict|'a'|opened"),
    "bytes without end": (legacy(b"\x80\x04\x8e" + struct.pack("<Q", 8 << 30) + b"x"), "which the file does not have"),
    "a bytearray without end": (legacy(b"\x80\x05\x96" + struct.pack("<Q", 8 << 30)), "8589934592 bytes"),
    "a line without end": (legacy(b"\x80\x02c" + b"x" * 2000), "a line of 1024 bytes"),
    "a text of gigabytes": (gguf(struct.pack("<IQ", 8, (4 << 30) - 200), 4 << 30), "a text of 4294967096 bytes"),
    "an array of gigabytes": (gguf(struct.pack("<IIQ", 9, 0, (4 << 30) - 200), 4 << 30), "more than 8000000 items"),
    "many numbers": (gguf(struct.pack("<IIQ", 9, 3, 150_000_000), 300_000_200), "more than 8000000 items"),
    "many empty texts": (gguf(struct.pack("<IIQ", 9, 8, 12_000_000), 100_000_000), "more than 8000000 items"),
    "a large config": (config(b'{"x":[' + b"[]," * 6_000_000 + b"0]}"), "at most 16777216 are read"),
    "a config of many values": (config(b'{"x":[' + b"0," * 4_000_000 + b"0]}"), "values, at most 1000000"),
    "a deep config": (config(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "nest too deep"),
    "layers without end": (config(b'{"model_type":"gemma3_text","num_hidden_layers":10000000000}'), "0 to 10000"),
    "many files": (many_files, "opened"),
    "experts without end": (packed(20_000_000), "num_experts is 20000000, at most 65536"),
}  # fmt: skip


def said_of(make: Make, folder: Path) -> str:
    make(folder)
    try:
        tensors_of(open_checkpoint(folder), decode=True, split=True)
    except WeightmillError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


if __name__ == "__main__":
    for name, (make, _) in BOMBS.items():
        with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
            print(json.dumps([name, said_of(make, Path(folder))]), flush=True)
