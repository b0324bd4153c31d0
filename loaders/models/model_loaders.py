"""Loaders of models as objects, to be extended: a strategy of one's own is a subclass with its own `load_model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from loaders.errors import BadSpec
from loaders.loading.recommend import Recommendation
from loaders.models.config import ModelLoadingConfig
from loaders.models.loading import model_of, tokenizer_for
from loaders.models.opening import OpenedModel, open_model
from loaders.models.recommended import config_of


class ModelLoader(ABC):
    """A loader of the model that a config names."""

    def __init__(self, config: ModelLoadingConfig | Recommendation) -> None:
        """Take the settings; files are opened when something is loaded.

        Raises:
            BadSpec: the settings are neither a ModelLoadingConfig nor a recommendation, or name no model.
        """
        self.config = config_of(config, None, {})
        if self.config.model_name is None:
            raise BadSpec("model_name: expected a folder, a URL or a name of the Hub, found none")

    @abstractmethod
    def load_model(self) -> Any:
        """Load the model, ready to run.

        Raises:
            BadSpec, BadCheckpoint: as `load_model_and_tokenizer`.
            NotImplementedError: a class of one's own calls this one, which loads nothing.
        """
        raise NotImplementedError(
            "ModelLoader.load_model loads nothing: extend StandardModelLoader or QuantizedModelLoader, whose"
            " super().load_model() returns a model"
        )

    def load_tokenizer(self) -> Any:
        """Load the tokenizer; None if the folder has none.

        Raises:
            BadSpec, BadCheckpoint: as `load_model_and_tokenizer`.
        """
        return tokenizer_for(self._opened)

    @cached_property
    def _opened(self) -> OpenedModel:
        return open_model(self.config)


class StandardModelLoader(ModelLoader):
    """A loader of models with their weights as the checkpoint has them."""

    def load_model(self) -> Any:
        """Load the model, ready to run.

        Raises:
            BadSpec, BadCheckpoint: as `load_model_and_tokenizer`; or the config has a quantization.
        """
        if self.config.quantization_config is not None:
            raise BadSpec("quantize: StandardModelLoader leaves weights as they are; use a QuantizedModelLoader")
        return model_of(self._opened)


class QuantizedModelLoader(ModelLoader):
    """A loader of models whose weights are quantized: while they are loaded, or by the checkpoint."""

    def load_model(self) -> Any:
        """Load the model, ready to run.

        Raises:
            BadSpec, BadCheckpoint: as `load_model_and_tokenizer`; or there is nothing quantized to load.
        """
        if self.config.quantization_config is None and self._opened.checkpoint.quantized_by is None:
            raise BadSpec(
                f"quantize: {self._opened.checkpoint.address} is not quantized; give a quantization_config, or use a"
                " StandardModelLoader"
            )
        return model_of(self._opened)


class ModelLoaderFactory:
    """The choice of a loader."""

    @staticmethod
    def create_loader(config: ModelLoadingConfig | Recommendation) -> ModelLoader:
        """Return the loader for a config, or for what `get_recommended_loader_config` gives.

        Raises:
            BadSpec: it is neither, or names no model.
        """
        made = config_of(config, None, {})
        return StandardModelLoader(made) if made.quantization_config is None else QuantizedModelLoader(made)
