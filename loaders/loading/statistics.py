"""The statistics of a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loaders.stats import CompressionStats, LayerStats, LoadStats


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of a load. `compression` is None if nothing was quantized; `notes` are remarks for the user.

    With `from_cache`, quantized and cast tensors came from the cache on disk; `load` still counts the bytes of their
    source. `sizes` are `compression`, or where nothing was quantized the sizes of what was loaded; their figures are
    also this object's: `stats.compression_ratio`, `stats.original_size_mb`, `stats.layer_stats`, ...
    """

    load: LoadStats
    compression: CompressionStats | None = None
    from_cache: bool = False
    notes: tuple[str, ...] = ()
    sizes: CompressionStats = field(default_factory=CompressionStats)

    @property
    def total_parameters(self) -> int:
        """The number of weights in all tensors."""
        return self.sizes.parameters

    @property
    def original_size_mb(self) -> float:
        """The size in the source in megabytes (1e6 bytes)."""
        return self.sizes.original_size_mb

    @property
    def quantized_size_mb(self) -> float:
        """The size of what was loaded in megabytes, tensors that stay unquantized included."""
        return self.sizes.quantized_size_mb

    @property
    def compression_ratio(self) -> float:
        """How many times smaller it became; 1 for weights as they are stored."""
        return self.sizes.compression_ratio

    @property
    def layer_stats(self) -> Mapping[str, LayerStats]:
        """The quantized tensors by name: size, ratio and error of each."""
        return self.sizes.layer_stats

    @property
    def total_error(self) -> float:
        """The relative error over all quantized weights; `sizes.total_mse` is the mean squared one."""
        return self.sizes.total_error

    @property
    def mean_layer_error(self) -> float:
        """The mean of the tensors' relative errors; `sizes.mean_layer_mse` is of the mean squared ones."""
        return self.sizes.mean_layer_error

    @property
    def max_layer_error(self) -> float:
        """The largest relative error of a tensor; `sizes.max_layer_mse` is of the mean squared ones."""
        return self.sizes.max_layer_error

    def __str__(self) -> str:
        lines = [str(self.load), *([] if self.compression is None else [repr(self.compression)]), *self.notes]
        return "\n".join([*lines, *(["from the cache"] if self.from_cache else [])])
