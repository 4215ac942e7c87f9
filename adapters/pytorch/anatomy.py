"""Find MoE blocks in a module tree, and name what they could be made of: structure only, nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lynx.errors import ConfigError, did_you_mean
from lynx.layers import MoESpec

LOOKED_FOR = (
    "modules with a router (a Linear or a module with an (E, H) matrix) beside a ModuleList of E experts or stacked "
    "(E, ., .) weights, or with the methods route() and run()"
)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Stacked expert weights as a block could hold them; names are paths in the block.

    Attributes:
        up: ``(E, I, H)``, with the gate in it ``(E, 2I, H)``.
        down: ``(E, H, I)``.
        gate: ``(E, I, H)`` where it is a tensor of its own.
        transposed: Stored input first: ``(E, H, I)`` and ``(E, I, H)``.
    """

    up: str
    down: str
    gate: str | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a block could be made of.

    Attributes:
        router: Path of the router: a module, or a matrix.
        num_experts: ``E``.
        hidden_size: ``H``.
        modules: Path of the ModuleList of experts, or None.
        stacked: Stacked weights, or None.
    """

    router: str
    num_experts: int
    hidden_size: int
    modules: str | None = None
    stacked: Stacked | None = None


def at(block: nn.Module, path: str) -> Any:
    """Return what stands at a path in a block."""
    found: Any = block
    return reduce(getattr, path.split("."), found)


def is_authored(module: nn.Module) -> bool:
    """Whether the author has split the block's forward in two methods, see :class:`lynx.MoELayer`."""
    return callable(getattr(module, "route", None)) and callable(getattr(module, "run", None))


def find_blocks(model: nn.Module, spec: MoESpec) -> list[tuple[str, nn.Module]]:
    """Return the MoE blocks by path, in the order of the module tree.

    Raises:
        ConfigError: The spec names blocks that are not there.
    """
    modules = dict(model.named_modules())
    if spec.blocks:
        found = [(path, module) for path, module in modules.items() if any(_is(path, module, b) for b in spec.blocks)]
        for pattern in spec.blocks:
            if not any(_is(path, module, pattern) for path, module in modules.items()):
                kinds = {type(module).__name__ for module in modules.values()}
                raise ConfigError(
                    f"no module of {type(model).__name__} is called {pattern!r}."
                    f"{did_you_mean(pattern, [*modules, *kinds])} `blocks` are patterns of module paths or class names."
                )
        return found
    candidates = {path: module for path, module in modules.items() if is_authored(module) or _fits(module, spec)}
    if not candidates and spec != MoESpec():
        for _, module in find_blocks(model, MoESpec()):
            list(anatomies(module, spec))  # says which name is not there
    # what holds a block is none: a layer whose width happens to be the number of experts looks like one
    inner = [
        path
        for path in candidates
        if not any(other.startswith(f"{path}.") or (not path and other) for other in candidates)
    ]
    return [(path, candidates[path]) for path in inner]


def anatomies(block: nn.Module, spec: MoESpec) -> Iterator[Anatomy]:
    """Return what a block could be made of, likeliest first; nothing if it is no MoE block by its structure."""
    layouts: list[tuple[int, str | None, list[Stacked]]] = []
    if not spec.up:
        layouts += [(len(child), name, []) for name, child in _module_lists(block, spec)]
    if not spec.experts:
        layouts += [(E, None, stacks) for E, stacks in _stacks(block, spec)]
    for E, modules, stacks in layouts:
        for router, width in _routers(block, spec, E, modules):
            if modules is not None:
                yield Anatomy(router, E, width, modules=modules)
            for stacked in stacks:
                for named in _orientations(block, spec, stacked, width):
                    yield Anatomy(router, E, width, stacked=named)


def _fits(module: nn.Module, spec: MoESpec) -> bool:
    try:
        return next(anatomies(module, spec), None) is not None
    except ConfigError:  # a name that another kind of module does not have
        return False


def check_names(block: nn.Module, spec: MoESpec) -> None:
    """Raise where a spec names parts that a block does not have."""
    for name in filter(None, (*(spec.shared or ()), spec.shared_gate, spec.bias)):
        if not _has(block, name):
            known = [path for path, _ in [*block.named_children(), *block.named_parameters(), *block.named_buffers()]]
            raise ConfigError(f"{type(block).__name__} has no {name!r}.{did_you_mean(name, known)}")


def _is(path: str, module: nn.Module, pattern: str) -> bool:
    parts, asked = path.split("."), pattern.split(".")  # a star stands for one part of a path, not for several
    fits = len(parts) == len(asked) and all(fnmatchcase(part, each) for part, each in zip(parts, asked, strict=True))
    return fits or type(module).__name__ == pattern


def _module_lists(block: nn.Module, spec: MoESpec) -> Iterator[tuple[str, nn.ModuleList]]:
    if spec.experts:
        found = at(block, spec.experts) if _has(block, spec.experts) else None
        if not isinstance(found, nn.ModuleList):
            raise ConfigError(f"`experts: {spec.experts}` is no ModuleList of {type(block).__name__}.")
        yield spec.experts, found
        return
    for name, child in block.named_children():
        lists = [(name, child), *((f"{name}.{inner}", below) for inner, below in child.named_children())]
        for path, found in lists:
            if isinstance(found, nn.ModuleList) and len(found) > 1 and len({type(each) for each in found}) == 1:
                yield path, found


def _stacks(block: nn.Module, spec: MoESpec) -> Iterator[tuple[int, list[Stacked]]]:
    """Group the three-dimensional weights by their first dimension, and say which could be what."""
    if spec.up and spec.down:
        for name in filter(None, (spec.up, spec.down, spec.gate)):
            found = at(block, name) if _has(block, name) else None
            if not isinstance(found, Tensor) or found.ndim != 3:
                raise ConfigError(f"{name!r} is no stacked weight (E, ., .) of {type(block).__name__}.")
        yield at(block, spec.up).shape[0], [Stacked(spec.up, spec.down, spec.gate, False)]
        return
    found_here = {n: p for n, p in block.named_parameters() if p.ndim == 3 and n.count(".") < 2 and len(p) > 1}
    for E in sorted({len(p) for p in found_here.values()}):
        names = [name for name, p in found_here.items() if len(p) == E]
        if len(names) == 2:
            yield E, [Stacked(a, b, None, False) for a, b in (names, names[::-1])]
        elif len(names) == 3:
            orders = [(0, 2, 1), (2, 0, 1), (0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)]  # gate, up, down
            yield E, [Stacked(names[up], names[down], names[gate], False) for gate, up, down in orders]


def _orientations(block: nn.Module, spec: MoESpec, named: Stacked, width: int) -> Iterator[Stacked]:
    """The ways in which stacked weights of these names can be stored, by their shapes."""
    up, down = at(block, named.up).shape, at(block, named.down).shape
    gate = up if named.gate is None else at(block, named.gate).shape
    for transposed in (False, True) if spec.transposed is None else (spec.transposed,):
        up_in, up_out = (up[1], up[2]) if transposed else (up[2], up[1])
        down_in, down_out = (down[1], down[2]) if transposed else (down[2], down[1])
        fits = up_in == width and down_out == width and gate == up
        if fits and (up_out == down_in or (named.gate is None and up_out == 2 * down_in)):
            yield Stacked(named.up, named.down, named.gate, transposed)


def _routers(block: nn.Module, spec: MoESpec, E: int, experts: str | None) -> Iterator[tuple[str, int]]:
    """The routers a block could have, each with the hidden size it takes."""
    if spec.router:
        if not _has(block, spec.router):
            known = [name for name, _ in block.named_children()]
            raise ConfigError(
                f"{type(block).__name__} has no {spec.router!r}.{did_you_mean(spec.router, known)} "
                f"It has: {', '.join(known)}."
            )
        yield from ((spec.router, width) for width in _widths(at(block, spec.router), E))
        return
    holder = experts.split(".")[0] if experts else None
    found = []
    for name, child in block.named_children():
        if name != holder and not isinstance(child, nn.ModuleList):
            found += [(name, width) for width in _widths(child, E)]
    found += [(name, width) for name, p in block.named_parameters(recurse=False) for width in _widths(p, E)]
    # the other matrices with as many rows are tried after those that are called what they are
    yield from sorted(found, key=lambda each: not any(word in each[0].lower() for word in ("gate", "router")))


def _widths(router: Any, E: int) -> list[int]:
    """The hidden sizes that a router of ``E`` experts could take, none if it is no router."""
    tensors = [router] if isinstance(router, Tensor) else [p for p in router.parameters() if isinstance(p, Tensor)]
    shapes = [p.shape for p in tensors if p.ndim == 2 and E in p.shape]
    return list(dict.fromkeys(other for rows, columns in shapes for other in _other(rows, columns, E)))


def _other(rows: int, columns: int, E: int) -> list[int]:
    return [columns] if rows == E else [rows]


def _has(block: nn.Module, path: str) -> bool:
    try:
        at(block, path)
    except AttributeError:
        return False
    return True


def expert_bytes(block: nn.Module, anatomy: Anatomy) -> int:
    """Bytes of one expert's weights."""
    tensors = expert_tensors(block, anatomy)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // anatomy.num_experts


def expert_tensors(block: nn.Module, anatomy: Anatomy) -> list[torch.Tensor]:
    """All experts' weights, in an order that is always the same."""
    if anatomy.modules is not None:
        return list(at(block, anatomy.modules).parameters())
    if anatomy.stacked is None:
        return []
    names = (anatomy.stacked.up, anatomy.stacked.down, anatomy.stacked.gate)
    return [at(block, name) for name in names if name is not None]
