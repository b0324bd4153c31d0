"""Loading a model and its tokenizer from a folder or the Hub's cache, whether it is an original or a quantized one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loaders.architectures.family import load_dtype
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.tokenizers.tokenizer_files import tokenizer_files
from loaders.loading.recommend import Recommendation
from loaders.models.config import LoadingStrategy, ModelLoadingConfig
from loaders.models.device_map import device_map_of, hold_to, place_of
from loaders.models.foreign import generation_config_from, model_from, tokenizer_from
from loaders.models.opening import OpenedModel, open_model
from loaders.models.quantized_modules import QuantizedWeight, module_maker, runs_here, unusable_4bit
from loaders.models.recommended import config_of
from loaders.models.saving import mark_quantized, refuse_to_save_streamed
from loaders.models.skeleton import BUILDING, Skeleton, open_weights, set_parameter, skeleton_of
from loaders.models.small_files import small_files, written
from loaders.models.streaming import stream
from loaders.models.weights import ModelWeights
from loaders.quantization.scheme import Scheme
from loaders.rules.decide import decide
from loaders.tensors.block_expansion import BLOCK, expand_checkpoint, expand_sources
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import check_decodable
from loaders.tensors.sources import Sources, tensors_of

Models = tuple[Any, Any]
log = logging.getLogger("weightmill")


def load_model_and_tokenizer(
    name_or_path: str | Path | None = None,
    backend: str = "auto",
    config: ModelLoadingConfig | Recommendation | None = None,
    **settings: Any,
) -> Models:
    """Load a causal language model, ready to run, and its tokenizer: the folder's or the GGUF's, None without one.

    `name_or_path`: a folder; the URL of a store (s3://bucket/model, hf://owner/name), from which weights are fetched
    into memory; or a Hugging Face Hub name whose files are in the local cache, for which nothing is downloaded. By
    default the config's `model_name`. `config`: a ModelLoadingConfig, or what `get_recommended_loader_config` gives.
    `settings`: fields of ModelLoadingConfig, which replace those of `config`.

    Quantized weights stay quantized if their engine's modules are made here (bitsandbytes, hqq, MLX), or if
    transformers loads them (compressed-tensors, fp8, ...), which STREAMING decodes; decode=True decodes all. With
    quantize=SCHEME, plain weights are encoded tensor by tensor into the engine's modules: the model is never in memory
    in full precision. `save_pretrained` writes bitsandbytes' modules as transformers loads them; of HQQ's and with
    STREAMING it is refused.

    Raises:
        BadSpec: the request cannot be done for this model or on this machine, or it is no causal language model.
        BadCheckpoint: weights are damaged, missing, unexpected, or of other shapes than the model's; all are listed.
    """
    if backend != "auto":
        settings["backend"] = backend
    opened = open_model(config_of(config, name_or_path, settings))
    return model_of(opened), tokenizer_for(opened)


def model_of(opened: OpenedModel) -> Any:
    """Load the model that was opened. Errors as `load_model_and_tokenizer`."""
    began = time.perf_counter()
    if opened.is_mlx:
        from loaders.models import mlx_modules

        model = mlx_modules.load(opened.checkpoint, opened.config)
    else:
        model = _of_transformers(opened)
    opened.say("loaded %s in %.1f s", type(model).__name__, time.perf_counter() - began)
    return model


def tokenizer_for(opened: OpenedModel) -> Any:
    """Load the tokenizer of what was opened; None if it has none."""
    if opened.is_mlx:
        from loaders.models import mlx_modules

        return mlx_modules.tokenizer_of(opened.checkpoint)
    return tokenizer_of(opened.checkpoint)


def load_as(auto: Any, checkpoint: Checkpoint, device: str, *, dtype: str, decode: bool) -> Any:
    """Load a checkpoint by one of transformers' Auto classes, of whatever kind, without a tokenizer.

    Raises:
        BadSpec, BadCheckpoint: as `load_model_and_tokenizer`.
    """
    config = ModelLoadingConfig(backend=device.partition(":")[0], decode=decode, dtype=dtype)
    sources = sources_of(checkpoint, config)
    skeleton = skeleton_of(checkpoint, sources, dtype=dtype, auto=auto)
    schemes = schemes_of(checkpoint, sources, skeleton, config)
    check_usable(skeleton, schemes, lambda name: device)
    with open_weights(checkpoint, skeleton) as weights:
        fill_model(skeleton, weights, schemes, lambda name: device)
    return skeleton.model


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint's folder, or of a GGUF; None without one, for a GGUF with a warning."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if any(checkpoint.source.find(name) is not None for name in files):
        with small_files(checkpoint) as folder:
            return tokenizer_from(folder)
    if checkpoint.container != "gguf":
        return None
    made = tokenizer_files(checkpoint)
    if not made:
        log.warning(
            "%s: the tokenizer is None: the GGUF's is none that is made into tokenizer.json here; load the original"
            " model's by transformers' AutoTokenizer, or put its files beside the GGUF",
            checkpoint.address,
        )
        return None
    with written(made.items()) as folder:
        return tokenizer_from(folder)


def _of_transformers(opened: OpenedModel) -> Any:
    checkpoint, config, device = opened.checkpoint, opened.config, opened.device
    is_shared = opened.rank.shares(config)
    if is_shared or config.offload_to_cpu:
        device = "cpu"
    sources = sources_of(checkpoint, config)
    if not is_shared and checkpoint.quantized_by != "mlx" and needs_transformers(sources, config):
        opened.say("loading modules that transformers makes itself, by from_pretrained")
        return _trained(from_transformers(checkpoint, config, device), opened.added)
    if config.llama_pro_blocks:
        sources = expand_sources(checkpoint, sources, config.llama_pro_blocks)
        checkpoint = expand_checkpoint(checkpoint, config.llama_pro_blocks)
    skeleton = skeleton_of(
        checkpoint, sources, dtype=place_of(opened.device).dtype(config.dtype, checkpoint), attention=config.attention,
        ignore_unexpected=config.ignore_unexpected,
    )  # fmt: skip
    model = skeleton.model
    set_generation(model, checkpoint)
    schemes = schemes_of(checkpoint, sources, skeleton, config, opened.added)
    held = quantized_weights(skeleton, checkpoint, schemes, config.compute_dtype)
    opened.say("%s of %d tensors, %d of them quantized%s; strategy %s", type(model).__name__, len(skeleton.parameters),
               len(held), "" if config.scheme is None else f" to {config.quantize}", config.strategy)  # fmt: skip
    marks = {name: each.scheme for name, each in held.items()}
    computes_in = next((each.dtype for each in held.values()), None)
    mark_quantized(model, checkpoint, marks, computes_in, trains_blocks=bool(opened.added))
    # On every rank, so that none waits for the first one's weights where that refuses them.
    places = device_map_of(skeleton, held, config.limits, device)
    check_usable(skeleton, schemes, places.device_of)
    if is_shared and not opened.rank.is_first:
        _set_meta_modules(skeleton, held)
        return _trained(model, opened.added)
    streams = config.strategy is LoadingStrategy.STREAMING
    use_cache = config.use_cache or (streams and config.scheme is not None)
    weights = open_weights(checkpoint, skeleton, workers=config.workers, use_cache=use_cache)
    if streams:
        with closed_on_error(weights):
            streamer = stream(model, weights, device, config.memory_budget_mb, held)
            opened.say("streaming groups of up to %.1f MB", streamer.largest_bytes / 1e6)
            new = [each.encoding for each in held.values() if each.encoding is not None]
            if new:
                made = weights.keep_encoded(new)
                opened.say("%d weights were encoded into the cache, %d were there", made, len(new) - made)
        refuse_to_save_streamed(model)
        return model
    with weights:
        fill_model(skeleton, weights, schemes, places.device_of, config.compute_dtype)
    return hold_to(_trained(model, opened.added), places)


@contextmanager
def closed_on_error(weights: ModelWeights) -> Iterator[None]:
    """Close the weights if the block fails; otherwise they stay open for the model that streams them."""
    try:
        yield
    except BaseException:
        weights.close()
        raise


def _trained(model: Any, added: frozenset[int]) -> Any:
    """Leave gradients to the blocks that a block expansion has added, if there are any, as LLaMA Pro trains them."""
    for name, parameter in model.named_parameters() if added else ():
        match = BLOCK.match(name)
        parameter.requires_grad_(match is not None and int(match["number"]) in added and parameter.is_floating_point())
    return model


def _set_meta_modules(skeleton: Skeleton, held: Mapping[str, QuantizedWeight]) -> None:
    """Put the engines' modules into a skeleton, on meta: what the first rank has, without values."""
    for name, each in held.items():
        path = name.rpartition(".")[0]
        skeleton.model.set_submodule(path, each.on_meta(skeleton.model.get_submodule(path).bias))


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
    """Whether some quantized tensors have modules in transformers only. STREAMING decodes them."""
    if config.decode or config.strategy is LoadingStrategy.STREAMING or config.llama_pro_blocks:
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
    dtype = place_of(device).dtype(config.dtype, checkpoint)
    with BUILDING:
        return model_from(
            auto, checkpoint.folder(READS_FOLDERS), dtype=dtype or "auto", device_map={"": device}, **options
        ).eval()


def schemes_of(
    checkpoint: Checkpoint,
    sources: Sources,
    skeleton: Skeleton,
    config: ModelLoadingConfig,
    added: frozenset[int] = frozenset(),
) -> dict[str, tuple[Scheme, bool]]:
    """Return, for each parameter that is held quantized, its scheme and whether it still has to be encoded.

    `added`: numbers of blocks that stay plain, as they are to be trained.

    Raises:
        BadSpec: no modules are made here for the scheme, or it cannot take one of the tensors.
    """
    scheme = config.scheme

    def takes_module(name: str) -> bool:
        match = BLOCK.match(name)
        is_added = match is not None and int(match["number"]) in added
        return not is_added and _is_linear(skeleton.model, name)

    if scheme is None:
        if config.decode:
            return {}
        return {
            name: (parts[0].decode, False)  # type: ignore[misc]
            for name, parts in skeleton.parameters.items()
            if parts[0].decode is not None and runs_here(parts[0].decode) and takes_module(name)
        }
    module_maker(scheme)
    chosen = {d.tensor.name for d in decide(sources.tensors, scheme, ()) if d.action == "quantize"}
    return {
        name: (scheme, True)
        for name, parts in skeleton.parameters.items()
        if len(parts) == 1 and parts[0].name in chosen and takes_module(name)
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


def quantized_weights(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    schemes: Mapping[str, tuple[Scheme, bool]],
    compute_dtype: str | None = None,
) -> dict[str, QuantizedWeight]:
    """Return what makes the module of each weight that is held quantized, by its name; `schemes` as of `schemes_of`."""
    made = {}
    for name, (scheme, is_new) in schemes.items():
        [tensor] = skeleton.parameters[name]
        encoding = encoding_of(checkpoint, tensor, scheme) if is_new else None
        dtype = skeleton.model.get_parameter(name).dtype if compute_dtype is None else getattr(torch, compute_dtype)
        made[name] = QuantizedWeight(scheme, tensor, encoding, dtype)
    return made


def encoding_of(checkpoint: Checkpoint, tensor: LogicalTensor, scheme: Scheme) -> Encoding:
    """Return how a weight is encoded: from the dtype that the config says, whatever the file has."""
    wanted = load_dtype(checkpoint.config)
    return Encoding(tensor=tensor, action="quantize", scheme=scheme, cast=None if wanted == tensor.dtype else wanted)


def fill_model(
    skeleton: Skeleton,
    weights: ModelWeights,
    schemes: dict[str, tuple[Scheme, bool]],
    device_of: Callable[[str], str],
    compute_dtype: str | None = None,
) -> None:
    """Load the weights of every parameter, one after another.

    On the CPU, a parameter that its file holds in the model's own dtype and order is not copied: it is a private memory
    map, so that a write copies the page and never reaches the file.

    Raises:
        BadCheckpoint: a parameter got no weights.
    """
    model = skeleton.model
    expected = dict(model.state_dict(keep_vars=True))
    held = quantized_weights(skeleton, weights.checkpoint, schemes, compute_dtype)
    plain = [name for name in skeleton.parameters if name not in held]
    weights.expect({**dict.fromkeys(plain), **{name: each.encoding for name, each in held.items()}})
    for name in plain:
        place, wanted = device_of(name), expected[name].dtype
        tensor = weights.mapped(name, wanted) if str(place) == "cpu" else None
        if tensor is None:
            tensor = torch.empty(expected[name].shape, dtype=wanted, device=place)
            weights.fill(name, tensor)
        set_parameter(model, name, tensor)
    for name, original in skeleton.tied.items():
        set_parameter(model, name, model.get_parameter(original))
    for name, each in held.items():
        path = name.rpartition(".")[0]
        model.set_submodule(path, each.module(weights, model.get_submodule(path).bias, str(device_of(name))))
    for path, buffer in list(model.named_buffers()):
        if device_of(path) != "cpu":
            set_parameter(model, path, buffer.to(device_of(path)))
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise BadCheckpoint(f"{weights.checkpoint.address}: no weights came for {', '.join(left[:4])}")


def set_generation(model: Any, checkpoint: Checkpoint) -> None:
    """Give a model the generation_config.json of its checkpoint, if there is one."""
    if checkpoint.source.find("generation_config.json") is not None:
        with small_files(checkpoint) as folder:
            model.generation_config = generation_config_from(folder)
