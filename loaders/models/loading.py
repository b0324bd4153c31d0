"""Loading a model and its tokenizer from a folder or the Hub's cache, whether it is an original or a quantized one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loaders.architectures.family import load_dtype
from loaders.backends import best
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.models.config import LoadingStrategy, ModelLoadingConfig
from loaders.models.device_map import device_map_of, hold_to, place_of
from loaders.models.foreign import generation_config_from, model_from, tokenizer_from
from loaders.models.hub_cache import place_of_model
from loaders.models.quantized_modules import module_maker, runs_here, unusable_4bit
from loaders.models.sharding import is_alone, is_first
from loaders.models.skeleton import BUILDING, Skeleton, open_weights, set_parameter, skeleton_of
from loaders.models.small_files import small_files
from loaders.models.streaming import stream
from loaders.models.weights import ModelWeights, Parts
from loaders.quantization.scheme import Scheme
from loaders.rules.decide import decide
from loaders.tensors.block_expansion import expand_checkpoint, expand_sources
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import check_decodable
from loaders.tensors.sources import Sources, tensors_of

Models = tuple[Any, Any]


def load_model_and_tokenizer(
    name_or_path: str | Path, backend: str = "auto", config: ModelLoadingConfig | None = None, **settings: Any
) -> Models:
    """Load a causal language model, ready to run, and its tokenizer (None if the folder has none).

    `name_or_path`: a folder; the URL of a store (s3://bucket/model, hf://owner/name), from which weights are fetched
    into memory; or a Hugging Face Hub name whose files are in the local cache, for which nothing is downloaded.
    `settings`: fields of ModelLoadingConfig, which replace those of `config`.

    Quantized weights stay quantized if their engine's modules are made here (bitsandbytes, hqq, MLX), or if
    transformers loads them (compressed-tensors, fp8, ...); decode=True decodes them. With quantize=SCHEME, plain
    weights are encoded tensor by tensor into the engine's modules: the model is never in memory in full precision.

    Raises:
        BadSpec: the request cannot be done for this model or on this machine.
        BadCheckpoint: weights are damaged, missing, unexpected, or of other shapes than the model's; all are listed.
    """
    if backend != "auto":
        settings["backend"] = backend
    if config is not None and not isinstance(config, ModelLoadingConfig):
        raise BadSpec(f"config: expected a ModelLoadingConfig, found {config!r:.80}; settings go in as arguments")
    config = replace(config or ModelLoadingConfig(), **settings)
    where = place_of_model(config.llama_pro_path if config.llama_pro_path is not None else name_or_path)
    checkpoint = open_checkpoint(where, key="name_or_path")
    if config.llama_pro_path is not None:
        check_expanded(open_checkpoint(place_of_model(name_or_path), key="name_or_path"), checkpoint)
    if _is_mlx(config, checkpoint):
        from loaders.models import mlx_modules

        return mlx_modules.load(checkpoint, config)
    return _model(checkpoint, config), tokenizer_of(checkpoint)


def load_as(auto: Any, checkpoint: Checkpoint, device: str, *, dtype: str, decode: bool) -> Any:
    """Load a checkpoint by one of transformers' Auto classes, of whatever kind, without a tokenizer.

    Raises:
        BadSpec, BadCheckpoint: as `load_model_and_tokenizer`.
    """
    config = ModelLoadingConfig(backend=device, decode=decode, dtype=dtype)
    sources = sources_of(checkpoint, config)
    skeleton = skeleton_of(checkpoint, sources, dtype=dtype, auto=auto)
    schemes = schemes_of(checkpoint, sources, skeleton, config)
    check_usable(skeleton, schemes, lambda name: device)
    with open_weights(checkpoint, skeleton) as weights:
        fill_model(skeleton, weights, schemes, lambda name: device)
    return skeleton.model


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer in a checkpoint's folder; None if the folder has no tokenizer files."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if all(checkpoint.source.find(name) is None for name in files):
        return None
    with small_files(checkpoint) as folder:
        return tokenizer_from(folder)


def check_expanded(base: Checkpoint, expanded: Checkpoint) -> None:
    """Check that a checkpoint is a block expansion of another, by their configs.

    Raises:
        BadSpec: it is not an expansion.
    """
    old, new = (c.config.get("num_hidden_layers") for c in (base, expanded))
    added = new - old if isinstance(old, int) and isinstance(new, int) else 0
    if added < 1:
        raise BadSpec(f"llama_pro_path: expected more than the {old} blocks of {base.address}, found {new}")
    wanted = expand_checkpoint(base, added).config
    keys = ("model_type", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "layer_types")
    differing = [key for key in keys if wanted.get(key) != expanded.config.get(key)]
    if differing:
        raise BadSpec(
            f"llama_pro_path: {expanded.address} is no expansion of {base.address}: {differing[0]} is"
            f" {expanded.config.get(differing[0])!r}, expected {wanted.get(differing[0])!r}"
        )


def _is_mlx(config: ModelLoadingConfig, checkpoint: Checkpoint) -> bool:
    block = checkpoint.config.get("quantization")
    is_mlx_scheme = config.scheme is not None and config.scheme.engine == "mlx"
    if config.backend != "mlx" and is_mlx_scheme:
        raise BadSpec("quantize: MLX's schemes run on MLX: give backend='mlx'")
    return config.backend == "mlx" or (config.backend == "auto" and isinstance(block, dict) and not config.decode)


def _model(checkpoint: Checkpoint, config: ModelLoadingConfig) -> Any:
    device = best() if config.backend == "auto" else config.backend
    device = "cpu" if device == "mlx" else device
    sources = sources_of(checkpoint, config)
    if needs_transformers(sources, config):
        return from_transformers(checkpoint, config, device)
    if config.llama_pro_blocks:
        sources = expand_sources(checkpoint, sources, config.llama_pro_blocks)
        checkpoint = expand_checkpoint(checkpoint, config.llama_pro_blocks)
    skeleton = skeleton_of(
        checkpoint, sources, dtype=place_of(device).dtype(config.dtype, checkpoint), attention=config.attention,
        ignore_unexpected=config.ignore_unexpected,
    )  # fmt: skip
    model = skeleton.model
    set_generation(model, checkpoint)
    if config.strategy is LoadingStrategy.STREAMING:
        stream(model, open_weights(checkpoint, skeleton, workers=config.workers), device, config.memory_budget_mb)
        return model
    if config.strategy is LoadingStrategy.LOW_MEMORY and not is_alone():
        if config.quantize is not None:
            raise BadSpec(
                "quantize: of several processes, strategy=low_memory fills the first one's model alone, and quantized"
                " modules can be neither scattered nor broadcast to the others; give strategy=full in each"
            )
        if not is_first():
            return model
        device = "cpu"
    schemes = schemes_of(checkpoint, sources, skeleton, config)
    places = device_map_of(skeleton, schemes, config.limits, device)
    check_usable(skeleton, schemes, places.device_of)
    with open_weights(checkpoint, skeleton, workers=config.workers, use_cache=config.use_cache) as weights:
        fill_model(skeleton, weights, schemes, places.device_of)
    return hold_to(model, places)


def sources_of(checkpoint: Checkpoint, config: ModelLoadingConfig) -> Sources:
    """Return the logical tensors, under transformers' names.

    Raises:
        BadSpec: the checkpoint is quantized by a method that is not decoded here, or `quantize` is given for one that
            is quantized already.
    """
    if checkpoint.quantized_by is not None:
        check_decodable(checkpoint)
        if config.quantize is not None:
            raise BadSpec(
                f"quantize: {checkpoint.address} is quantized already; leave quantize out to load it as it is, or run a"
                " job with this source"
            )
    return tensors_of(checkpoint, decode=True)


def needs_transformers(sources: Sources, config: ModelLoadingConfig) -> bool:
    """Whether some quantized tensors have modules in transformers only."""
    if config.decode or config.strategy is not LoadingStrategy.FULL or config.llama_pro_blocks:
        return False
    decoders = {r.decode for r in sources.tensors if r.decode is not None and not _is_ggml(r)}
    return any(not runs_here(decoder) for decoder in decoders)


def _is_ggml(tensor: LogicalTensor) -> bool:
    """Whether a tensor comes from a GGUF. Its blocks have no modules in torch, so they are always decoded."""
    return any(spec.file.endswith(".gguf") for _, spec in tensor.stored)


def from_transformers(checkpoint: Checkpoint, config: ModelLoadingConfig, device: str) -> Any:
    """Load with from_pretrained, for quantized modules of transformers itself or of compressed-tensors."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if config.attention is None else {"attn_implementation": config.attention}
    if config.max_memory is not None:
        options["max_memory"] = config.limits
    auto: Any = AutoModelForCausalLM
    with BUILDING:
        return model_from(
            auto, checkpoint.folder(READS_FOLDERS), dtype=config.dtype or "auto", device_map={"": device}, **options
        ).eval()


def schemes_of(
    checkpoint: Checkpoint, sources: Sources, skeleton: Skeleton, config: ModelLoadingConfig
) -> dict[str, tuple[Scheme, bool]]:
    """Return, for each parameter that is held quantized, its scheme and whether it still has to be encoded.

    Raises:
        BadSpec: no modules are made here for the scheme, or it cannot take one of the tensors.
    """
    scheme = config.scheme
    if scheme is None:
        if config.decode or config.strategy is not LoadingStrategy.FULL:
            return {}
        return {
            name: (parts[0].decode, False)  # type: ignore[misc]
            for name, parts in skeleton.parameters.items()
            if parts[0].decode is not None and runs_here(parts[0].decode) and _is_linear(skeleton.model, name)
        }
    module_maker(scheme)
    chosen = {d.tensor.name for d in decide(sources.tensors, scheme, ()) if d.action == "quantize"}
    return {
        name: (scheme, True)
        for name, parts in skeleton.parameters.items()
        if len(parts) == 1 and parts[0].name in chosen and _is_linear(skeleton.model, name)
    }


def check_usable(skeleton: Skeleton, schemes: dict[str, tuple[Scheme, bool]], device_of: Callable[[str], str]) -> None:
    """Check that the engine's modules will run on their devices.

    Raises:
        BadSpec: bitsandbytes cannot compute with one of the matrices on its device.
    """
    stopping = unusable_4bit(
        (skeleton.parameters[name][0].spec, scheme, str(device_of(name))) for name, (scheme, _) in schemes.items()
    )
    if stopping is None:
        return
    is_new = any(is_new for _, is_new in schemes.values())
    floats = "leave quantize out for float weights" if is_new else "decode=True loads float weights"
    raise BadSpec(
        f"{'quantize' if is_new else 'backend'}: {stopping}; use a GPU; or {floats}; or make an output by a job with a"
        " rule that keeps this tensor, and load that"
    )


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith(".weight")


def fill_model(
    skeleton: Skeleton, weights: ModelWeights, schemes: dict[str, tuple[Scheme, bool]], device_of: Any
) -> None:
    """Load the weights of every parameter, one after another.

    On the CPU, a parameter that its file holds in the model's own dtype and order is not copied: it is a private memory
    map, so that a write copies the page and never reaches the file.

    Raises:
        BadCheckpoint: a parameter got no weights.
    """
    model = skeleton.model
    expected = dict(model.state_dict(keep_vars=True))
    encodings = {
        name: encoding_of(weights, skeleton.parameters[name], s) for name, (s, is_new) in schemes.items() if is_new
    }
    plain = [name for name in skeleton.parameters if name not in schemes]
    weights.expect({**dict.fromkeys([*plain, *schemes]), **encodings})
    for name in skeleton.parameters:
        if name in schemes:
            continue
        place, wanted = device_of(name), expected[name].dtype
        tensor = weights.mapped(name, wanted) if str(place) == "cpu" else None
        if tensor is None:
            tensor = torch.empty(expected[name].shape, dtype=wanted, device=place)
            weights.fill(name, tensor)
        set_parameter(model, name, tensor)
    for name, original in skeleton.tied.items():
        set_parameter(model, name, model.get_parameter(original))
    for name, (scheme, is_new) in schemes.items():
        path = name.rpartition(".")[0]
        linear, [logical] = model.get_submodule(path), skeleton.parameters[name]
        stored = weights.encoded(encodings[name]) if is_new else weights.stored(logical)
        with BUILDING:
            made = module_maker(scheme)(
                scheme, logical.spec, stored, linear.bias, expected[name].dtype, str(device_of(name))
            )
        model.set_submodule(path, made.eval())
    for path, buffer in list(model.named_buffers()):
        if device_of(path) != "cpu":
            set_parameter(model, path, buffer.to(device_of(path)))
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise BadCheckpoint(f"{weights.checkpoint.address}: no weights came for {', '.join(left[:4])}")


def encoding_of(weights: ModelWeights, parts: Parts, scheme: Scheme) -> Encoding:
    """Return how a parameter is encoded: from the dtype that the config says, whatever the file has."""
    [logical], wanted = parts, load_dtype(weights.checkpoint.config)
    cast = None if wanted == logical.dtype else wanted
    return Encoding(tensor=logical, action="quantize", scheme=scheme, cast=cast)


def set_generation(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model the generation_config.json of its checkpoint, if there is one."""
    if checkpoint.source.find("generation_config.json") is not None:
        with small_files(checkpoint) as folder:
            model.generation_config = generation_config_from(folder)
