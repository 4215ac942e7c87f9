"""One model at one batch size: the cache with its prompt, the tokens, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from machine import free_memory
from models import Model, shell
from peers import attempt
from setups import Setup

import lynx
from lynx.demo.cache import as_argument


class Bench:
    """Makes setups ready for a mode, and times them.

    Args:
        model: On its device.
        facts: Its sizes.
        batch: T.
        prompt: Tokens in the cache before the first step.
        steps: Decode steps per round, at least 2.
    """

    def __init__(self, model: Any, facts: Model, batch: int, prompt: int, steps: int) -> None:
        from transformers import StaticCache

        self.model, self.facts, self.batch, self.prompt = model, facts, batch, prompt
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(batch)
        most = model.config.vocab_size  # ids 0 and 1 pad and end
        self.tokens = torch.randint(2, most, (steps, batch, 1), generator=generator).to(self.device)
        self.input = self.tokens[0].clone()
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + steps)
        self._handles: list[lynx.Handle] = []
        filling = torch.randint(2, most, (batch, prompt), generator=generator).to(self.device)
        model.set_experts_implementation("grouped_mm")
        self.cached = as_argument(self.cache, model)
        model(input_ids=filling, **self.cached, use_cache=True, logits_to_keep=1)
        self.clear()
        # asked once: what is left over at a later time depends on what ran before
        self._room = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else 10**9

    def clear(self) -> None:
        """Begin a mode: with memory that graphs of the last one have given back, and a pool of its own."""
        free_memory(self.device)
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def attach(self, strategy: str, options: dict[str, Any]) -> tuple[Any, lynx.Handle]:
        """Make modules with Lynx attached."""
        model = shell(self.model)
        handle = lynx.attach(model, strategy, experts="lynx", **options)
        self._handles.append(handle)
        return model, handle

    def too_large(self, implementation: str) -> str:
        """Say why an implementation would not fit; empty if it does."""
        if implementation != "batched_mm":
            return ""
        # It gathers an expert's weights for every slot: those of both projections are there at once.
        experts = next(part for part in self.model.modules() if hasattr(part, "gate_up_proj"))
        expert_bytes = experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes
        gathered = self.batch * self.facts.k * expert_bytes
        words = f"it would gather too many weights ({gathered / 1e9:.1f} GB, room for {self._room / 1e9:.1f} GB)"
        return words if gathered > self._room else ""

    def ready(self, setup: Setup, mode: str) -> Setup:
        """Make a setup ready for a mode: what is compiled and captured is so outside of the timing."""
        setup = replace(setup, rounds=[])
        if mode != "plain" and setup.implementation == "eager":
            setup.refused = "it waits for the device in every layer, which cannot be captured"
        if setup.refused:
            return setup
        forward = setup.model
        if mode == "compiled":
            torch._dynamo.config.recompile_limit = 64  # each setup has modules of its own, and shares their code
            forward = torch.compile(setup.model, fullgraph=True, dynamic=False)

        def call() -> Any:
            return forward(input_ids=self.input, **self.cached, use_cache=True)

        if mode == "plain":
            _, setup.refused = attempt(lambda: self._run(call))
            setup.step = call
        else:
            graph, setup.refused = attempt(lambda: self._capture(call))
            if graph is None:  # a capture that was broken off may leave its pool unusable
                self._pool = torch.cuda.graph_pool_handle()
            # the graph holds kernels that compiled code brought along: `call` keeps them
            setup.step = None if graph is None else _Replay(graph, call)
        return setup

    def seconds(self, setup: Setup) -> float:
        """Run all steps once; seconds per step."""
        assert setup.step is not None
        self._rewind()
        if self.device.type != "cuda":
            start = time.thread_time()
            self._all(setup.step)
            return (time.thread_time() - start) / len(self.tokens)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        self._all(setup.step)
        marks[1].record()
        torch.cuda.synchronize(self.device)
        return marks[0].elapsed_time(marks[1]) / 1e3 / len(self.tokens)

    def count_active(self, setup: Setup) -> float:
        """Run all steps under Lynx and count the experts that the model's own routing wakes, per layer and step."""
        assert setup.handle is not None
        self._rewind()
        self._all(lambda: setup.model(input_ids=self.input, **self.cached, use_cache=True))
        return setup.handle.report().total["decode"].active_before

    def close(self) -> None:
        """Take Lynx off, which also makes torch forget compiled code."""
        for handle in self._handles:
            handle.detach()

    def _all(self, step: Callable[[], Any]) -> None:
        for row in self.tokens:
            self.input.copy_(row)
            step()

    def _rewind(self) -> None:
        """Cut the cache back to the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)

    def _run(self, call: Callable[[], Any]) -> None:
        self._rewind()
        for _ in range(2):
            call()

    def _capture(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(call)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        # one pool for all setups of a mode: no replay needs what another left
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        return graph


@dataclass(frozen=True, slots=True)
class _Replay:
    """A graph, and the code whose kernels are in it."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], Any]

    def __call__(self) -> None:
        self.graph.replay()
