"""What a block's router decides: how its answer is read at run time, and how that is found out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynx.adapters.pytorch.anatomy import at
from lynx.adapters.rules import Answers, ChoiceRule, choice_rule, choice_scores, weight_rule
from lynx.layers import MoESpec
from lynx.rerouting import own_top_k
from lynx.routing import Routing, WeightRule


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where logits come from if the router does not hand them out: ``hidden @ weight.T + bias``.

    Attributes:
        weight: Path in the block.
        transposed: Whether it is stored ``(H, E)``.
        bias: Path in the block, or None.
    """

    weight: str
    transposed: bool
    bias: str | None = None

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return logits ``(T, E)``."""
        weight = at(block, self.weight)
        weight = weight.T if self.transposed else weight
        bias = None if self.bias is None else at(block, self.bias)
        return F.linear(hidden.to(weight.dtype), weight, bias)


@dataclass(frozen=True, slots=True)
class Router:
    """A router that was read.

    Attributes:
        path: Path in the block.
        top_k: ``k``.
        logits: Place in the router's output, -1 for the whole of it; or a matrix.
        rule: How weights follow from logits; ``repick`` is False where no known rule fits.
        choice: What it ranks experts by; ``bias`` is a path in the block.
        ids: Place of ids ``(T, k)`` in its output, None for a router that gives logits only.
        weights: Place of weights in its output.
        dense: Whether those weights are ``(T, E)``.
        factor: What the block multiplies them by.
        wide: Whether it is called with ``(B, q, H)``.
        notes: What a user should know.
    """

    path: str
    top_k: int
    logits: int | Matrix
    rule: WeightRule
    choice: ChoiceRule
    ids: int | None = None
    weights: int | None = None
    dense: bool = False
    factor: float = 1.0
    wide: bool = False
    notes: tuple[str, ...] = ()

    def __call__(self, block: nn.Module, hidden: Tensor) -> Routing:
        """Decide for hidden states ``(B, q, H)`` or ``(T, H)``, as the block does."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        router = at(block, self.path)
        output: Any = None
        if isinstance(router, nn.Module) and (self.ids is not None or not isinstance(self.logits, Matrix)):
            output = router(hidden if self.wide else rows)
        if isinstance(self.logits, Matrix):
            logits = self.logits(block, rows)
        else:
            logits = output if self.logits < 0 else output[self.logits]
        logits = logits.reshape(rows.shape[0], -1).float()
        bias = None if self.choice.bias is None else at(block, self.choice.bias)
        choice = choice_scores(self.choice, logits, bias)
        if self.ids is None or self.weights is None:
            ids, weights = own_top_k(choice, logits, self.top_k, self.rule)
        else:
            ids = output[self.ids].reshape(rows.shape[0], -1)
            weights = output[self.weights].reshape(rows.shape[0], -1)
            if self.dense:
                weights = weights.gather(-1, ids.long())
            if self.factor != 1.0:
                weights = weights * self.factor
        return Routing.of(logits, ids, weights, self.rule, choice)


def read_router(
    twin: nn.Module, path: str, spec: MoESpec, called: tuple[Tensor, Any] | None, hidden: Tensor, dense: Tensor
) -> Router | str:
    """Find the router that explains the weights with which a block combines its experts.

    Args:
        twin: The block's stand-in.
        path: The router's path.
        spec: What the user says.
        called: What the router was called with and answered, None if it was not called as a module.
        hidden: ``(T, H)``, what the block was called with.
        dense: ``(T, E)`` the combine weights that the block was seen to use, 0 for experts that a token does not.

    Returns:
        The router, or why there is none.
    """
    E = dense.shape[-1]
    used = (dense != 0).sum(-1)
    top_k = int(used.max())
    if int(used.min()) != top_k:
        return f"its tokens use from {int(used.min())} to {top_k} experts each (a capacity, or a threshold?)"
    if top_k == E:
        return f"every token uses all {E} experts, so there is nothing to select"
    ids = dense.abs().topk(top_k, dim=-1).indices
    weights = dense.gather(-1, ids)
    wide, output = False, None
    if called is not None:
        given, output = called
        wide = given.ndim == 3
        if given.numel() != hidden.numel() or not torch.equal(given.reshape(hidden.shape), hidden):
            return "its router sees something else than the hidden states that the block is called with"
    decided = _decision(output, E, hidden.shape[0], dense)
    if isinstance(decided, str):
        return decided
    best: Router | None = None
    for place, logits in _sources(twin, path, spec, output, decided, hidden, E):
        taken = {place.bias} if isinstance(place, Matrix) else _own_bias(twin, path)
        rule = weight_rule(Answers(logits, weights, ids))
        likely = rule.score if rule is not None else "softmax"
        choice = _choice(twin, spec, Answers(logits, weights, ids), likely, taken)
        if choice is None and (rule is None or decided is None):
            continue
        router = Router(path, top_k, place, rule or WeightRule(renormalise=False, repick=False), choice or ChoiceRule())
        if decided is not None:
            router = replace(router, **decided)
        router = replace(router, wide=wide)
        if rule is not None and choice is not None:
            return router
        best = best or router
    if best is None or decided is None:
        return "how its combine weights and its choice follow from router logits is not known"
    what = "weight rule" if not best.rule.repick else "rule for the choice"
    notes = (f"no known {what} fits; tokens only keep or lose their own experts",)
    return replace(best, rule=replace(best.rule, repick=False), notes=notes)


def _decision(output: Any, E: int, rows: int, dense: Tensor) -> dict[str, Any] | str | None:
    """Tell ids and weights in a router's output; None if it gives none."""
    if not isinstance(output, (tuple, list)):
        return None
    tensors = {place: item for place, item in enumerate(output) if isinstance(item, Tensor) and item.numel()}
    whole = [
        p for p, t in tensors.items() if not t.is_floating_point() and t.dtype != torch.bool and t.numel() < rows * E
    ]
    for ids_place in whole:
        ids = tensors[ids_place].reshape(rows, -1).long()
        if not torch.equal(torch.zeros_like(dense).scatter(-1, ids, 1.0) != 0, dense != 0):
            continue
        for place, item in tensors.items():
            if not item.is_floating_point() or item.numel() not in (ids.numel(), rows * E):
                continue
            wide = item.numel() == rows * E
            values = item.reshape(rows, -1).float()
            values = values.gather(-1, ids) if wide else values
            ratio = dense.gather(-1, ids) / values
            factor = float(ratio.median())
            if torch.allclose(ratio, ratio.new_tensor(factor), rtol=1e-5):
                near = round(factor, 4)
                factor = near if abs(near - factor) < 1e-5 * abs(factor) else factor
                return {"ids": ids_place, "weights": place, "dense": wide, "factor": factor}
        return "the weights that its router gives are not those that the block combines its experts with"
    return None


def _sources(
    twin: nn.Module, path: str, spec: MoESpec, output: Any, decided: dict[str, Any] | None, hidden: Tensor, E: int
) -> Iterator[tuple[int | Matrix, Tensor]]:
    """Where the logits could come from, with what they are for these hidden states."""
    rows = hidden.shape[0]
    items = dict(enumerate(output)) if isinstance(output, (tuple, list)) else {-1: output}
    skip = decided["weights"] if decided is not None else None
    for place, item in items.items():
        if isinstance(item, Tensor) and item.is_floating_point() and item.numel() == rows * E and place != skip:
            yield place, item.reshape(rows, E).float()
    router = at(twin, path)
    prefix = f"{path}."
    named = {path: router} if isinstance(router, Tensor) else {prefix + n: t for n, t in _tensors(router)}
    biases = [name for name, t in named.items() if t.shape == (E,) and name != spec.bias]
    if isinstance(router, Tensor):
        biases = [name for name, t in _tensors(twin) if t.shape == (E,) and "." not in name and name != spec.bias]
    for name, weight in named.items():
        if weight.ndim != 2 or not weight.is_floating_point():
            continue
        for transposed in (False, True):
            if weight.shape == ((hidden.shape[-1], E) if transposed else (E, hidden.shape[-1])):
                for bias in (None, *biases):
                    matrix = Matrix(name, transposed, bias)
                    yield matrix, matrix(twin, hidden).float()


def _choice(twin: nn.Module, spec: MoESpec, found: Answers, likely: Any, taken: set[str | None]) -> ChoiceRule | None:
    """Find what experts are ranked by: a bias that the block has, groups that its experts may form."""
    E = found.logits.shape[-1]
    named = dict(_tensors(twin))
    biases: list[str | None] = [None, *(n for n, t in named.items() if t.shape == (E,) and n not in taken)]
    if spec.bias is not None:
        biases = [spec.bias] if spec.bias in named else []
    pairs = [(1, 1), *((g, kept) for g in range(2, E) if E % g == 0 for kept in range(1, g))]
    if spec.groups is not None:
        pairs = [(g, kept) for g, kept in pairs if g == spec.groups and spec.kept_groups in (None, kept)]
    for groups, kept in pairs:
        for bias in biases:
            asked = replace(found, bias=None if bias is None else named[bias].float())
            if kept * (E // groups) < found.ids.shape[-1] or (E // groups < 2 <= groups):
                continue
            said = spec.groups is not None and groups > 1
            rule = (
                _grouped(asked, likely, bias, groups, kept) if said else choice_rule(asked, likely, bias, groups, kept)
            )
            if rule is not None:
                return rule
    return None


def _grouped(found: Answers, likely: Any, bias: str | None, groups: int, kept: int) -> ChoiceRule | None:
    """Find the rule among those with groups, which are said to be there.

    Groups that never decide between a token's own experts still forbid others: nothing shows them but the spec.
    """
    own = found.ids.sort(-1).values
    for kind in (likely, "softmax", "sigmoid", "sqrt_softplus", "logits"):
        for by in ("top2-sum", "max"):
            rule = ChoiceRule(kind, bias, groups, kept, by)
            ranked = choice_scores(rule, found.logits, found.bias)
            if torch.equal(ranked.topk(own.shape[-1], dim=-1).indices.sort(-1).values, own):
                return rule
    return None


def _own_bias(twin: nn.Module, path: str) -> set[str | None]:
    """A Linear's own bias is in its logits already."""
    return {f"{path}.bias"} if isinstance(at(twin, path), nn.Linear) else set()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
