"""Which MoE layers to attach to, and what hand-written ones are made of: the two forms of the key ``layers``."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from lynx.routing import Routing, Score
from lynx.validation import Options


def _listed(value: Any) -> Any:
    """A single name is a list of one."""
    return (value,) if isinstance(value, str) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class LayerFilter(Options):
    """Which MoE layers to attach to, by their index among the model's MoE layers or by module path."""

    include: tuple[int | str, ...] = ()
    exclude: tuple[int | str, ...] = ()

    @classmethod
    def described(cls) -> str:
        """Return what error messages call this section."""
        return "`layers`"

    @model_validator(mode="after")
    def _says_something(self) -> LayerFilter:
        if type(self) is LayerFilter and not self.include and not self.exclude:
            raise ValueError("`layers` needs `include` or `exclude`; to take every layer, say `layers: all`")
        return self


class MoESpec(LayerFilter):
    """What the MoE blocks of a hand-written model are made of.

    Every field is optional: what is not said is found by structure and by asking the block. What is said is held
    against what the block does, and a block that does something else is refused. Names are paths inside the block.

    Attributes:
        include: As in :class:`LayerFilter`.
        exclude: As in :class:`LayerFilter`.
        blocks: Which modules are MoE blocks: patterns of module paths (``layers.*.moe``, where a star stands for one
            part) or class names. Without one, every module that holds a router beside experts.
        router: The router: a module, or the weight matrix itself.
        experts: The ``ModuleList`` of expert modules.
        up: Stacked up projections ``(E, I, H)``, or ``(E, 2I, H)`` with the gate in them; or transposed.
        down: Stacked down projections ``(E, H, I)``, or transposed.
        gate: Stacked gate projections, where they are a tensor of their own.
        transposed: Whether stacked weights are stored input first: ``(E, H, I)`` up and ``(E, I, H)`` down.
        activation: The activation of stacked experts: a name in :mod:`lynx.kernels.gates`, or ``relu``.
        shared: Modules that every token runs through beside its experts; an empty list for none.
        shared_gate: The module whose sigmoid weighs the shared experts.
        bias: What the router adds to its scores for the choice alone: a parameter or buffer ``(E,)``.
        top_k: ``k``, experts per token.
        score: Function from logits to scores.
        renormalise: Whether the chosen scores are divided by their sum.
        scale: Constant factor on every weight.
        groups: Groups of experts that a token chooses from first, 1 for none.
        kept_groups: How many of them it keeps.
    """

    blocks: _Names = ()
    router: str | None = None
    experts: str | None = None
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    transposed: bool | None = None
    activation: str | None = None
    shared: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    shared_gate: str | None = None
    bias: str | None = None
    top_k: int | None = Field(None, ge=1)
    score: Score | None = None
    renormalise: bool | None = None
    scale: float | None = None
    groups: int | None = Field(None, ge=1)
    kept_groups: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _agrees(self) -> MoESpec:
        if self.experts is not None and (self.up or self.down or self.gate):
            raise ValueError("`experts` names a ModuleList, `up`, `down` and `gate` stacked weights; give one of them")
        if (self.up is None) != (self.down is None) or (self.gate is not None and self.up is None):
            raise ValueError("stacked experts need both `up` and `down`")
        return self


class MoELayer(Protocol):
    """What an author may write so that Lynx takes a layer without reading it: a forward in two methods.

    A module that has them is taken by :func:`lynx.attach` as it is; it need not import Lynx or derive from this class.
    Its forward must be ``run(hidden, ids, weights)`` with the decision of ``route(hidden)``, in the shape of its input,
    which is checked at attach. Where ``route`` returns logits, the module says ``top_k``, and ``rule`` (a
    :class:`lynx.WeightRule`) if it is not a softmax over the chosen.
    """

    def route(self, hidden: Tensor) -> Tensor | Routing:
        """Return router logits ``(T, E)`` for hidden states ``(T, H)``, or the whole decision: :meth:`Routing.of`."""
        ...

    def run(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Combine ``(T, H)`` by ids and weights ``(T, k)`` to the layer's whole output ``(T, H)``.

        A slot with weight 0 is a lost one: it repeats another slot's id, and nothing need be computed for it.
        """
        ...
