"""A strategy for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from lynx.config import AnyStrategy
from lynx.errors import ConfigError
from lynx.strategy import BaseStrategy, BoundStrategy, LayerInfo, Wrapper


class PerLayer(Wrapper):
    """Give single MoE layers a strategy of their own, all others a default.

    Source: layers differ in how much pruning they bear (LExI, Alloc-MoE); the wrapper is this library's.
    """

    name: Literal["per-layer"] = "per-layer"
    default: AnyStrategy = Field(description="strategy of every layer that is not named")
    strategies: dict[int, AnyStrategy] = Field(description="strategy by index among the model's MoE layers, from 0")

    @model_validator(mode="after")
    def _names_layers(self) -> Self:
        if not self.strategies:
            raise ValueError("`strategies` names no layer")
        if min(self.strategies) < 0:
            raise ValueError("layers are counted from 0")
        self.refuse_phased_children()
        return self

    @classmethod
    def example(cls) -> Self:
        """Return the setting used in examples."""
        return cls.build({"default": {"name": "batch-union", "top": 2}, "strategies": {0: "exact"}})

    def children(self) -> Sequence[BaseStrategy]:
        """Return the default and every layer's own."""
        return [self.default, *self.strategies.values()]

    def bind(self, layer: LayerInfo) -> BoundStrategy:
        """Bind the layer's own strategy; nothing of the wrapper is left in the hot path."""
        beyond = [index for index in self.strategies if index >= layer.num_layers]
        if beyond:
            raise ConfigError(f"per-layer: no MoE layer {beyond[0]}; the model has {layer.num_layers}, counted from 0.")
        return self.strategies.get(layer.index, self.default).bind(layer)
