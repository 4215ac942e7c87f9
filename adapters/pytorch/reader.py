"""Read a hand-written MoE block: hold what it could be made of against what it computes."""

from __future__ import annotations

from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import anatomies, at, check_names
from lynx.adapters.pytorch.bench import Bench
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
from lynx.adapters.pytorch.twin import Stub, stub_function
from lynx.errors import ConfigError, did_you_mean
from lynx.layers import MoESpec


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
                reading = _Reader(Bench(block, spec, anatomy)).read()
                if reading.router.rule.scale != 1.0 or reading.router.factor != 1.0:
                    _same_again(reading, _Reader(Bench(block, spec, anatomy, seed=1)).read())
                return reading
            except Unreadable as failure:
                failures.append(failure)
            except Exception as fault:  # whatever an author's code raises
                failures.append(Unreadable(1, f"it failed while it was read: {type(fault).__name__}: {fault}"))
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


class _Reader:
    """Reads one block under one assumption of what it is made of."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.spec, self.anatomy = bench, bench.spec, bench.anatomy

    def read(self) -> BlockReading:
        """Return the reading, or raise."""
        bench = self.bench
        base = bench.first_call()
        residual = bool(base.any())
        if residual and not _close(base, bench.hidden):
            raise Unreadable(1, "it adds something to its experts' output that comes from none of its modules")
        if self.anatomy.stacked is None:
            experts: ExpertModules | StackedExperts | SlicedExperts = ExpertModules(str(self.anatomy.modules))
            dense = bench.codes(base)
            if not torch.equal(dense, bench.codes(base)):
                raise Unreadable(4, "its output is random, also in eval mode")
            router = self._router(dense, bench.play.calls.get(self.anatomy.router))
        else:
            router, experts = self._stacked(base)
        shared, shared_gate = self._shared(base)
        self._agrees(router, shared, shared_gate)
        output = self._output(router)
        reading = BlockReading(self.anatomy, router, experts, shared, shared_gate, residual, output)
        self._verify(reading)
        return reading

    def _router(self, dense: Tensor, called: tuple[Tensor, Any] | None) -> Router:
        bench = self.bench
        found = read_router(bench.twin, self.anatomy.router, self.spec, called, bench.hidden, dense)
        if isinstance(found, str):
            raise Unreadable(2, found)
        routing = found(bench.twin, bench.given)
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
        bench = self.bench
        stacked, E, width = self.anatomy.stacked, self.anatomy.num_experts, bench.hidden.shape[-1]
        assert stacked is not None
        if width < E:
            raise Unreadable(0, f"it has more experts ({E}) than hidden channels ({width})")
        shape = at(bench.twin, stacked.down).shape
        size = shape[1] if stacked.transposed else shape[2]
        direction = torch.rand(size, generator=bench.generator) + 0.5
        codes = torch.zeros(shape)
        for e in range(E):
            codes[(e, slice(None), e) if stacked.transposed else (e, e)] = direction
        bench.put(stacked.down, codes)
        columns = at(bench.twin, stacked.up).shape[2 if stacked.transposed else 1]
        base_up = torch.randn(width, columns, generator=bench.generator) * (3.0 / width**0.5)
        paired = base_up[:, torch.arange(columns) % size // 2]
        bench.put_up(paired, paired)
        alike = bench.call("zero") - base
        if not torch.equal(alike, bench.call("zero") - base):
            raise Unreadable(4, "its output is random, also in eval mode")
        called = bench.play.calls.get(self.anatomy.router)
        other = torch.randn(width, columns, generator=bench.generator) * (3.0 / width**0.5)
        bench.put_up(base_up, other)
        apart = bench.call("zero") - base
        failure = Unreadable(1, "its activation, or the layout of its stacked weights, is not known")
        for name in [self.spec.activation] if self.spec.activation else formulas(stacked, columns == 2 * size):
            gate = None if stacked.gate is None else paired
            strength = inner(stacked, name, bench.hidden, paired, gate) @ direction
            second = inner(stacked, name, bench.hidden, base_up, None if gate is None else other) @ direction
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

    def _shared(self, base: Tensor) -> tuple[tuple[str, ...], str | None]:
        """Find what every token runs through."""
        bench = self.bench
        bench.silence()
        seen = bench.call("zero", "act") - base
        calls = {
            path: answer.reshape(len(bench.hidden), -1).float()
            for path, (given, answer) in bench.play.calls.items()
            if isinstance(answer, Tensor)
            and given.numel() == bench.hidden.numel()
            and torch.equal(given.reshape(bench.hidden.shape), bench.hidden)
        }
        modules = [path for path in calls if isinstance(at(bench.twin, path), Stub)]
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
        bench = self.bench
        kind = "tensor" if isinstance(bench.returned, Tensor) else type(bench.returned).__name__
        if kind == "tensor":
            return Output(bench.flat, kind)
        logits = router(bench.twin, bench.given).logits
        first, hidden = bench.returned, bench.hidden
        bench.hidden = torch.randn(hidden.shape, generator=bench.generator)
        bench.call("zero")
        second, bench.hidden = bench.returned, hidden
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
        return Output(bench.flat, kind, tuple(extras))

    def _verify(self, reading: BlockReading) -> None:
        """Hold the reading's own forward against the block's, with experts that are told apart by what they compute."""
        bench = self.bench
        if reading.anatomy.stacked is not None:
            return  # done above, for every expert and activation
        expected = bench.call("act", "act")
        modules = at(bench.twin, str(reading.anatomy.modules))
        outputs = torch.stack([stub_function(stub.seed, bench.hidden) for stub in modules], dim=1)
        routed = (self.dense.unsqueeze(-1) * outputs).sum(1)
        hidden = bench.given
        found = reading.finish(bench.twin, hidden, routed, self.dense)
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


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other, rtol=1e-4, atol=1e-5)
