"""Stand-ins for a block: its code with other insides, so that what it computes can be seen without running the model.

A twin shares nothing that it could change: parameters are drawn anew in float32 on the CPU, hooks are left out, and
expert modules are replaced by functions that are told apart easily. So what is seen depends on the block's code and
not on what it has learned, where its weights are or what type they have.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

CODE = 1024.0  # large beside what a block may add, so that little is rounded away


@dataclass(slots=True)
class Play:
    """What the stubs of one twin do at the moment.

    Attributes:
        experts: ``zero`` gives 0, ``code`` gives expert ``first + j`` the j-th unit vector times ``CODE``,
            ``act`` a function of its input that no other expert has.
        first: The first expert that has a code.
        shared: What the other modules give: ``zero`` or ``act``.
        calls: What every watched module was called with and answered, by its path.
    """

    experts: Literal["zero", "code", "act"] = "zero"
    first: int = 0
    shared: Literal["zero", "act"] = "zero"
    calls: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)


class Stub(nn.Module):
    """Stands for an expert, or for a module that every token runs through.

    Args:
        play: What to do.
        path: Its path in the block.
        expert: Its number, None for a module that is no expert.
        seed: Draws its function.
    """

    def __init__(self, play: Play, path: str, expert: int | None, seed: int) -> None:
        super().__init__()
        self.play, self.path, self.expert, self.seed = play, path, expert, seed

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Answer as the play says, in the shape of the input."""
        role = self.play.shared if self.expert is None else self.play.experts
        output = torch.zeros_like(hidden)
        if role == "act":
            output = stub_function(self.seed, hidden)
        elif role == "code" and self.expert is not None:
            place = self.expert - self.play.first
            if 0 <= place < hidden.shape[-1]:
                output[..., place] = CODE
        if self.expert is None:
            self.play.calls[self.path] = (hidden, output)
        return output


@dataclass(frozen=True, slots=True)
class Watch:
    """Forward hook that writes down what a module was called with and answered."""

    play: Play
    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Write it down."""
        given = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if given is not None:
            self.play.calls[self.path] = (given, output)


def stub_function(seed: int, hidden: Tensor) -> Tensor:
    """Return a smooth function of each row of ``(..., H)``, another for every seed."""
    generator = torch.Generator().manual_seed(seed)
    slope, shift = torch.randn(2, hidden.shape[-1], generator=generator, dtype=torch.float32)
    answer: Tensor = torch.tanh(hidden * slope) + shift
    return answer


def drawn(shape: torch.Size, generator: torch.Generator, fan_in: int) -> Tensor:
    """Draw a parameter: logits of standard deviation 2 tell rules apart and saturate no score."""
    value = torch.randn(shape, generator=generator, dtype=torch.float32)
    return value * (2.0 / fan_in**0.5 if len(shape) > 1 else 0.3)


def copied(
    module: nn.Module,
    tensors: Callable[[str, Tensor], Tensor],
    stubs: Mapping[str, nn.Module] | None = None,
    path: str = "",
) -> Any:
    """Copy a module in eval mode, without hooks and without what stands in its instance in place of its forward.

    Args:
        module: Left as it is.
        tensors: Gives each parameter or buffer, by its path, its value in the copy.
        stubs: Modules that take the place of those with these paths.
        path: Path of the module itself.
    """
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            twin.__dict__[name] = OrderedDict()
    for kind in ("_parameters", "_buffers"):
        found = vars(module)[kind].items()
        twin.__dict__[kind] = {k: None if v is None else tensors(f"{path}{k}", v) for k, v in found}
    children = {}
    for name, child in vars(module)["_modules"].items():
        inner = f"{path}{name}"
        if child is None or (stubs is not None and inner in stubs):
            children[name] = None if child is None else (stubs or {})[inner]
        else:
            children[name] = copied(child, tensors, stubs, f"{inner}.")
    twin.__dict__["_modules"] = children
    twin.__dict__["training"] = False
    twin.__dict__.pop("forward", None)
    twin.__dict__.pop("_compiled_call_impl", None)
    return twin
