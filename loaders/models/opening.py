"""Opening the checkpoint of a model to be loaded: what the settings say of it, of ranks and devices is checked here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec

from loaders.backends import best
from loaders.backends.devices import torch_device
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadSpec
from loaders.models.config import APPLES, Backend, LoadingStrategy, ModelLoadingConfig
from loaders.models.hub_cache import place_of_model
from loaders.models.process_rank import ProcessRank, rank_of
from loaders.tensors.block_expansion import expand_checkpoint, expansion_of

log = logging.getLogger("weightmill")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A checkpoint to load, the settings, and where. No weight is read yet.

    added: the numbers of blocks that a block expansion has added.
    """

    checkpoint: Checkpoint
    config: ModelLoadingConfig
    rank: ProcessRank
    device: str
    is_mlx: bool
    added: frozenset[int] = frozenset()

    def say(self, message: str, *values: object) -> None:
        """Log a step, if that is asked for, on the first rank."""
        if self.config.verbose and self.rank.is_first:
            log.info(message, *values)


def open_model(config: ModelLoadingConfig) -> OpenedModel:
    """Open the checkpoint that a config names, and check that it can be loaded as the config says.

    Raises:
        BadSpec, BadCheckpoint: as `load_model_and_tokenizer`.
    """
    if config.model_name is None:
        raise BadSpec("model_name: expected a folder, a URL or a name of the Hub, found none")
    rank, container = rank_of(config), "auto" if config.use_safetensors else "pytorch"
    where = config.model_name if config.llama_pro_path is None else config.llama_pro_path
    checkpoint, added = open_checkpoint(place_of_model(where), container, key="name_or_path"), frozenset[int]()
    if config.llama_pro_path is not None:
        base = open_checkpoint(place_of_model(config.model_name), container, key="name_or_path")
        check_expanded(base, checkpoint)
        added = added_blocks(base, checkpoint.config["num_hidden_layers"] - base.config["num_hidden_layers"])
    elif config.llama_pro_blocks:
        added = added_blocks(checkpoint, config.llama_pro_blocks)
    is_mlx = _is_mlx(config, checkpoint)
    device = "cpu"
    if not is_mlx:
        # Where MLX alone has a GPU, torch has the CPU.
        wanted = config.device or (best() if config.backend is Backend.AUTO else str(config.backend))
        device = "cpu" if wanted == "mlx" else wanted
        for name in (device, *config.limits):
            torch_device(str(name))
    found = OpenedModel(
        checkpoint=checkpoint, config=config, rank=rank, device=device, is_mlx=is_mlx, added=added
    )  # fmt: skip
    found.say("%s: %.3f GB of %s, for %s", checkpoint.address, checkpoint.size / 1e9, checkpoint.container,
              "MLX" if is_mlx else device)  # fmt: skip
    return found


def added_blocks(base: Checkpoint, count: int) -> frozenset[int]:
    """Return the numbers that the new blocks have in a block expansion by so many.

    Raises:
        BadSpec: the model is not expanded by as many.
    """
    origins = expansion_of(base, count).origins
    return frozenset(number for number, (_, is_new) in enumerate(origins) if is_new)


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
    """Whether mlx-lm's modules are what is loaded; BadSpec if MLX's schemes are asked for where it does not run."""
    if config.scheme is not None and config.scheme.engine == "mlx":
        if config.backend not in APPLES:
            raise BadSpec("quantize: MLX's schemes run on MLX: give backend='mlx'")
        return True
    if config.backend is not Backend.AUTO:
        return config.backend is Backend.MLX
    # Where there is no MLX, or a strategy that it does not have, its weights are decoded for torch.
    is_its_own = isinstance(checkpoint.config.get("quantization"), dict) and not config.decode
    has_strategy = config.loading_strategy is not LoadingStrategy.STREAMING and config.max_memory is None
    return is_its_own and has_strategy and find_spec("mlx_lm") is not None
