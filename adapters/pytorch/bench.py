"""A block's stand-in on the bench: what its experts and shared modules answer is chosen, and what comes out seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import Anatomy, at
from lynx.adapters.pytorch.reading import Unreadable
from lynx.adapters.pytorch.twin import CODE, Play, Stub, Watch, copied, drawn
from lynx.layers import MoESpec

_SHAPES = ((4, 16), (64,))  # hand-written blocks take (B, q, H) or (T, H)
_ROWS = 64


class Bench:
    """One block under one assumption of what it is made of.

    Attributes:
        twin: The stand-in.
        play: What its stubs do.
        hidden: ``(64, H)``, what it is called with.
        returned: What it returned last.
        flat: Whether that was ``(T, H)`` for ``(B, q, H)``.
    """

    def __init__(self, block: nn.Module, spec: MoESpec, anatomy: Anatomy, seed: int = 0) -> None:
        self.block, self.spec, self.anatomy, self.seed = block, spec, anatomy, seed
        self.play = Play()
        self.generator = torch.Generator().manual_seed(seed)
        width = anatomy.hidden_size
        self.hidden = torch.randn(_ROWS, width, generator=self.generator)
        stubs: dict[str, nn.Module] = dict(self._stubs())
        self.twin = copied(block, self._tensor, stubs)
        watched = [anatomy.router, *(name for name, child in block.named_children() if _weighs(child))]
        if spec.shared_gate:
            watched.append(spec.shared_gate)
        for path in dict.fromkeys(watched):
            module = at(self.twin, path)
            if isinstance(module, nn.Module):
                module.register_forward_hook(Watch(self.play, path), with_kwargs=True)
        self.leading: tuple[int, ...] = (_ROWS,)
        self.returned: Any = None
        self.flat = False

    @property
    def given(self) -> Tensor:
        """The hidden states in the shape that the block takes."""
        return self.hidden.reshape(*self.leading, -1)

    def call(
        self, experts: Literal["zero", "code", "act"], shared: Literal["zero", "act"] = "zero", first: int = 0
    ) -> Tensor:
        """Run the twin; return its hidden states as ``(64, H)``."""
        self.play.experts, self.play.shared, self.play.first = experts, shared, first
        self.play.calls.clear()
        self.returned = self.twin(self.given.clone())
        main = self.returned[0] if type(self.returned) in (tuple, list) else self.returned
        if not isinstance(main, Tensor) or main.numel() != self.hidden.numel() or main.shape[-1] != len(self.hidden.T):
            raise Unreadable(
                1, f"it returns {type(self.returned).__name__}, not hidden states of the shape it was given"
            )
        self.flat = main.ndim < len(self.leading) + 1
        return main.reshape(self.hidden.shape).float()

    def first_call(self) -> Tensor:
        """Find the shape of hidden states that the block takes."""
        self.silence()
        faults = []
        for leading in _SHAPES:
            self.leading = leading
            try:
                return self.call("zero")
            except Unreadable:
                raise
            except Exception as fault:  # whatever an author's code raises
                faults.append(fault)
        first = faults[0]
        what = "it does not run on hidden states alone, with stand-ins for its experts"
        raise Unreadable(0, f"{what}: {type(first).__name__}: {first}")

    def codes(self, base: Tensor) -> Tensor:
        """Read the combine weights ``(T, E)``: every expert answers with a unit vector of its own."""
        E, width = self.anatomy.num_experts, self.hidden.shape[-1]
        parts = [(self.call("code", first=first) - base) / CODE for first in range(0, E, width)]
        if E % width and bool(parts[-1][:, E % width :].any()):
            raise Unreadable(1, "it changes its experts' output beyond weighing it")
        return torch.cat(parts, dim=-1)[:, :E]

    def put_up(self, up: Tensor, gate: Tensor) -> None:
        """Give all stacked experts these up and gate projections ``(H, I)``."""
        stacked = self.anatomy.stacked
        assert stacked is not None
        for name, value in ((stacked.up, up), (stacked.gate, gate)):
            if name is not None:
                stored = value if stacked.transposed else value.T
                self.put(name, _alike(stored, torch.Size((self.anatomy.num_experts, *stored.shape))))

    def silence(self) -> None:
        """Make stacked experts answer with 0, as stubs do."""
        if self.anatomy.stacked is not None:
            name = self.anatomy.stacked.down
            self.put(name, _alike(torch.zeros(1), at(self.block, name).shape))

    def put(self, path: str, value: Tensor) -> None:
        """Put a tensor in the place of a parameter of the twin."""
        holder, _, name = path.rpartition(".")
        (at(self.twin, holder) if holder else self.twin)._parameters[name] = value

    def _stubs(self) -> Iterator[tuple[str, nn.Module]]:
        """Stand-ins for experts, and for other modules with parameters that a token may run through."""
        anatomy, block = self.anatomy, self.block
        if anatomy.modules is not None:
            for e in range(anatomy.num_experts):
                path = f"{anatomy.modules}.{e}"
                yield path, Stub(self.play, path, e, 100 + e)
        taken = [anatomy.router, anatomy.modules or "", *(self._stack_names())]
        heads = {path.split(".")[0] for path in taken if path}
        others = list(self.spec.shared) if self.spec.shared is not None else []
        if self.spec.shared is None:
            for name, child in block.named_children():
                if name in heads or _weighs(child) or not any(True for _ in child.parameters()):
                    continue
                lists = [f"{name}.{inner}" for inner, _ in child.named_children()]
                others += lists if isinstance(child, nn.ModuleList) else [name]
        for number, path in enumerate(others):
            yield path, Stub(self.play, path, None, 10_000 + number)

    def _stack_names(self) -> list[str]:
        stacked = self.anatomy.stacked
        return [] if stacked is None else [n for n in (stacked.up, stacked.down, stacked.gate) if n is not None]

    def _tensor(self, path: str, value: Tensor) -> Tensor:
        if path in self._stack_names():
            return _alike(torch.zeros(1), value.shape)
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach().cpu().clone()
        return drawn(value.shape, self.generator, self.anatomy.hidden_size)


def _weighs(child: nn.Module) -> bool:
    """Whether a module could be the gate of shared experts: one number for every token."""
    return isinstance(child, nn.Linear) and child.out_features == 1


def _alike(value: Tensor, shape: torch.Size) -> Tensor:
    """Repeat a value to stacked weights: in memory of its own, which grouped products ask for, up to a gigabyte."""
    whole = value.expand(shape)
    return whole.contiguous() if whole.numel() < 2**28 else whole
