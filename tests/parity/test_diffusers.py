"""Held against diffusers itself: the same tensors and config.json, and a tiny pipeline that loads and runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loaders.architectures.diffusers import _rows, is_skipped
from loaders.lint.engines import question_of
from loaders.lint.engines.__main__ import answer_of
from tests import passes
from tests.diffusers_classes import row_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

BITS = {"nf4": 4, "int8": 8}


def transformer() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip


def wan() -> Any:
    """A class that keeps modules in float32."""
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
        text_dim=64, freq_dim=64, ffn_dim=64, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=4,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=8,
    )  # fmt: skip


def tokenizer(folder: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{index}": index for index in range(63)} | {"<unk>": 63}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="w0", model_max_length=16
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose parts have random weights."""
    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,), layers_per_block=1, latent_channels=16, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.CLIPTextModel(clip),
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer=tokenizer(folder),
        tokenizer_2=tokenizer(folder),
        transformer=transformer(),
        vae=vae,
    )
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """Let diffusers quantize and load on a CPU, which bitsandbytes can and diffusers does not ask for."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    with ExitStack() as patched:
        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            patched.enter_context(mock.patch.object(quantizer, "validate_environment"))
            patched.enter_context(mock.patch.object(quantizer, "update_device_map", return_value={"": "cpu"}))
        yield


def theirs(cls: Any, folder: Path, out: Path, preset: str) -> Path:
    """Quantize as diffusers or transformers does when it loads, and save that."""
    library, key = (diffusers, "torch_dtype") if issubclass(cls, diffusers.ModelMixin) else (transformers, "dtype")
    if BITS[preset] == 4:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        config = library.BitsAndBytesConfig(**four)
    else:
        config = library.BitsAndBytesConfig(load_in_8bit=True)
    cls.from_pretrained(folder, quantization_config=config, **{key: torch.bfloat16}).save_pretrained(out)
    return out


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def check_same(ours: Path, theirs: Path) -> None:
    mine, wanted = tensors(ours), tensors(theirs)
    assert sorted(mine) == sorted(wanted)
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def check_same_config(ours: Path, theirs: Path) -> None:
    """The same bytes but for where the saved model came from."""
    wanted = json.loads((theirs / "config.json").read_text())
    wanted.pop("_name_or_path", None)
    assert (ours / "config.json").read_text() == json.dumps(wanted, indent=2) + "\n"


@pytest.mark.parametrize("preset", BITS)
def test_a_pipeline_has_the_bytes_of_diffusers_own(pipeline: Path, tmp_path: Path, preset: str) -> None:
    out = passes.run(pipeline, tmp_path / "out", preset)[preset].folder
    assert (out / "model_index.json").read_bytes() == (pipeline / "model_index.json").read_bytes()
    classes = {
        "transformer": diffusers.FluxTransformer2DModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    }
    for part, cls in classes.items():
        check_same(out / part, theirs(cls, pipeline / part, tmp_path / part, preset))
    check_same_config(out / "transformer", tmp_path / "transformer")
    check_same(out / "vae", pipeline / "vae")


@pytest.mark.parametrize("preset", BITS)
def test_a_pipeline_loads_and_runs(pipeline: Path, tmp_path: Path, preset: str) -> None:
    out = passes.run(pipeline, tmp_path / "out", preset)[preset].folder
    cls = diffusers.FluxTransformer2DModel
    _, about = cls.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not any(about.values())

    def image(folder: Path) -> Any:
        made = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        made.set_progress_bar_config(disable=True)
        settings = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 16}
        generator = torch.Generator().manual_seed(0)
        return made("w1 w2", generator=generator, output_type="latent", **settings).images.float()

    original, found = image(pipeline), image(out)
    assert (found - original).norm() < 0.2 * original.norm()


@pytest.mark.parametrize("make", [wan, unet, sd3])
def test_other_classes_have_the_bytes_of_diffusers_own(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    kept = type(model)._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if not is_skipped(name.rpartition(".")[0], kept) and name.rpartition(".")[2] not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(torch.bfloat16) if buffer.is_floating_point() else buffer.data
    model.save_pretrained(tmp_path / "source")
    out = passes.run(tmp_path / "source", tmp_path / "out", "nf4")["nf4"].folder
    saved = theirs(type(model), tmp_path / "source", tmp_path / "theirs", "nf4")
    check_same(out, saved)
    check_same_config(out, saved)


@pytest.mark.parametrize("make", [transformer, wan, unet, sd3])
def test_the_table_of_classes_is_diffusers_own(make: Any) -> None:
    model = make()
    assert row_of(type(model), model).items() <= _rows()[type(model).__name__].items()


def test_the_table_says_what_classes_keep_in_float32() -> None:
    """A newer diffusers that keeps others fails here: `python -m tests.diffusers_classes` takes them over."""
    classes = {name: getattr(diffusers, name, None) for name in _rows()}
    assert {name: row.get("float32", []) for name, row in _rows().items()} == {
        name: list(cls._keep_in_fp32_modules or ()) for name, cls in classes.items() if cls is not None
    }


@pytest.mark.parametrize(
    ("settings", "skip", "said"),
    [
        ([], None, []),
        (['rules=[{name: "proj_out.bias$", action: drop}]'], None, ["transformer: dropped"]),
        ([], ["x_embedder"], ["transformer: quantized, where the class keeps", "transformer: stored plain"]),
    ],
)
def test_diffusers_own_classes_are_asked(
    pipeline: Path, settings: list[str], skip: list[str] | None, said: list[str]
) -> None:
    made = passes.plan(pipeline, "nf4", settings=settings)
    target = made.targets["nf4"]
    configs = {f"{part}/": json.loads(target.made[f"{part}/config.json"]) for part in ("transformer", "text_encoder")}
    configs["transformer/"]["quantization_config"]["llm_int8_skip_modules"] = skip
    mine = [d for d in target.decisions if d.tensor.name.startswith(tuple(configs))]
    answer = answer_of(question_of("diffusers", configs, mine, ()))
    assert not answer.unanswered
    assert "FluxTransformer2DModel; transformers" in answer.by
    assert [finding.what.partition(":")[0] for finding in answer.faults] == ["transformer"] * min(1, len(said))
    assert all(any(f.what.startswith(each) for each in said) for f in answer.faults)


def test_a_class_that_diffusers_does_not_have_is_no_answer(pipeline: Path) -> None:
    answer = answer_of(question_of("diffusers", {"": {"_class_name": "NextYearsTransformer2DModel"}}, (), ()))
    assert "has no class 'NextYearsTransformer2DModel' of its own" in answer.unanswered
