"""A loader made from a config, which quantizes on the way and keeps statistics of all that it has loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from loaders.backends.devices import device_name
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.file_lists import Given, open_weights
from loaders.errors import BadCheckpoint, BadSpec
from loaders.loading.config import WeightLoaderConfig, create_aggressive_config
from loaders.loading.load import Weights, clear_cache, load_and_quantize
from loaders.loading.quantized_tensor import QuantizedTensor
from loaders.stats import CompressionStats


class CheckpointLoader:
    """Loads weights of any container as its config says: to ternary, where the config says no more.

    Other libraries call it WeightLoader, which here is the base of the strategies. `notes` are remarks on what was
    loaded last, such as tensors that took another type.
    """

    create_aggressive_config = staticmethod(create_aggressive_config)

    def __init__(self, config: WeightLoaderConfig | None = None) -> None:
        self.config = WeightLoaderConfig() if config is None else config
        self.notes: tuple[str, ...] = ()
        self._stats = CompressionStats()

    def load(
        self,
        file_path: Given,
        quantize: bool | str | None = None,
        layer_filter: str | Sequence[str] | None = None,
    ) -> Weights:
        """Load the weights of a file, a list of files, a folder or an address, whatever the container; by name.

        Those that are quantized are `QuantizedTensor`s, others torch tensors.

        quantize: in place of the config's for this load; True is the config's quantization, ternary by default.
        layer_filter: a part of a name, a pattern, or several; only tensors that match one of them are loaded.

        Raises:
            As `load_weights`; BadCheckpoint: a shape is not that of the header.
        """
        return self._loaded(open_weights(file_path), quantize, layer_filter, None)

    def load_safetensors(
        self,
        file_path: Given,
        quantize: bool | str | None = None,
        layer_filter: str | Sequence[str] | None = None,
    ) -> Weights:
        """Load the weights of safetensors files; as `load`.

        Raises:
            BadSpec: they are of another container.
        """
        return self._loaded(_of("safetensors", file_path), quantize, layer_filter, None)

    def load_pytorch(
        self,
        file_path: Given,
        quantize: bool | str | None = None,
        layer_filter: str | Sequence[str] | None = None,
        map_location: Any = "cpu",
    ) -> Weights:
        """Load the weights of PyTorch files, of which no code is run; as `load`.

        map_location: the device; "cpu" leaves it to the config.

        Raises:
            BadSpec: they are of another container.
        """
        device = device_name(map_location)
        return self._loaded(
            _of("pytorch", file_path), quantize, layer_filter, None if device in (None, "cpu") else device
        )

    def get_stats(self) -> CompressionStats:
        """Return sizes and errors of all that this loader has loaded, added up."""
        return self._stats

    def save_stats(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, atomically; `CompressionStats.load` reads them back.

        Raises:
            StorageError: the file cannot be written.
        """
        self._stats.save(path)

    def clear_cache(self) -> int:
        """Remove what is kept on disk in the config's cache; returns the bytes that were freed."""
        return clear_cache(self.config.cache_dir)

    def _loaded(self, checkpoint: Checkpoint, quantize: bool | str | None, layer_filter: Any, device: Any) -> Weights:
        weights, stats = load_and_quantize(checkpoint, self.config.request(quantize, layer_filter, device))
        if self.config.validate_shapes:
            check_shapes(checkpoint, weights)
        self.notes = stats.notes
        self._stats = self._stats + stats.sizes
        return weights


def _of(container: str, file_path: Given) -> Checkpoint:
    checkpoint = open_weights(file_path)
    if checkpoint.container != container:
        raise BadSpec(
            f"file_path: expected {container}, found {checkpoint.container} at {checkpoint.address}; load() takes any"
        )
    return checkpoint


def check_shapes(checkpoint: Checkpoint, weights: Weights) -> None:
    """Check that plain weights have the shapes that the headers tell, and the parts of quantized ones the sizes that
    their scheme stores. What was decoded on the way has a shape of its own.

    Raises:
        BadCheckpoint: some have not; all are listed.
    """
    told = {} if checkpoint.quantized_by is not None else {spec.name: spec.shape for spec in checkpoint.weights}
    wrong = []
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            sizes = {role: stored.size for role, stored in weight.stored.items() if not stored.is_bound}
            wrong += [
                f"{name}: {role} expected {size} bytes, found {weight.parts[role].nbytes}"
                for role, size in sizes.items()
                if weight.parts[role].nbytes != size
            ]
        elif tuple(weight.shape) != told.get(name, tuple(weight.shape)):
            wrong.append(f"{name}: expected {list(told[name])}, found {list(weight.shape)}")
    if wrong:
        raise BadCheckpoint("\n".join([f"{len(wrong)} weights are not as their headers tell:", *wrong]))
