"""What the rows of a step are, where no host says it: told by the user, or seen from the shape of hidden states."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lynx.errors import ConfigError
from lynx.routing import Phase, Role

_PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}


@dataclass(frozen=True, slots=True)
class Step:
    """What a user said of a step; see :func:`step`."""

    phase: Literal["prefill", "decode"] | Tensor | None
    valid: Tensor | None = None
    exact: Tensor | None = None

    def said_alike(self, other: Step) -> bool:
        """Whether another step says the same; of tensors nobody can know without waiting for the device."""
        plain = (self.valid, self.exact, other.valid, other.exact) == (None,) * 4
        return plain and isinstance(self.phase, str) and isinstance(other.phase, str) and self.phase == other.phase


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of one step are.

    Attributes:
        role: ``(T,)`` int8, values of :class:`lynx.Role`; the core turns rows EXACT.
        phase: ``(T,)`` int8, values of :class:`lynx.Phase`.
        all_prefill: True where it is known on the host that no row is in decode.
    """

    role: Tensor
    phase: Tensor
    all_prefill: bool


class _Compiled:
    """The step as compiled code reads it: a plain attribute, which Dynamo guards.

    Of a context variable or of a thread's own storage it would keep the value of the first trace. So this is one for
    the process; where threads hold different steps, none is shown, and compiled code stays exact.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self._held: dict[int, Step] = {}
        self._lock = threading.Lock()

    def hold(self, step: Step | None) -> None:
        """Say what the calling thread's step is."""
        with self._lock:
            if step is None:
                self._held.pop(threading.get_ident(), None)
            else:
                self._held[threading.get_ident()] = step
            steps = list(self._held.values())
            alike = steps and all(step is steps[0] or step.said_alike(steps[0]) for step in steps)
            self.step = steps[0] if alike else None


_compiled = _Compiled()
_current: ContextVar[Step | None] = ContextVar("lynx_step", default=None)


@contextmanager
def step(
    phase: Literal["prefill", "decode"] | Tensor | None = None,
    *,
    valid: Tensor | None = None,
    exact: Tensor | None = None,
) -> Iterator[None]:
    """Say what the rows of a forward are, for hand-written layers and for :func:`lynx.select`.

    Holds for the calling thread or task. Without it, layers that see ``(B, q, H)`` take ``q <= max_decode_q`` (1
    unless configured) for decode and longer ones for prefill; layers that see ``(T, H)`` cannot know.

    Args:
        phase: ``"prefill"`` or ``"decode"`` for all rows, a tensor with a value of :class:`lynx.Phase` for each, or
            None to go by the shape.
        valid: Bool, False for rows that are padding: they neither vote nor change.
        exact: Bool, True for rows whose routing must not change.

    Tensors have one value for each row ``(T,)``, in any shape, or one for each sequence ``(B,)``.

    Raises:
        ConfigError: The phase is none of these.

    Example:
        >>> import torch, lynx
        >>> with lynx.step("decode", valid=torch.tensor([True, True, False])):
        ...     pass  # model(tokens)
    """
    if phase is not None and not isinstance(phase, Tensor) and phase not in _PHASES:
        raise ConfigError(f"phase is 'prefill', 'decode', a tensor of lynx.Phase values, or None; got {phase!r}.")
    said = Step(phase, valid, exact)
    before = _current.get()
    token = _current.set(said)
    _compiled.hold(said)
    try:
        yield
    finally:
        _current.reset(token)
        _compiled.hold(before)


def current_step() -> Step | None:
    """Return the step that :func:`step` has said, None outside of it."""
    return _compiled.step if torch.compiler.is_compiling() else _current.get()


def read_rows(
    leading: Sequence[int], device: torch.device, max_decode_q: int = 1, said: Step | None = None
) -> Rows | None:
    """Work out what the rows of a tensor are.

    Args:
        leading: The tensor's shape without its last dimension: ``(B, q)`` or ``(T,)``.
        device: Where the rows are wanted.
        max_decode_q: Longest step that counts as decode where nobody has said the phase.
        said: What the user said, None for nothing.

    Returns:
        The rows, or None where nothing tells the phase.
    """
    total = 1
    for size in leading:
        total *= size
    batch = leading[0] if leading else 1
    phase = said.phase if said is not None else None
    if phase is None:
        if len(leading) != 2:
            return None
        phase = "decode" if leading[1] <= max_decode_q else "prefill"
    if isinstance(phase, Tensor):
        phases, all_prefill = _spread("phase", phase, batch, total, device).to(torch.int8), False
    else:
        phases = torch.full((total,), int(_PHASES[phase]), dtype=torch.int8, device=device)
        all_prefill = phase == "prefill"
    role = torch.full((total,), int(Role.OPEN), dtype=torch.int8, device=device)
    if said is not None and said.exact is not None:
        role = role.masked_fill(_spread("exact", said.exact, batch, total, device).bool(), int(Role.EXACT))
    if said is not None and said.valid is not None:
        role = role.masked_fill(~_spread("valid", said.valid, batch, total, device).bool(), int(Role.PADDING))
    return Rows(role, phases, all_prefill)


def _spread(name: str, given: Tensor, batch: int, total: int, device: torch.device) -> Tensor:
    """Bring one value per row or per sequence to ``(T,)``."""
    given = given.to(device).reshape(-1)
    if given.shape[0] == total:
        return given
    if given.shape[0] == batch:
        return given.unsqueeze(-1).expand(batch, total // batch).reshape(-1)
    raise ConfigError(
        f"lynx.step: `{name}` has {given.shape[0]} values, but the layer sees {total} rows of {batch} sequences; "
        "give one for each row or one for each sequence."
    )
