"""Requests that ask for exact routing: a flag for each request of a step, on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lynx.log import logger

KEY, EXACT = "lynx", "exact"
_MARK = "_lynx"

flags: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""By model, bool ``(max_num_seqs,)``: which requests of the step under way are exact. Captured graphs read it."""


def watch(model: nn.Module, engine: Any, device: torch.device) -> str:
    """Refresh a model's flags before each of its steps.

    Args:
        model: As vLLM loaded it.
        engine: vLLM's configuration.
        device: Where the flags go.

    Returns:
        Why requests cannot be told apart here, in a few words; empty if they can.
    """
    if getattr(engine, "use_v2_model_runner", False):
        return "Lynx does not know the rows of vLLM's second model runner (VLLM_USE_V2_MODEL_RUNNER=0 takes the first)"
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    prepare = getattr(GPUModelRunner, "_prepare_inputs", None)
    if prepare is None:
        return "this vLLM prepares its inputs in another way"
    flags[model] = torch.zeros(engine.scheduler_config.max_num_seqs, dtype=torch.bool, device=device)
    if not hasattr(prepare, _MARK):
        GPUModelRunner._prepare_inputs = _then_mark(prepare)
    return ""


def _then_mark(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prepare)
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        mine = flags.get(self.get_model())
        if mine is not None:
            mark(mine, [self.requests[name] for name in self.input_batch.req_ids])
        return prepared

    setattr(_prepare_inputs, _MARK, True)
    return _prepare_inputs


def mark(mine: Tensor, requests: list[Any]) -> None:
    """Write the flags of a step's requests, in their order."""
    exact = [wants_exact(request) for request in requests]
    mine.zero_()
    if any(exact):
        given = torch.tensor(exact)
        given = given.pin_memory() if mine.is_cuda else given  # else the copy would wait for the device
        mine[: len(exact)].copy_(given, non_blocking=True)


def wants_exact(request: Any) -> bool:
    """Whether a request's sampling parameters say ``extra_args={"lynx": "exact"}``; any other word is exact too."""
    word = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
    if word not in (None, EXACT) and str(word) not in _said:
        _said.add(str(word))
        logger.warning("lynx.request_not_understood", lynx=word, known=EXACT)
    return word is not None


_said: set[str] = set()
