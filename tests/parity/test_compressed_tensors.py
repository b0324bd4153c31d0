"""Held against compressed-tensors itself: the bytes of its own functions, and transformers that loads ours.

llm-compressor cannot live beside transformers 5.23; name a Python that has it in WEIGHTMILL_LLMCOMPRESSOR_PYTHON, and
its model_free_ptq writes whole checkpoints to compare with.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.checkpoints.derived_config import read_config
from loaders.presets.settings import COMPRESSED_TENSORS
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.compressed_tensors_int import PackedInt
from tests.encoding import MemorySink, MemoryView, decode
from tests.making import Raw
from tests.reading import files_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.format import infer_module_format  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme  # noqa: E402
from compressed_tensors.quantization import utils as peer  # noqa: E402

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PRESETS = sorted(COMPRESSED_TENSORS)
LLMCOMPRESSOR = os.environ.get("WEIGHTMILL_LLMCOMPRESSOR_PYTHON")


def raw_of(tensor: Any) -> Raw:
    name = next(name for name, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)
    return Raw(name, (tensor.view(torch.uint16) if name == "BF16" else tensor).numpy())


def bits(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return found


def compressed(weight: Any, preset: str, partners: Sequence[Any] = (), group_size: int | None = None) -> dict[str, Any]:
    """What compressed-tensors' own functions store: observed as llm-compressor observes, then compressed."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    if group_size is not None:
        args.group_size = group_size
    if args.strategy == "channel":
        observed = weight.unsqueeze(-2)
    elif args.strategy == "block":
        padded = peer.maybe_pad_tensor_for_block_quant(weight, (128, 128))
        rows, columns = (n // 128 for n in padded.shape)
        observed = padded.reshape(rows, 128, columns, 128).transpose(1, 2).flatten(-2, -1)
    else:
        observed = weight.unflatten(-1, (-1, args.group_size))
    whole = None
    if args.strategy == "tensor_group":
        top = torch.stack([t.abs().max() for t in (weight, *partners)]).max().reshape(1)
        whole = peer.generate_gparam(-top, top)
    scale, zero = peer.calculate_qparams(observed.amin(-1), observed.amax(-1), args, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    state |= {} if args.symmetric else {"weight_zero_point": zero}
    state |= {} if whole is None else {"weight_global_scale": whole}
    return dict(compressor(scheme).compress(state, scheme))


def compressor(scheme: Any) -> Any:
    return BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)


def decompressed(stored: dict[str, Any], preset: str) -> Any:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    return compressor(scheme).decompress(stored, scheme)["weight"]


def awkward() -> Any:
    """Rows ordinary, zero, minus zero, tiny, huge, sparse, one-signed, constant, on codes' edges."""
    rows = (np.random.default_rng(3).standard_normal((37, 256)) * 0.02).astype(np.float32)
    rows[0] = 0
    rows[1, :64] = -0.0
    rows[2] *= 1e-30
    rows[3] *= 1e20
    rows[4, ::7] = 0
    rows[5] = np.abs(rows[5])
    rows[6] = -np.abs(rows[6])
    rows[7, 5::64], rows[7, 9::64] = 0.5, -0.5
    rows[8] = np.round(rows[8] * 256) / 256
    rows[9] = 0.01
    rows[10] *= 1e-36
    rows[11, 3::64] *= 100
    rows[12] *= 1e-43
    rows[13] = -0.0
    rows[14] = 1e-38
    rows[15] = np.linspace(-7.5, 7.5, 256)
    rows[16] = np.arange(256) - 3
    rows[17] *= 1e-5
    rows[18] *= 1e-7
    rows[19] = 3e-5
    rows[20] *= 1e4
    return torch.from_numpy(rows)


def matrices(preset: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    found = {"awkward": awkward(), "plain": torch.randn(136, 256, generator=generator) * 0.02}
    if isinstance(COMPRESSED_TENSORS[preset], PackedInt):
        return found
    if preset.startswith(("fp8", "w8a8")):
        return {**found, "odd": torch.randn(133, 201, generator=generator), "one": torch.randn(1, 1)}
    rows = awkward()  # each row with a global scale of its own
    return {**found, **{f"row {row}": rows[row : row + 1].repeat(2, 1) for row in range(21)}}


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_and_decoded_weights_are_those_of_compressed_tensors(preset: str, dtype: str) -> None:
    scheme = COMPRESSED_TENSORS[preset]
    for name, matrix in matrices(preset).items():
        weight = matrix.clamp(-1e4, 1e4).to(TORCH_DTYPES[dtype]) if dtype == "F16" else matrix.to(TORCH_DTYPES[dtype])
        theirs = compressed(weight, preset)
        check_bytes(scheme, weight, theirs, name)
        with Crew(1) as crew:
            work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
            view = MemoryView(raw_of(weight))
            sink = MemorySink(scheme, view.spec)
            scheme.encode(view, sink, work)
            mine = torch.from_numpy(decode(scheme, raw_of(weight), sink, work))
        wanted = decompressed(theirs, preset)
        assert torch.equal(mine.to(wanted.dtype), wanted), name


def check_bytes(scheme: Scheme, weight: Any, theirs: dict[str, Any], name: str) -> None:
    view = MemoryView(raw_of(weight))
    sink = MemorySink(scheme, view.spec)
    with Crew(1) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    assert set(sink.stored) == set(theirs)
    for role, data in theirs.items():
        assert scheme.stored(view.spec)[role].shape == tuple(data.shape), (name, role)
        assert np.array_equal(sink.stored[role].view(np.uint8), bits(data)), (name, role)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("preset", ["w4a16", "w8a16", "w4a16_asym"])
def test_smaller_groups_are_those_of_compressed_tensors(preset: str, group: int) -> None:
    scheme = COMPRESSED_TENSORS[preset]
    assert isinstance(scheme, PackedInt)
    smaller = PackedInt(scheme.bits, group, scheme.symmetric)
    weight = awkward().to(torch.bfloat16)
    check_bytes(smaller, weight, compressed(weight, preset, group_size=group), preset)


# --- whole checkpoints


def causal(prefix: str, **extra: Any) -> Any:
    config = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, **extra,
    }  # fmt: skip
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**config))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
ODD = {"hidden_size": 200, "intermediate_size": 330, "num_attention_heads": 5, "num_key_value_heads": 5}
MODELS: dict[str, tuple[Any, Any]] = {
    "untied": (lambda: causal("Llama"), torch.bfloat16),
    "tied": (lambda: causal("Llama", tie_word_embeddings=True), torch.bfloat16),
    "half": (lambda: causal("Qwen2"), torch.float16),
    "odd": (lambda: causal("Llama", **ODD), torch.bfloat16),
    "qwen3 moe": (lambda: causal("Qwen3Moe", **MOE), torch.bfloat16),
    "mixtral": (lambda: causal("Mixtral", num_local_experts=4), torch.bfloat16),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# transformers 5.23 cannot load these experts, or computes something else with them: bytes alone are compared
NO_EXPERTS = ("w8a8", "fp8_block", "w4a16_asym", "nvfp4a16")
ODD_ONES = ("fp8_dynamic", "w8a8")
CASES = [
    (model, preset)
    for model in MODELS
    for preset in PRESETS
    if (model != "odd" or preset in ODD_ONES) and (model not in ("half", "mixtral") or preset in
                                                  ("w4a16", "fp8_dynamic", "nvfp4a16", "mxfp4"))
]  # fmt: skip


def stored(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def peers_tensors(source: dict[str, Any], preset: str) -> dict[str, Any]:
    """The checkpoint that compressed-tensors makes of another, fused partners sharing what they must."""
    found = {}
    for name, tensor in source.items():
        module, _, last = name.rpartition(".")
        is_kept = module.endswith(("norm", "embed_tokens", "lm_head", "mlp.gate", "moe.gate")) or last != "weight"
        if is_kept:
            found[name] = tensor
            continue
        parent, _, own = module.rpartition(".")
        partners = next((group for group in FUSED if own in group), (own,))
        together = [source[f"{parent}.{partner}.weight"] for partner in partners]
        found |= {f"{module}.{role}": part for role, part in compressed(tensor, preset, together).items()}
    return found


def logits(model: Any) -> Any:
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids)[0]


def load(folder: Path, **settings: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, output_loading_info=True, **settings
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model, saved in several files."""
    found = {}
    for name, (make, dtype) in MODELS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp("source") / name.replace(" ", "-")
        make().to(dtype).save_pretrained(found[name], max_shard_size="200KB")
    return found


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_the_checkpoint_is_that_of_compressed_tensors_and_loads(
    model: str, preset: str, sources: dict[str, Path], tmp_path: Path, weightmill: Any
) -> None:
    source, out = sources[model], tmp_path / "out"
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={out}", f"quant={preset}", "unit_mb=0.3", "format=json"
    )
    assert ran.status == 0, ran.err
    ours, theirs = stored(out), peers_tensors(stored(source), preset)
    assert set(ours) == set(theirs)
    unlike = [
        name
        for name, tensor in theirs.items()
        if ours[name].dtype != tensor.dtype
        or ours[name].shape != tensor.shape
        or not np.array_equal(bits(ours[name]), bits(tensor))
    ]
    assert unlike == []

    is_moe = model in ("qwen3 moe", "mixtral")
    if is_moe and preset in NO_EXPERTS:
        assert "experts are in" in " ".join(ran.document["warnings"])
        return
    write_peer(tmp_path / "peer", source, theirs, preset, is_moe)
    settings = {}
    if preset == "w4a16_asym":
        assert "dequantize=True" in " ".join(ran.document["warnings"])
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if model == "half" and "fp4" in preset:
        assert "load it with dtype=torch.bfloat16" in " ".join(ran.document["warnings"])
        settings["dtype"] = torch.bfloat16
    again = load(out, **settings)
    assert torch.equal(logits(again), logits(load(tmp_path / "peer", **settings)))


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        (
            "w4a16",
            "into groups of 128; no group size that compressed-tensors takes (32, 64, 128) divides enough",
        ),
        ("w4a16_asym", "columns do not divide into groups of 128"),
        ("w8a16", "columns do not divide into groups of 128"),
        ("nvfp4a16", "columns do not divide into NVFP4's groups of 16; to keep "),
        ("mxfp4", "columns do not divide into MXFP4's groups of 32; to keep "),
        ("mxfp4a16", "columns do not divide into MXFP4's groups of 32; to keep "),
        (
            "fp8_block",
            "columns do not divide into groups of 128, and FP8_BLOCK's engines quantize activations",
        ),
    ],
)
def test_what_a_scheme_or_its_engine_cannot_hold_is_refused_in_the_plan(
    preset: str, said: str, sources: dict[str, Path], weightmill: Any
) -> None:
    ran = weightmill("plan", f"model.path={sources['odd']}", f"quant={preset}")
    assert ran.status == 2
    assert said in ran.err


def write_peer(folder: Path, source: Path, tensors: dict[str, Any], preset: str, is_moe: bool) -> None:
    """A checkpoint with the config that compressed-tensors' own classes write."""
    from safetensors.torch import save_file

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    ignore = ["lm_head"] + (["re:.*gate$"] if is_moe else [])
    block = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=ignore, quantization_status="compressed", format=scheme.format
    ).model_dump(mode="json")
    folder.mkdir()
    config = read_config(files_of(source)) | {"quantization_config": {**block, "quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_fused_partners_share_nvfp4s_global_scale(sources: dict[str, Path], tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={sources['qwen3 moe']}", f"output.path={tmp_path / 'out'}", "quant=nvfp4a16")
    assert ran.status == 0, ran.err
    ours = stored(tmp_path / "out")
    for parent, partners in (("self_attn", FUSED[0]), ("mlp.experts.2", FUSED[1])):
        names = [f"model.layers.1.{parent}.{partner}.weight_global_scale" for partner in partners]
        assert len({float(ours[name]) for name in names}) == 1
    alone = {float(t) for n, t in ours.items() if n.endswith("down_proj.weight_global_scale")}
    assert len(alone) > 1


@pytest.mark.parametrize("model", ["untied", "qwen3 moe"])
def test_several_schemes_in_one_checkpoint_load(
    model: str, sources: dict[str, Path], tmp_path: Path, weightmill: Any
) -> None:
    """transformers finds the scheme of each module by its group's targets; experts by patterns."""
    rules = "rules=[{name: o_proj, action: quantize, quant: {preset: fp8_dynamic}},"
    rules += "{name: layers.1.*v_proj, action: keep}]"
    ran = weightmill("run", f"model.path={sources[model]}", f"output.path={tmp_path / 'out'}", "quant=w4a16", rules)
    assert ran.status == 0, ran.err
    assert "vLLM fuses their layers and refuses" in ran.out + ran.err
    block = read_config(files_of(tmp_path / "out"))["quantization_config"]
    assert block["format"] == "mixed-precision"
    assert {g["format"] for g in block["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    mixed = load(tmp_path / "out")

    def scheme_of(module: Any) -> str | None:
        scheme = getattr(module, "quantization_scheme", None)
        return None if scheme is None else f"{scheme.weights.type}{scheme.weights.num_bits}"

    attention = mixed.model.layers[1].self_attn
    assert scheme_of(attention.o_proj) == "float8"
    assert scheme_of(attention.q_proj) == "int4"
    assert scheme_of(attention.v_proj) is None
    plain = load_plain(tmp_path, sources[model], weightmill)
    # weights are the same; activations of the E4M3 layers are rounded to three bits of mantissa as it runs
    assert torch.allclose(logits(mixed), logits(plain), atol=0.05)


def load_plain(tmp_path: Path, source: Path, weightmill: Any) -> Any:
    """The output decoded again, as a plain checkpoint."""
    ran = weightmill("run", f"model.path={tmp_path / 'out'}", f"output.path={tmp_path / 'plain'}", "quant=none",
                     "quant.dtype=bfloat16")  # fmt: skip
    assert ran.status == 0, ran.err
    assert set(stored(tmp_path / "plain")) == set(stored(source))
    return load(tmp_path / "plain")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_decodes_to_what_compressed_tensors_decompresses(
    preset: str, sources: dict[str, Path], tmp_path: Path, weightmill: Any
) -> None:
    ran = weightmill("run", f"model.path={sources['untied']}", f"output.path={tmp_path / 'out'}", f"quant={preset}")
    assert ran.status == 0, ran.err
    load_plain(tmp_path, sources["untied"], weightmill)
    parts, plain = stored(tmp_path / "out"), stored(tmp_path / "plain")
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in parts:
            assert torch.equal(weight, parts[name])
            continue
        own = {n.removeprefix(f"{module}."): t for n, t in parts.items() if n.startswith(f"{module}.")}
        assert torch.equal(weight, decompressed(own, preset))


MODEL_FREE = """
import sys
from llmcompressor import model_free_ptq
for source in sys.argv[3:]:
    for scheme in sys.argv[2].split(","):
        model_free_ptq(
            model_stub=source, save_directory=f"{sys.argv[1]}/{source.rsplit('/', 1)[1]}-{scheme}",
            scheme=scheme.upper(),
            ignore=["lm_head", "model.embed_tokens", "re:.*mlp.gate$"], max_workers=1, device="cpu",
        )
"""
FREE_MODELS = ("untied", "half", "qwen3 moe")


@pytest.fixture(scope="module")
def model_free(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of model_free_ptq, all made by one process: its imports take long."""
    folder = tmp_path_factory.mktemp("model_free")
    arguments = [folder, ",".join(PRESETS), *(sources[model] for model in FREE_MODELS)]
    subprocess.run([str(LLMCOMPRESSOR), "-c", MODEL_FREE, *map(str, arguments)], check=True, capture_output=True)
    return folder


@pytest.mark.skipif(LLMCOMPRESSOR is None, reason="WEIGHTMILL_LLMCOMPRESSOR_PYTHON names no Python with llmcompressor")
@pytest.mark.parametrize("model", FREE_MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_checkpoint_is_that_of_model_free_ptq(
    model: str, preset: str, sources: dict[str, Path], model_free: Path, tmp_path: Path, weightmill: Any
) -> None:
    ran = weightmill("run", f"model.path={sources[model]}", f"output.path={tmp_path / 'out'}", f"quant={preset}")
    assert ran.status == 0, ran.err
    peers = model_free / f"{sources[model].name}-{preset}"
    ours, theirs = stored(tmp_path / "out"), stored(peers)
    assert set(ours) == set(theirs)
    unlike = {name for name in ours if not np.array_equal(bits(ours[name]), bits(theirs[name]))}
    if preset == "nvfp4a16":  # model_free_ptq gives an expert's gate and up global scales of their own
        unlike = {name for name in unlike if not (".experts." in name and ("gate_proj" in name or "up_proj" in name))}
    assert unlike == set()
    mine, other = (
        read_config(files_of(folder))["quantization_config"]["config_groups"] for folder in (tmp_path / "out", peers)
    )
    assert list(mine.values()) == list(other.values())


def test_a_flipped_bit_is_found(sources: dict[str, Path], tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    arguments = (f"model.path={sources['untied']}", f"output.path={out}", "quant=w4a16_asym")
    assert weightmill("run", *arguments).status == 0
    assert weightmill("verify", f"output.path={out}").status == 0
    file = min(out.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert weightmill("verify", f"output.path={out}").status == 1
