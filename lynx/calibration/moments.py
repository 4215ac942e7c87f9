"""What is kept of the inputs and outputs of a layer's experts: weighted moments, of one size for any text.

Symbols: N slots, E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Sums over the slots of each expert, each slot counted by its weight. Inputs are taken from a fixed origin.

    Attributes:
        origin: ``(H,)``, what is taken off every input first: without it, sums of squares of inputs that lie far from
            0 would swamp how they vary.
        count: ``(E,)`` slots with a weight above 0.
        weight: ``(E,)`` sum of weights.
        squared: ``(E,)`` sum of squared weights.
        inputs: ``(E, H)`` sum of inputs.
        outputs: ``(E, H)`` sum of outputs.
        input_input: ``(E, H, H)`` sum of input times input.
        input_output: ``(E, H, H)`` sum of input times output.
        output_output: ``(E,)`` sum of squared outputs.
    """

    origin: Tensor
    count: Tensor
    weight: Tensor
    squared: Tensor
    inputs: Tensor
    outputs: Tensor
    input_input: Tensor
    input_output: Tensor
    output_output: Tensor

    @classmethod
    def empty(cls, num_experts: int, origin: Tensor) -> Self:
        """Start with nothing, on the device and in the precision of the origin ``(H,)``."""
        E, H = num_experts, len(origin)
        shapes = ((E,), (E,), (E,), (E, H), (E, H), (E, H, H), (E, H, H), (E,))
        return cls(origin, *(origin.new_zeros(shape) for shape in shapes))

    @staticmethod
    def bytes_for(num_experts: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes that moments of a layer take."""
        return num_experts * (2 * hidden_size**2 + 2 * hidden_size + 4) * dtype.itemsize

    def add(self, inputs: Tensor, outputs: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Add slots.

        Args:
            inputs: ``(N, H)``.
            outputs: ``(N, H)`` of the slot's expert.
            ids: ``(N,)`` which expert that is.
            weights: ``(N,)``; slots with weight 0 are left out.
        """
        used = weights > 0
        ids, weights = ids[used], weights[used].to(self.origin)
        inputs = inputs[used].to(self.origin) - self.origin
        outputs = outputs[used].to(self.origin)
        order = ids.argsort(stable=True)
        ids, weights, inputs, outputs = ids[order], weights[order], inputs[order], outputs[order]
        begin = 0
        for expert, many in enumerate(torch.bincount(ids, minlength=len(self.count)).tolist()):
            part = slice(begin, begin + many)
            begin += many
            if not many:
                continue
            x, y, w = inputs[part], outputs[part], weights[part]
            weighted = x * w.unsqueeze(-1)
            self.count[expert] += many
            self.weight[expert] += w.sum()
            self.squared[expert] += (w * w).sum()
            self.inputs[expert] += weighted.sum(0)
            self.outputs[expert] += w @ y
            self.input_input[expert].addmm_(weighted.T, x)
            self.input_output[expert].addmm_(weighted.T, y)
            self.output_output[expert] += (w * (y * y).sum(-1)).sum()

    def join(self, other: Moments) -> None:
        """Take in those of another text, in place; they have one origin."""
        for each in fields(self)[1:]:
            getattr(self, each.name).add_(getattr(other, each.name))

    def to(self, device: torch.device) -> Moments:
        """Return them on a device."""
        return Moments(*(getattr(self, each.name).to(device) for each in fields(self)))

    @property
    def effective(self) -> Tensor:
        """``(E,)``: how many slots of equal weight would tell as much."""
        return self.weight**2 / self.squared.clamp_min(torch.finfo(self.squared.dtype).tiny)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
