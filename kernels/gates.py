"""The activations that a kernel may compute itself, and how a host's own callable is recognised as one of them.

Symbols: I expert size, S rows. A gated activation takes `(S, 2I)`, gate and up side by side as halves or interleaved
column by column, and gives `(S, I)`; one without a gate takes and gives `(S, I)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gate:
    """One formula: `form(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`, or `form(row)` without a gate.

    Attributes:
        form: The nonlinearity. "silu" is `x * sigmoid(scale * x)`, "relu2" is `max(x, 0) ** 2`.
        gated: Whether the input holds gate and up.
        interleaved: Whether gate and up alternate (gate first) instead of being halves.
        scale: The factor inside silu's sigmoid.
        limit: What gate (above) and up (both sides) are clamped to.
        shift: What is added to up after clamping.
    """

    form: Literal["silu", "gelu", "gelu_tanh", "relu2"]
    gated: bool = True
    interleaved: bool = False
    scale: float = 1.0
    limit: float = math.inf
    shift: float = 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute the formula in torch, `(S, 2I) -> (S, I)` or `(S, I) -> (S, I)`."""
        if not self.gated:
            return self._act(rows)
        gate, up = self.split(rows)
        return self._act(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + self.shift)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up, `(S, 2I)` to two of `(S, I)`."""
        if self.interleaved:
            return rows[..., ::2], rows[..., 1::2]
        gate, up = rows.chunk(2, dim=-1)
        return gate, up

    def _act(self, rows: Tensor) -> Tensor:
        match self.form:
            case "silu":
                return rows * torch.sigmoid(self.scale * rows)
            case "gelu":
                return F.gelu(rows)
            case "gelu_tanh":
                return F.gelu(rows, approximate="tanh")
            case "relu2":
                return F.relu(rows).square()


# Names are part of `ExpertWeights`: add, but do not rename. In brackets, models of transformers that have it.
GATES: dict[str, Gate] = {
    "swiglu": Gate("silu"),  # most: mixtral, qwen3_moe, olmoe, deepseek_v3
    "geglu": Gate("gelu"),
    "geglu_tanh": Gate("gelu_tanh"),  # gemma's
    "swiglu_clamp7": Gate("silu", limit=7.0),
    "swiglu_clamp10": Gate("silu", limit=10.0),  # deepseek_v4, hy_v4, glm5_next
    "gpt_oss": Gate("silu", interleaved=True, scale=1.702, limit=7.0, shift=1.0),
    "gpt_oss_halves": Gate("silu", scale=1.702, limit=7.0, shift=1.0),  # minimax_m3_vl, openai_privacy_filter
    "silu": Gate("silu", gated=False),
    "gelu": Gate("gelu", gated=False),
    "gelu_tanh": Gate("gelu_tanh", gated=False),
    "relu2": Gate("relu2", gated=False),  # nemotron_h
}


def find_gate(name: str) -> Gate:
    """Return the formula of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in GATES:
        raise ValueError(f"Unknown gate={name!r}. Known: {', '.join(sorted(GATES))}.")
    return GATES[name]


def recognise(
    activation: Callable[[Tensor], Tensor], expert_size: int, gated: bool, device: torch.device | str = "cpu"
) -> str | None:
    """Name the formula that a host's activation is, by calling it on rows that reach every branch.

    This is for the time of attaching: it calls `activation` once and compares. It never guesses, but it is not asked
    again: what the formula depends on must stay as it is.

    Args:
        activation: The host's own, as in `ExpertWeights`.
        expert_size: I.
        gated: Whether it takes `(S, 2I)`.
        device: Where to call it: where its parameters are, if it has any.

    Returns:
        The one name in `GATES` whose formula gives the same for all rows; None if there is not exactly one.
    """
    rows = _probe_rows(2 * expert_size if gated else expert_size)
    try:
        with torch.no_grad():
            output = activation(rows.to(device, copy=True)).double().cpu()
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # it cannot take float32 rows on this device: none of ours is like that
    if output.shape != (rows.shape[0], expert_size):
        return None
    rows = rows.double()
    found = [name for name, gate in GATES.items() if gate.gated == gated and _same(output, rows, gate)]
    return found[0] if len(found) == 1 else None


def _probe_rows(width: int) -> Tensor:
    """Make rows `(n, width)` whose neighbours, and whose halves, pair values small, near the limits and huge."""
    near = torch.linspace(-12.3, 12.3, 41)  # 0 among them
    far = torch.tensor([15.0, 31.0, 1e2, 1e4, 1e9, 1e18])
    pool = torch.cat([near, far, -far])
    drawn = torch.randint(len(pool), (max(4, 8192 // width), width), generator=torch.Generator().manual_seed(0))
    return pool[drawn]


def _same(output: Tensor, rows: Tensor, gate: Gate) -> bool:
    """Whether output `(n, I)` is the formula of these rows, up to what float32 rounds away."""
    first, second = gate.split(rows) if gate.gated else (rows, rows)
    tolerance = 2e-6 * (1 + first.abs()) * (1 + second.abs())
    return bool(((output - gate(rows)).abs() <= tolerance).all())
