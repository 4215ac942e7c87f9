"""What stand-ins answer, added where vLLM's routed experts give their output; and whose experts those are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lynx.adapters.vllm.hook import hooks
from lynx.adapters.vllm.routers import has_room
from lynx.errors import UnsupportedModelError
from lynx.standins_file import experts_hash

_FORWARD = "forward_modular"


class BehindExperts:
    """Stands where the runner of a layer calls its routed experts, and adds to what they give.

    That is before shared experts, scales and other ranks come in. The adding is an op, opaque to torch.compile, as the
    router's hook is: what a step has lost is known when it runs, not when it is traced.

    Args:
        experts: vLLM's routed experts of a layer.
        number: The number of the layer's hook.
    """

    def __init__(self, experts: Any, number: int) -> None:
        self._experts, self._number = experts, number
        self._before = vars(experts).get(_FORWARD)
        self.forward = getattr(experts, _FORWARD)
        setattr(experts, _FORWARD, self)

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """Return the experts' output with the answers."""
        output = self.forward(x, *args, **named)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"vLLM's kernel leaves its output unfinished here ({type(output).__name__}), so that no stand-in can "
                "be added to it; leave out `standins`, or choose another kernel with --moe-backend."
            )
        answered: Tensor = torch.ops.lynx.vllm_answer(output, x, self._number)
        return answered

    def remove(self) -> None:
        """Have the experts called as before; compiled code that goes on calling the op finds nothing to add."""
        if vars(self._experts).get(_FORWARD) is not self:
            return  # someone stands before this one, who must not be taken out
        if self._before is None:
            delattr(self._experts, _FORWARD)
        else:
            setattr(self._experts, _FORWARD, self._before)


def note_experts(model: nn.Module) -> None:
    """Write down whose experts a model has, before vLLM brings their weights into the layout of its kernels."""
    for layer in model.modules():
        router: Any = getattr(layer, "router", None)
        usual = has_room(router) and hasattr(layer, "is_monolithic") and hasattr(layer, "moe_config")
        if usual and not _why_not(layer):
            experts: Any = layer.routed_experts
            router.lynx_experts = experts_hash([experts.w13_weight, experts.w2_weight])


def hash_of(layer: Any, name: str) -> str:
    """Return what was noted of a layer's experts: the hash that `lynx calibrate` gives to the same checkpoint.

    Raises:
        UnsupportedModelError: Nothing can be added to what they give, or it is not known whose they are.
    """
    reason = _why_not(layer)
    if not reason and not layer.router.lynx_experts:
        reason = "its experts' weights were not seen before vLLM laid them out for its kernels (by --load-format)"
    if reason:
        raise UnsupportedModelError(f"layer {name!r} takes no stand-ins: {reason}; leave out `standins`.")
    found: str = layer.router.lynx_experts
    return found


def _why_not(layer: Any) -> str:
    """Say why stand-ins cannot answer for the experts of a layer; empty if they can."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    config, experts = layer.moe_config, layer.routed_experts
    if type(experts) is not RoutedExperts:
        return f"its experts are {type(experts).__name__}, which are not known"
    if type(experts.quant_method) is not UnquantizedFusedMoEMethod:
        return (
            f"its experts are run by {type(experts.quant_method).__name__}, and a file is only known to fit weights "
            "that are not quantised"
        )
    if config.tp_size > 1 or config.ep_size > 1:
        return "its experts are spread over processes, each of which has a part of their sum"
    if config.is_lora_enabled:
        return "adapters (LoRA) change what its experts give"
    if config.num_experts != config.num_logical_experts:
        return "some of its experts are there more than once"
    if experts.apply_router_weight_on_input:
        return "it weighs what goes into experts, not what comes out"
    if layer.routed_input_transform is not None or layer.routed_output_transform is not None:
        return "its experts work between transforms of their own"
    if config.has_bias or not config.is_act_and_mul:
        return "its experts are not of a gate, an up and a down projection without biases"
    sizes = ((config.hidden_dim, "hidden_dim_unpadded"), (config.intermediate_size_per_partition, _INNER))
    if any(getattr(config, name) not in (None, size) for size, name in sizes):
        return "its kernels want weights that are padded"
    return ""


_INNER = "intermediate_size_per_partition_unpadded"


@torch.library.custom_op("lynx::vllm_answer", mutates_args=())
def answer(output: Tensor, hidden: Tensor, number: int) -> Tensor:
    """Add what the stand-ins answer for what a hook left out last."""
    hook = hooks[number]
    lost = None if hook is None else hook.take_lost()
    if hook is None or lost is None or hook.selection.standins is None:
        return output.clone()  # an op's outputs must not be its inputs
    return hook.selection.standins.add(output, hidden, *lost)


@answer.register_fake
def _(output: Tensor, hidden: Tensor, number: int) -> Tensor:
    return torch.empty_like(output)
