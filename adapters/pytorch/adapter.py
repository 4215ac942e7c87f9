"""The adapter for MoE layers written by hand: blocks are read, and their forwards stood in for."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lynx.adapter import Discovery, FoundLayer, Installation
from lynx.adapters.pytorch.anatomy import LOOKED_FOR, expert_bytes, find_blocks, is_authored
from lynx.adapters.pytorch.answers import BlockExperts
from lynx.adapters.pytorch.authored import AuthoredReading, read_authored
from lynx.adapters.pytorch.block import BlockForward, Shared, standing_in
from lynx.adapters.pytorch.execution import ExpertModules, SlicedExperts, StackedExperts
from lynx.adapters.pytorch.reader import read_block
from lynx.adapters.pytorch.reading import BlockReading, Unreadable
from lynx.adapters.pytorch.verify import hold_against
from lynx.config import Config
from lynx.errors import AttachError, ConfigError
from lynx.kernels import choose_backend
from lynx.layers import MoESpec
from lynx.routing import Phase, WeightRule
from lynx.selection import LayerSelection
from lynx.strategy import LayerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayer(FoundLayer):
    """A layer with what this adapter needs to stand in for it; ``router`` is the whole block.

    Attributes:
        reading: What is known of the block; None for one that is refused.
    """

    reading: BlockReading | AuthoredReading | None = None


class PytorchAdapter:
    """Takes models whose MoE blocks are written by hand, by what they are made of."""

    name = "pytorch"

    def recognises(self, model: Any) -> bool:
        """Say whether some module looks like an MoE block."""
        return isinstance(model, nn.Module) and bool(find_blocks(model, MoESpec()))

    def discover(self, model: nn.Module) -> Discovery:
        """Find and read all blocks by structure."""
        return self.discover_as(model, MoESpec())

    def discover_as(self, model: nn.Module, spec: MoESpec) -> Discovery:
        """Find and read the blocks that a spec describes."""
        blocks = find_blocks(model, spec)
        layers = tuple(_read(path, block, spec, index, len(blocks)) for index, (path, block) in enumerate(blocks))
        kinds = {type(layer.reading.experts) for layer in layers if isinstance(layer.reading, BlockReading)}
        words = "Lynx, from stacked weights" if kinds & {StackedExperts, SlicedExperts} else "the model's own modules"
        return Discovery(self, layers, LOOKED_FOR, words)

    def experts_of(self, model: nn.Module, layer: FoundLayer) -> BlockExperts:
        """Return the experts of a block by themselves, as :class:`lynx.adapter.HoldsExperts` says."""
        reading = cast("BlockLayer", layer).reading
        assert reading is not None  # a layer that is refused is not chosen
        anatomy = reading.anatomy if isinstance(reading, BlockReading) else None
        return BlockExperts(layer.router, reading, anatomy)

    def prepare(
        self,
        model: nn.Module,
        config: Config,
        selections: Sequence[tuple[FoundLayer, LayerSelection]],
        replaced: Installation | None,
    ) -> PytorchInstallation:
        """Check everything that can stand against attaching."""
        pairs = cast("Sequence[tuple[BlockLayer, LayerSelection]]", selections)
        for layer, _ in pairs:
            stands = standing_in(layer.router)
            own = isinstance(replaced, PytorchInstallation) and stands is not None and stands.shared is replaced.shared
            if stands is not None and not own:
                raise AttachError(
                    f"block {layer.info.name!r} is attached through another module; "
                    "detach that one first (lynx.detach)."
                )
        stacked = [layer for layer, _ in pairs if _is_stacked(layer)]
        if config.experts == "lynx" and len(stacked) < len(pairs):
            raise ConfigError("experts='lynx' runs stacked weights; these experts are modules: use experts='model'.")
        if config.experts == "model" and stacked:
            raise ConfigError("experts='model' needs expert modules; these weights are stacked: use experts='lynx'.")
        try:
            backends = sorted({_backend(layer) for layer in stacked})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return PytorchInstallation(pairs, config.max_decode_q, "lynx" if stacked else "model", ", ".join(backends))


class PytorchInstallation:
    """What stands in the blocks of one model.

    Attributes:
        experts: Which implementation runs the experts, ``model`` or ``lynx``.
        experts_backend: What Lynx's runs on; empty for the model's own.
        shared: What the blocks share.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[BlockLayer, LayerSelection]],
        max_decode_q: int,
        experts: str,
        experts_backend: str,
    ) -> None:
        self.experts = experts
        self.experts_backend = experts_backend
        self.shared = Shared(max_decode_q)
        self._planned: Sequence[tuple[BlockLayer, LayerSelection]] = pairs
        self._blocks: list[weakref.ref[nn.Module]] = []  # nothing here may keep the model alive

    def start(self) -> None:
        """Stand in for all blocks, or none."""
        planned, self._planned = self._planned, ()
        torch.compiler.reset()  # code that was compiled before knows nothing of this
        try:
            for layer, selection in planned:
                assert layer.reading is not None
                block = layer.router
                selection.place(_device(block))
                acts_on_prefill = Phase.PREFILL not in selection.exact_phases
                block.forward = BlockForward(block, layer.reading, selection, self.shared, acts_on_prefill).forward
                self._blocks.append(weakref.ref(block))
        except BaseException:
            self.remove()
            raise

    @property
    def paused(self) -> bool:
        """Whether the blocks' own forwards run."""
        return self.shared.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self.shared.paused = value

    def remove(self) -> None:
        """Give all blocks their forwards back; what somebody else has wrapped since lets the block's own through."""
        self.shared.paused = True
        while self._blocks:
            block = self._blocks.pop()()
            stands = None if block is None else standing_in(block)
            if block is not None and stands is not None and stands.shared is self.shared:
                del block.forward
        torch.compiler.reset()

    def teacher_forced(self, prompt_columns: int) -> AbstractContextManager[None]:
        """Refuse: columns of a whole-sequence forward are known for models of transformers only."""
        raise AttachError("teacher forcing needs a model of transformers; give hand-written ones their steps.")

    def priorities(self, values: tuple[float | None, ...], copies: int) -> AbstractContextManager[None]:
        """Refuse: whose rows a hand-written model calls with is said by its own steps."""
        raise AttachError("a hand-written model takes no priorities; leave rows exact by lynx.step(exact=...).")


def _read(path: str, block: nn.Module, spec: MoESpec, index: int, count: int) -> BlockLayer:
    try:
        if "forward" in vars(block) and standing_in(block) is None:
            raise Unreadable(0, "its forward is overridden in the instance")
        if is_authored(block):
            said = read_authored(block)
            notes = ("route() and run() of its author", *hold_against(block, said, said.hidden_size))
            info = LayerInfo(path, index, said.num_experts, said.top_k, said.rule, 0, count)
            return BlockLayer(info, block, notes=notes, reading=said)
        found = read_block(block, spec)
        notes = (*found.described(), *hold_against(block, found, found.anatomy.hidden_size))
    except Unreadable as error:
        info = LayerInfo(path, index, 0, 0, WeightRule(repick=False), 0, count)
        return BlockLayer(info, block, refused=f"{type(block).__name__}: {error}")
    size = expert_bytes(block, found.anatomy)
    info = LayerInfo(path, index, found.anatomy.num_experts, found.router.top_k, found.router.rule, size, count)
    return BlockLayer(info, block, notes=notes, reading=found)


def _is_stacked(layer: BlockLayer) -> bool:
    return isinstance(layer.reading, BlockReading) and not isinstance(layer.reading.experts, ExpertModules)


def _backend(layer: BlockLayer) -> str:
    """Name what stacked experts run on at decode; weights that are offloaded say nothing."""
    experts = layer.reading.experts if isinstance(layer.reading, BlockReading) else None
    if not isinstance(experts, StackedExperts):
        return "loop"
    with torch.no_grad():
        return choose_backend(experts.weights(layer.router)).backend


def _device(module: nn.Module) -> torch.device:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
