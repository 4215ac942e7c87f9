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

from lynx.adapters.vllm.requests import Wishes
from lynx.adapters.vllm.rows import Requests, StepRows
from lynx.errors import UnsupportedModelError
from lynx.log import logger
from lynx.tpot import TpotControl

_MARK = "_lynx"


class Watched:
    """A model whose steps are known before they run.

    Args:
        width: Most rows of a step.
        device: Where the model runs.
        ranks: Processes that must choose alike (tensor parallelism).

    Attributes:
        wishes: What requests ask for.
        rows: Where the rows of a step are written for the strategy that is on; None while none is.
        tpot: What is told when steps begin, None where no time is to be held.
        warming: Whether vLLM runs steps of its own making.
        traced: Whether code is compiled, without guards, that calls what was attached when the model was loaded: on
            CPUs, where routers and experts are not inside an op of vLLM's.
        captured: Whether CUDA graphs were captured, which go on calling the hooks of that time.
        told: Whether a step came by of which nothing had been told.
    """

    def __init__(self, width: int, device: torch.device, ranks: int = 1) -> None:
        self.width, self.device, self.ranks = width, device, ranks
        self.wishes = Wishes()
        self.rows: StepRows | None = None
        self.tpot: TpotControl | None = None
        self.traced = self.warming = self.captured = self.told = self.complained = False


watched: WeakKeyDictionary[nn.Module, Watched | None] = WeakKeyDictionary()
"""By model as vLLM loaded it, and as its runner holds it; None for models that are not ours."""


def runner_class(engine: Any) -> Any:
    """The class of the runner that an engine takes."""
    second = getattr(engine, "use_v2_model_runner", False)
    module = "vllm.v1.worker.gpu.model_runner" if second else "vllm.v1.worker.gpu_model_runner"
    return import_module(module).GPUModelRunner


def watch(model: nn.Module, engine: Any, device: torch.device) -> None:
    """Have the rows of a model's steps written before each of them.

    Args:
        model: As vLLM loaded it.
        engine: vLLM's configuration.
        device: Where the model runs.

    Raises:
        UnsupportedModelError: The runner prepares its steps in a way that is not known.
    """
    from vllm.v1.worker.gpu_worker import Worker

    kind = runner_class(engine)
    second = getattr(engine, "use_v2_model_runner", False)
    name, read = ("prepare_inputs", _second) if second else ("_prepare_inputs", _first)
    if not hasattr(kind, name):
        raise UnsupportedModelError(
            f"Lynx is configured, but this vLLM's model runner has no {name}(), where Lynx reads a step's rows; "
            "the vLLM page of the docs lists the versions tried."
        )
    _wrap(kind, name, lambda prepare: _then_write(prepare, read))
    _wrap(kind, "execute_model", _then_complain)
    _wrap(Worker, "compile_or_warm_up_model", _while_warming)
    ranks = getattr(engine.parallel_config, "tensor_parallel_size", 1)
    watched[model] = Watched(engine.scheduler_config.max_num_batched_tokens, device, ranks)


def loaded(model: nn.Module, engine: Any) -> None:
    """Note that a model is loaded: what is attached to it from now on may come too late for code that is compiled."""
    mine = watched[model]
    if mine is not None:
        compiles = getattr(engine.compilation_config, "mode", None) not in (None, 0)
        mine.traced = compiles and mine.device.type == "cpu"


def _wrap(kind: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around a method, once."""
    method = getattr(kind, name)
    if not hasattr(method, _MARK):
        wrapped = wraps(method)(around(method))
        setattr(wrapped, _MARK, True)
        setattr(kind, name, wrapped)


def _then_write(prepare: Callable[..., Any], read: Callable[..., Requests]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, scheduler_output, *args, **kwargs)
        mine = _of(self)
        if mine is not None and not mine.warming:
            mine.told = True
            requests = read(self, scheduler_output, prepared, mine.wishes)
            if mine.rows is not None:
                mine.rows.write(requests)
                _tell(mine.tpot, mine.rows.tokens)
        return prepared

    return prepare_inputs


def _tell(tpot: TpotControl | None, tokens: int | None) -> None:
    """Have a step timed; where the engine prepares one while another runs, intervals are still as long on average."""
    if tpot is not None and tokens is None:
        tpot.breaks()
    elif tpot is not None:
        tpot.begins(tokens)


def _then_complain(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        done = execute(self, scheduler_output, *args, **kwargs)
        mine = _of(self)
        real = scheduler_output.total_num_scheduled_tokens and not kwargs.get("dummy_run")
        if mine is not None and real and not (mine.told or mine.warming or mine.complained):
            mine.complained = True
            logger.error(
                "lynx.steps_left_exact", reason=f"{type(self).__name__} prepares its steps in a way of its own"
            )
        return done

    return execute_model


def _while_warming(warm_up: Callable[..., Any]) -> Callable[..., Any]:
    def compile_or_warm_up_model(self: Any) -> Any:
        mine = _of(self.model_runner)
        if mine is None:
            return warm_up(self)
        mine.warming = True
        try:
            return warm_up(self)
        finally:
            mine.warming = False
            mine.captured = self.vllm_config.compilation_config.cudagraph_mode.name != "NONE"

    return compile_or_warm_up_model


def _of(runner: Any) -> Watched | None:
    """What is known of a runner's model, also where something was put around it after it was loaded."""
    model = runner.get_model()
    if model not in watched:
        watched[model] = next((known for inner in model.modules() if (known := watched.get(inner))), None)
    return watched[model]


def _first(runner: Any, step: Any, prepared: Any, wishes: Wishes) -> Requests:
    batch = runner.input_batch
    names, count = batch.req_ids, batch.num_reqs
    wishes.see(step.scheduled_new_reqs, runner.requests)
    exact, priority = _asked(wishes.among(names))
    return Requests(
        scheduled=np.array([step.num_scheduled_tokens[name] for name in names]),
        computed=batch.num_computed_tokens_cpu[:count],
        prompt=batch.num_prompt_tokens[:count],
        exact=exact,
        priority=priority,
    )


def _second(runner: Any, step: Any, batch: Any, wishes: Wishes) -> Requests:
    wishes.see(step.scheduled_new_reqs, runner.req_states.req_id_to_index)
    exact, priority = _asked(wishes.among(batch.req_ids))
    if getattr(runner, "adaptive_verification", None) is not None and step.scheduled_spec_decode_tokens:
        exact[:] = True  # the device will share the drafts out: whose row is whose is not known here
    return Requests(batch.num_scheduled_tokens, batch.num_computed_tokens_np, batch.prefill_len_np, exact, priority)


def _asked(priorities: list[float | None]) -> tuple[Any, Any]:
    """Which requests are exact, and what their votes are worth where they are not all alike."""
    exact = np.array([priority is None for priority in priorities], dtype=bool)
    votes = np.array([1.0 if priority is None else priority for priority in priorities], dtype=np.float32)
    return exact, votes if (votes != 1.0).any() else None
