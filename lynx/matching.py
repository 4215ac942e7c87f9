"""Hold a file of stand-ins against the model that it is to answer for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lynx.config import Config
from lynx.errors import ConfigError, UnsupportedModelError
from lynx.standins import LayerStandIns
from lynx.standins_file import StandInLayer, experts_hash, read_standins

if TYPE_CHECKING:
    from lynx.adapter import Adapter, FoundLayer, HoldsExperts, LayerExperts, TakesStandIns
    from lynx.strategy import LayerInfo


def standins_for(
    adapter: Adapter, model: Any, layers: Sequence[FoundLayer], config: Config
) -> list[LayerStandIns | None]:
    """Read the stand-ins of layers, None for each where a configuration asks for none.

    Raises:
        ConfigError: The file is not there, lacks a layer, or was made for other experts; or the adapter cannot add
            what stand-ins answer.
        UnsupportedModelError: A layer's experts do not let anything be added to what they give.
    """
    asked = config.standins
    if asked is None or asked.mode == "re-pick":
        return [None] * len(layers)
    file = read_standins(asked.file)
    for layer in layers:
        refuse_one_slot(layer.info)
    found: list[LayerStandIns | None] = []
    for layer in layers:
        info, code = layer.info, _hash_of(adapter, model, layer)
        known = file.layers.get(info.index)
        if known is None:
            raise ConfigError(
                f"{str(asked.file)!r} has no stand-ins for layer {info.name!r} (number {info.index}); it has layers "
                f"{', '.join(map(str, sorted(file.layers)))}. Calibrate again, or leave the layer out (`layers`)."
            )
        _check(known, info.num_experts, code, str(asked.file))
        found.append(LayerStandIns(known, asked.mode, asked.rank))
    if not any(bool(each.known.any()) for each in found if each is not None):
        raise ConfigError(
            f"{str(asked.file)!r} holds no stand-in for any expert of these layers: it was made of too little text. "
            "Calibrate with more."
        )
    return found


def refuse_one_slot(layer: LayerInfo) -> None:
    """Raise :class:`lynx.UnsupportedModelError` where each token has one expert, which is never left out."""
    if layer.top_k == 1:
        raise UnsupportedModelError(
            f"layer {layer.name!r} gives each token one expert, which stays: stand-ins would answer for nothing."
        )


def experts_of(adapter: Adapter, model: Any, layer: FoundLayer) -> LayerExperts:
    """Ask an adapter for a layer's experts.

    Raises:
        ConfigError: The adapter does not know how to.
        UnsupportedModelError: They cannot be had from this layer.
    """
    if not hasattr(adapter, "experts_of"):
        raise ConfigError(f"stand-ins are not there for models of the {adapter.name} adapter; leave out `standins`.")
    return cast("HoldsExperts", adapter).experts_of(model, layer)


def _hash_of(adapter: Adapter, model: Any, layer: FoundLayer) -> str:
    if hasattr(adapter, "experts_hash"):
        return cast("TakesStandIns", adapter).experts_hash(model, layer)
    return experts_hash(experts_of(adapter, model, layer).tensors())


def _check(known: StandInLayer, num_experts: int, code: str, file: str) -> None:
    if known.num_experts != num_experts:
        raise ConfigError(
            f"{file!r} stands in for {known.num_experts} experts in layer {known.name!r}, this model has {num_experts}."
        )
    if code != known.experts:
        raise ConfigError(
            f"{file!r} was made for other experts than those of this model (layer {known.name!r}): their weights "
            "differ. Calibrate with this model: `lynx calibrate MODEL --data FILE -o standins.safetensors`."
        )
