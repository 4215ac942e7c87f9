"""vLLM's model runners, of which it has two: what they are about to run is written down before each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lynx.adapters.vllm.requests import ExactRequests
from lynx.adapters.vllm.rows import Requests, StepRows
from lynx.errors import UnsupportedModelError

_MARK = "_lynx"

steps: WeakKeyDictionary[nn.Module, StepRows] = WeakKeyDictionary()
"""The rows of the step under way, by model as vLLM loaded it."""


def runner_class(engine: Any) -> Any:
    """The class of the runner that an engine takes."""
    second = getattr(engine, "use_v2_model_runner", False)
    module = "vllm.v1.worker.gpu.model_runner" if second else "vllm.v1.worker.gpu_model_runner"
    return import_module(module).GPUModelRunner


def watch(model: nn.Module, engine: Any, device: torch.device) -> StepRows:
    """Have the rows of a model's steps written before each of them.

    Args:
        model: As vLLM loaded it.
        engine: vLLM's configuration.
        device: Where the model runs.

    Raises:
        UnsupportedModelError: The runner prepares its steps in a way that is not known.
    """
    kind = runner_class(engine)
    second = getattr(engine, "use_v2_model_runner", False)
    name, read = ("prepare_inputs", _second) if second else ("_prepare_inputs", _first)
    prepare = getattr(kind, name, None)
    if prepare is None:
        raise UnsupportedModelError(
            f"Lynx is configured, but this vLLM's model runner has no {name}(), where Lynx reads a step's rows; "
            "the vLLM page of the docs lists the versions tried."
        )
    if not hasattr(prepare, _MARK):
        setattr(kind, name, _then_write(prepare, read))
    rows = steps[model] = StepRows(engine.scheduler_config.max_num_batched_tokens, device)
    return rows


def _then_write(prepare: Callable[..., Any], read: Callable[..., Requests]) -> Callable[..., Any]:
    @wraps(prepare)
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, scheduler_output, *args, **kwargs)
        rows = _rows_of(self)
        if rows is not None:
            rows.write(read(self, scheduler_output, prepared, rows.exact))
        return prepared

    setattr(prepare_inputs, _MARK, True)
    return prepare_inputs


def _rows_of(runner: Any) -> StepRows | None:
    """The rows of a runner's model, also where something was put around it after it was loaded."""
    model = runner.get_model()
    return steps.get(model) or next((steps[inner] for inner in model.modules() if inner in steps), None)


def _first(runner: Any, step: Any, prepared: Any, exact: ExactRequests) -> Requests:
    batch = runner.input_batch
    names, count = batch.req_ids, batch.num_reqs
    exact.see(step.scheduled_new_reqs, runner.requests)
    return Requests(
        scheduled=np.array([step.num_scheduled_tokens[name] for name in names]),
        computed=batch.num_computed_tokens_cpu[:count],
        prompt=batch.num_prompt_tokens[:count],
        exact=np.array(exact.among(names)),
    )


def _second(runner: Any, step: Any, batch: Any, exact: ExactRequests) -> Requests:
    exact.see(step.scheduled_new_reqs, runner.req_states.req_id_to_index)
    scheduled, computed = batch.num_scheduled_tokens, batch.num_computed_tokens_np
    if getattr(runner, "adaptive_verification", None) is not None and step.scheduled_spec_decode_tokens:
        computed = np.zeros_like(computed)  # the device will share the drafts out: whose row is whose is not known here
    return Requests(scheduled, computed, batch.prefill_len_np, np.array(exact.among(batch.req_ids)))
