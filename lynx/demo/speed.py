"""What a setting buys: decode time on a random-weight model whose layers have a real shape and fit no cache.

The reference model is small enough to live in a processor's cache, so its time says nothing. Here the layers are
OLMoE's (H 2048, I 1024, 64 experts, top-8); routing is random and decides nothing but which experts are read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lynx.attachment import attach
from lynx.demo.cache import as_argument

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 1024, 64, 8
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 4
_MOST_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Decode time of one setting, interleaved with its baselines in one run.

    Attributes:
        active: Mean active experts per layer and step.
        ratio: Median over rounds of its time by that of exact routing with the same experts implementation.
        low: Lower quartile of the ratio.
        high: Upper quartile of the ratio.
        ratio_alone: Median of its time by that of the model without Lynx.
        milliseconds: Median time of a decode step.
    """

    active: float
    ratio: float
    low: float
    high: float
    ratio_alone: float
    milliseconds: float


def layers_that_fit(share: float = 0.25) -> int:
    """How many float32 layers of the real shape take at most ``share`` of the free memory; 0 if not even one."""
    free = free_memory()
    return 0 if free is None else min(_MOST_LAYERS, int(free * share) // LAYER_BYTES)


def free_memory() -> int | None:
    """Bytes of memory that programs can still use, None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def real_shape_model(layers: int) -> Any:
    """Build the random-weight model in float32, in eval mode.

    Args:
        layers: MoE layers, 1.6 GB each.
    """
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    # Experts share one random pattern, rolled from one to the next: drawing billions of numbers takes minutes, and
    # the time of a matrix product does not depend on its values.
    pattern = torch.randn(2 * INTERMEDIATE * HIDDEN, generator=generator) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                for expert, weight in enumerate(parameter):
                    weight.copy_(pattern.roll(expert * 977)[: weight.numel()].view_as(weight))
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = HIDDEN**-0.5 if "gate" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        # not a parameter: to_empty left it undefined
        rotary: Any = model.model.rotary_emb
        rotary.inv_freq.copy_(type(rotary)(config=config).inv_freq)
    model.train(False)
    return model


@torch.inference_mode()
def decode_times(
    model: Any, budgets: Sequence[int], batch: int, rounds: int, advance: Callable[[], None]
) -> dict[int | None, Timing]:
    """Time decode steps at several budgets of active experts, interleaved with exact routing and the model alone.

    Args:
        model: From :func:`real_shape_model`.
        budgets: Active experts per layer to restrict a step to. Exact routing, under None, is always timed.
        batch: ``B``, sequences.
        rounds: Times each is measured.
        advance: Called after each round, for a progress bar.
    """
    # imported here: transformers is loaded where there is a model of it, and only there
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, 512, (batch, 16), generator=generator)
    cached = as_argument(DynamicCache(config=model.config), model)
    model(input_ids=prompt, **cached, use_cache=True)
    tokens = torch.randint(2, 512, (rounds + 1, batch, 1), generator=generator)
    names: list[int | str | None] = ["alone", None, *budgets]
    times: dict[int | str | None, list[float]] = {name: [] for name in names}
    active: dict[int | str | None, float] = {}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with _attached(model, name) as handle:
                start = time.perf_counter()
                model(input_ids=tokens[turn], **cached, use_cache=True)
                elapsed = time.perf_counter() - start
                if handle is not None:
                    active[name] = handle.report().total["decode"].active_after
            if turn:  # the first round warms up
                times[name].append(elapsed)
        advance()
    return {name: _timing(times[name], times[None], times["alone"], active[name]) for name in (None, *budgets)}


def _attached(model: Any, name: int | str | None) -> AbstractContextManager[Any]:
    if name == "alone":
        return nullcontext()
    if name is None:
        return attach(model, "exact", experts="lynx")
    return attach(model, "top-budget", budget=name, experts="lynx")


def _timing(times: list[float], exact: list[float], alone: list[float], active: float) -> Timing:
    def ratios(base: list[float]) -> tuple[float, ...]:
        each = [one / other for one, other in zip(times, base, strict=True)]
        return tuple(statistics.quantiles(each, n=4, method="inclusive")) if len(each) > 1 else (each[0],) * 3

    low, middle, high = ratios(exact)
    return Timing(active, middle, low, high, ratios(alone)[1], 1000 * statistics.median(times))
