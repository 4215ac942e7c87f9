"""The weights of one layer's experts, as a host keeps them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of one layer's experts, where the host keeps them: nothing is copied or repacked.

    Attributes:
        gate_up: Up projections `(E, 2I, H)`; `(E, I, H)` where the experts have no gate.
        down: Down projections `(E, H, I)`.
        activation: The host's own gate or activation, row by row: `(S, 2I) -> (S, I)`, or `(S, I) -> (S, I)` without a
            gate. Whether gate and up are halves or interleaved is known here and nowhere else.
        gate_up_bias: Bias of the up projection `(E, 2I)` or `(E, I)`, or None.
        down_bias: Bias of the down projection `(E, H)`, or None.
        transposed: True where weights are stored input first: `gate_up (E, H, 2I)` and `down (E, I, H)`.
        post_norm: Applied row by row to each expert's output `(S, H)` before weighting, or None.
        gate: The name in `lynx.kernels.gates` of the formula that `activation` is, so that a kernel may compute it in
            place (`recognise` finds it). None: `activation` is called between the two products.
    """

    gate_up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None
    gate: str | None = None

    @property
    def num_experts(self) -> int:
        """The number of experts, E."""
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        """The width of a token's row, H."""
        return self.down.shape[2 if self.transposed else 1]

    @property
    def expert_size(self) -> int:
        """The width of an expert's inner row, I."""
        return self.down.shape[1 if self.transposed else 2]

    @property
    def up_size(self) -> int:
        """The columns of the up projection: 2I, or I where the experts have no gate."""
        return self.gate_up.shape[2 if self.transposed else 1]
