"""What is known of a router of SGLang, found by asking it. Not run on an engine yet."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lynx.adapters.rules import Answers, ChoiceRule, choice_rule, weight_rule
from lynx.adapters.sglang.hook import CAUGHT, SEAM
from lynx.routing import WeightRule

_ROWS = 64
_OWN_ONLY = "tokens only keep or lose their own experts"


@dataclass(frozen=True, slots=True)
class RouterRules:
    """What is known of a router.

    Attributes:
        choice: What it ranks experts by.
        weights: How it weighs them; ``repick`` is False where no known rule fits.
        bias: What it adds to scores for the choice, ``(E,)``: the model's own tensor, or None.
        notes: What a user should know.
        refused: Why the router cannot be taken, or an empty string.
    """

    choice: ChoiceRule = field(default_factory=ChoiceRule)
    weights: WeightRule = field(default_factory=lambda: WeightRule(renormalise=False, repick=False))
    bias: Tensor | None = None
    notes: tuple[str, ...] = ()
    refused: str = ""


def find_rules(topk: Any, num_experts: int, hidden_size: int, device: torch.device) -> RouterRules:
    """Ask a router for its decision on random logits, and find the rules that give the same.

    Its bias is a random one meanwhile: its own may be zero, or not loaded yet.

    Args:
        topk: SGLang's ``TopK``.
        num_experts: ``E``.
        hidden_size: ``H``.
        device: Where the model is.
    """
    from sglang.srt.layers.moe import topk as host

    config = topk.topk_config
    generator = torch.Generator().manual_seed(0)
    # of standard deviation 2: wide enough to tell rules apart, narrow enough that no score saturates
    logits = (torch.randn(_ROWS, num_experts, generator=generator) * 2).to(device)
    own = config.correction_bias
    bias = None if own is None else (torch.randn(num_experts, generator=generator) * 0.3).to(own)
    asked = replace(config, correction_bias=bias, allow_routed_experts_capture=False)
    caught: list[tuple[Tensor, Tensor]] = []
    setattr(asked, CAUGHT, caught)
    try:
        with torch.no_grad():
            given = host.select_experts(
                hidden_states=torch.zeros(_ROWS, hidden_size, device=device),
                router_logits=logits.clone(),
                topk_config=asked,
                layer_id=topk.layer_id,
            )
    except Exception as error:
        return RouterRules(notes=(f"it could not be asked ({type(error).__name__}: {error}); {_OWN_ONLY}",))
    if not caught:
        return RouterRules(refused=f"its decision does not pass {SEAM.rpartition('.')[2]}, where Lynx stands")
    if hasattr(given, "packed_topk_ids"):
        return RouterRules(
            refused="its decision is packed before Lynx sees it; choose another kernel with --moe-runner-backend "
            "(triton, for instance), and leave SGLANG_OPT_LORA_FUSED_TOPK_PACK out"
        )
    k = config.top_k - config.num_shared_topk_slots  # fused shared experts have slots of their own behind
    weights, ids = caught[0]
    found = Answers(logits, weights[:, :k].float(), ids[:, :k].long(), None if bias is None else bias.float())
    if not bool(((found.ids >= 0) & (found.ids < num_experts)).all()):
        return RouterRules(notes=(f"it gives out other ids; {_OWN_ONLY}",))
    return _fitting(found, config)


def _fitting(found: Answers, config: Any) -> RouterRules:
    rule = weight_rule(found)
    groups = (int(config.num_expert_group or 1), int(config.topk_group or 1)) if config.use_grouped_topk else (1, 1)
    name = None if found.bias is None else "correction_bias"
    choice = choice_rule(found, rule.score if rule is not None else "softmax", name, *groups)
    notes = []
    if choice is None:
        notes.append(f"what the router ranks experts by is not known; {_OWN_ONLY}")
    if rule is None:
        notes.append(f"no known weight rule fits; {_OWN_ONLY}")
    return RouterRules(
        choice=choice or ChoiceRule(),
        weights=replace(rule or WeightRule(renormalise=False), repick=not notes),
        bias=config.correction_bias.detach() if choice is not None and choice.bias else None,
        notes=tuple(notes),
    )
