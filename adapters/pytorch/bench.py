"""Read a hand-written MoE block: hold what it could be made of against what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import Anatomy, anatomies, at, check_names
from lynx.adapters.pytorch.execution import (
    ACTIVATIONS,
    FORMULAS,
    ExpertModules,
    SlicedExperts,
    StackedExperts,
    formulas,
    inner,
)
from lynx.adapters.pytorch.reading import BlockReading, Output, Unreadable
from lynx.adapters.pytorch.routers import Router, read_router
from lynx.adapters.pytorch.twin import Play, Stub, Watch, copied, drawn, stub_function
from lynx.errors import ConfigError, did_you_mean
from lynx.layers import MoESpec

_SHAPES = ((4, 16), (64,))  # hand-written blocks take (B, q, H) or (T, H)


def read_block(block: nn.Module, spec: MoESpec) -> BlockReading:
    """Find out what a block is made of and how it decides; does not change it.

    Raises:
        Unreadable: Nothing that it could be made of computes what it computes.
    """
    check_names(block, spec)
    if spec.activation and spec.activation not in FORMULAS | ACTIVATIONS:
        known = [*FORMULAS, *ACTIVATIONS]
        raise ConfigError(
            f"no activation {spec.activation!r}.{did_you_mean(spec.activation, known)} There are: {', '.join(known)}."
        )
    failures = []
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for anatomy in anatomies(block, spec):
            try:
                reading = _Bench(block, spec, anatomy).read()
                if reading.router.rule.scale != 1.0 or reading.router.factor != 1.0:
                    _same_again(reading, _Bench(block, spec, anatomy, seed=1).read())
                return reading
            except Unreadable as failure:
                failures.append(failure)
    if not failures:
        raise Unreadable(0, "no router was found beside experts; name them in lynx.MoESpec")
    raise max(failures, key=lambda failure: failure.depth)


def _same_again(first: BlockReading, second: BlockReading) -> None:
    """Raise where a factor was drawn for the bench: the block has learned it, and it is not known here."""
    one, other = first.router, second.router
    if not (
        isclose(one.rule.scale, other.rule.scale, rel_tol=1e-4) and isclose(one.factor, other.factor, rel_tol=1e-4)
    ):
        raise Unreadable(3, "its combine weights are scaled by something that it has learned")


class _Bench:
    """One block under one assumption of what it is made of."""

    def __init__(self, block: nn.Module, spec: MoESpec, anatomy: Anatomy, seed: int = 0) -> None:
        self.block, self.spec, self.anatomy, self.seed = block, spec, anatomy, seed
        self.play = Play()
        self.generator = torch.Generator().manual_seed(seed)
        width = anatomy.hidden_size
        self.hidden = torch.randn(64, width, generator=self.generator)
        stubs: dict[str, nn.Module] = dict(self._stubs())
        self.twin = copied(block, self._tensor, stubs)
        watched = [anatomy.router, *(name for name, child in block.named_children() if _weighs(child))]
        if spec.shared_gate:
            watched.append(spec.shared_gate)
        for path in dict.fromkeys(watched):
            module = at(self.twin, path)
            if isinstance(module, nn.Module):
                module.register_forward_hook(Watch(self.play, path), with_kwargs=True)
        self.leading: tuple[int, ...] = (64,)
        self.kind, self.flat = "tensor", False

    def read(self) -> BlockReading:
        """Return the reading, or raise."""
        base = self._first_call()
        residual = bool(base.any())
        if residual and not _close(base, self.hidden):
            raise Unreadable(1, "it adds something to its experts' output that comes from none of its modules")
        if self.anatomy.stacked is None:
            experts: ExpertModules | StackedExperts | SlicedExperts = ExpertModules(str(self.anatomy.modules))
            dense = self._codes(base)
            if not torch.equal(dense, self._codes(base)):
                raise Unreadable(4, "its output is random, also in eval mode")
            router = self._router(dense, self.play.calls.get(self.anatomy.router))
        else:
            router, experts = self._stacked(base)
        shared, shared_gate = self._shared(base)
        self._agrees(router, shared, shared_gate)
        output = self._output(router)
        reading = BlockReading(self.anatomy, router, experts, shared, shared_gate, residual, output)
        self._verify(reading)
        return reading

    def _call(self, experts: Any, shared: Any, first: int = 0) -> Tensor:
        """Run the twin; return its hidden states as ``(64, H)``."""
        self.play.experts, self.play.shared, self.play.first = experts, shared, first
        self.play.calls.clear()
        self.returned = self.twin(self.hidden.reshape(*self.leading, -1).clone())
        self.kind = next((kind.__name__ for kind in (tuple, list) if isinstance(self.returned, kind)), "tensor")
        main = self.returned[0] if type(self.returned) in (tuple, list) else self.returned
        if not isinstance(main, Tensor) or main.numel() != self.hidden.numel() or main.shape[-1] != len(self.hidden.T):
            raise Unreadable(
                1, f"it returns {type(self.returned).__name__}, not hidden states of the shape it was given"
            )
        self.flat = main.ndim < len(self.leading) + 1
        return main.reshape(self.hidden.shape).float()

    def _first_call(self) -> Tensor:
        """Find the shape of hidden states that the block takes."""
        self._silence()
        faults = []
        for leading in _SHAPES:
            self.leading = leading
            try:
                return self._call("zero", "zero")
            except Unreadable:
                raise
            except Exception as fault:  # whatever an author's code raises
                faults.append(fault)
        raise Unreadable(0, f"it cannot be called with hidden states alone: {type(faults[0]).__name__}: {faults[0]}")

    def _codes(self, base: Tensor) -> Tensor:
        """Read the combine weights ``(T, E)``: every expert answers with a unit vector of its own."""
        E, width = self.anatomy.num_experts, self.hidden.shape[-1]
        parts = [(self._call("code", "zero", first) - base) for first in range(0, E, width)]
        if E % width and bool(parts[-1][:, E % width :].any()):
            raise Unreadable(1, "it changes its experts' output beyond weighing it")
        return torch.cat(parts, dim=-1)[:, :E]

    def _router(self, dense: Tensor, called: tuple[Tensor, Any] | None) -> Router:
        found = read_router(self.twin, self.anatomy.router, self.spec, called, self.hidden, dense)
        if isinstance(found, str):
            raise Unreadable(2, found)
        routing = found(self.twin, self.hidden.reshape(*self.leading, -1))
        again = torch.zeros_like(dense).scatter(-1, routing.ids.long(), routing.weights.float())
        if not _close(again, dense):
            raise Unreadable(2, "its combine weights follow no rule that is known")
        self.dense = dense
        return found

    def _stacked(self, base: Tensor) -> tuple[Router, StackedExperts | SlicedExperts]:
        """Try activations; with the right one, all tokens' combine weights come out as a router would give them.

        All experts get the same up projection, and a down projection that writes to a channel of their own. First gate
        and up are alike, so that the sum over I has few signs and rounding stays small; then they are not, which tells
        one from the other.
        """
        stacked, E, width = self.anatomy.stacked, self.anatomy.num_experts, self.hidden.shape[-1]
        assert stacked is not None
        if width < E:
            raise Unreadable(0, f"it has more experts ({E}) than hidden channels ({width})")
        shape = at(self.twin, stacked.down).shape
        size = shape[1] if stacked.transposed else shape[2]
        direction = torch.rand(size, generator=self.generator) + 0.5
        codes = torch.zeros(shape)
        for e in range(E):
            codes[(e, slice(None), e) if stacked.transposed else (e, e)] = direction
        self._put(stacked.down, codes)
        columns = at(self.twin, stacked.up).shape[2 if stacked.transposed else 1]
        base_up = torch.randn(width, columns, generator=self.generator) * (3.0 / width**0.5)
        paired = base_up[:, torch.arange(columns) % size // 2]
        self._put_up(paired, paired)
        alike = self._call("zero", "zero") - base
        if not torch.equal(alike, self._call("zero", "zero") - base):
            raise Unreadable(4, "its output is random, also in eval mode")
        called = self.play.calls.get(self.anatomy.router)
        other = torch.randn(width, columns, generator=self.generator) * (3.0 / width**0.5)
        self._put_up(base_up, other)
        apart = self._call("zero", "zero") - base
        failure = Unreadable(1, "its activation, or the layout of its stacked weights, is not known")
        for name in [self.spec.activation] if self.spec.activation else formulas(stacked, columns == 2 * size):
            gate = None if stacked.gate is None else paired
            strength = inner(stacked, name, self.hidden, paired, gate) @ direction
            second = inner(stacked, name, self.hidden, base_up, None if gate is None else other) @ direction
            dense = alike[:, :E] / strength.unsqueeze(-1)
            if not torch.allclose(apart[:, :E], dense * second.unsqueeze(-1), rtol=1e-3, atol=1e-3):
                continue
            try:
                router = self._router(dense, called)
            except Unreadable as found:
                failure = max(failure, found, key=lambda each: each.depth)
                continue
            kind = StackedExperts if stacked.gate is None else SlicedExperts
            return router, kind(stacked, name)
        raise failure

    def _put_up(self, up: Tensor, gate: Tensor) -> None:
        stacked = self.anatomy.stacked
        assert stacked is not None
        for name, value in ((stacked.up, up), (stacked.gate, gate)):
            if name is not None:
                stored = value if stacked.transposed else value.T
                self._put(name, stored.expand(self.anatomy.num_experts, *stored.shape))

    def _silence(self) -> None:
        """Make stacked experts answer with 0, as stubs do."""
        if self.anatomy.stacked is not None:
            name = self.anatomy.stacked.down
            self._put(name, torch.zeros(1).expand(at(self.block, name).shape))

    def _put(self, path: str, value: Tensor) -> None:
        holder, _, name = path.rpartition(".")
        (at(self.twin, holder) if holder else self.twin)._parameters[name] = value

    def _shared(self, base: Tensor) -> tuple[tuple[str, ...], str | None]:
        """Find what every token runs through."""
        self._silence()
        seen = self._call("zero", "act") - base
        calls = {
            path: answer.reshape(64, -1).float()
            for path, (given, answer) in self.play.calls.items()
            if isinstance(answer, Tensor)
            and given.numel() == self.hidden.numel()
            and torch.equal(given.reshape(self.hidden.shape), self.hidden)
        }
        modules = [path for path in calls if isinstance(at(self.twin, path), Stub)]
        gates = [path for path, answer in calls.items() if answer.shape[-1] == 1 and path not in modules]
        total = sum((calls[path] for path in modules), torch.zeros_like(seen))
        if self.spec.shared_gate is not None:
            gates = [self.spec.shared_gate] if self.spec.shared_gate in calls else []
        for gate in (None, *gates):
            expected = total if gate is None else torch.sigmoid(calls[gate]) * total
            if _close(seen, expected):
                return tuple(modules), gate if modules else None
        raise Unreadable(3, "what it adds beside its experts is neither shared experts nor those under a sigmoid gate")

    def _output(self, router: Router) -> Output:
        """Say what the block returned; hidden states come first."""
        if self.kind == "tensor":
            return Output(self.flat, self.kind)
        logits = router(self.twin, self.hidden.reshape(*self.leading, -1)).logits
        first, self.hidden = self.returned, self.hidden.flip(0) * 0.5
        self._call("zero", "zero")
        second, self.hidden = self.returned, (self.hidden / 0.5).flip(0)
        extras: list[tuple[str, Any]] = []
        for place, (item, other) in enumerate(zip(first[1:], second[1:], strict=True), start=1):
            if (
                isinstance(item, Tensor)
                and item.numel() == logits.numel()
                and _close(item.reshape(logits.shape), logits)
            ):
                extras.append(("logits", "wide" if item.ndim == 3 else "flat"))
                continue
            same = torch.equal(item, other) if isinstance(item, Tensor) and item.shape == other.shape else item is other
            if not same and not (isinstance(item, (int, float)) and item == other):
                raise Unreadable(3, f"item {place} of what it returns is neither its router logits nor a constant")
            extras.append(("constant", item))
        return Output(self.flat, self.kind, tuple(extras))

    def _verify(self, reading: BlockReading) -> None:
        """Hold the reading's own forward against the block's, with experts that are told apart by what they compute."""
        if reading.anatomy.stacked is not None:
            return  # done above, for every expert and activation
        expected = self._call("act", "act")
        modules = at(self.twin, str(reading.anatomy.modules))
        outputs = torch.stack([stub_function(stub.seed, self.hidden) for stub in modules], dim=1)
        routed = (self.dense.unsqueeze(-1) * outputs).sum(1)
        hidden = self.hidden.reshape(*self.leading, -1)
        found = reading.finish(self.twin, hidden, routed, self.dense)
        found = found if isinstance(found, Tensor) else found[0]
        if not _close(found.reshape(expected.shape), expected):
            raise Unreadable(3, "put together from its parts, its output is not what it returns")

    def _agrees(self, router: Router, shared: tuple[str, ...], shared_gate: str | None) -> None:
        """Raise where the spec says something else than the block does."""
        spec, rule = self.spec, router.rule
        found = {
            "top_k": router.top_k,
            "score": rule.score,
            "renormalise": rule.renormalise,
            "scale": rule.scale,
            "bias": router.choice.bias,
            "groups": router.choice.groups,
            "kept_groups": router.choice.kept_groups,
        }
        if spec.shared is not None and set(spec.shared) != set(shared):
            raise Unreadable(4, f"the spec says shared={list(spec.shared)}, but it runs {list(shared)}")
        if spec.shared_gate is not None and spec.shared_gate != shared_gate:
            raise Unreadable(4, f"the spec says shared_gate={spec.shared_gate!r}, but that is not what it does")
        if spec.score == "softmax_over_chosen" and rule.score == "softmax" and rule.renormalise:
            found["score"] = "softmax_over_chosen"
        for name, does in found.items():
            says = getattr(spec, name)
            if says is not None and says != does and rule.repick:
                raise Unreadable(4, f"the spec says {name}={says!r}, but the block does {name}={does!r}")

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
            return torch.zeros(1).expand(value.shape)
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach().cpu().clone()
        return drawn(value.shape, self.generator, self.anatomy.hidden_size)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other, rtol=1e-4, atol=1e-5)


def _weighs(child: nn.Module) -> bool:
    """Whether a module could be the gate of shared experts: one number for every token."""
    return isinstance(child, nn.Linear) and child.out_features == 1
