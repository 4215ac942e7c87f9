"""Experts spread over two processes by transformers, whole or cut: both choose alike, and wake fewer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch

import lynx

PRUNING = {"name": "batch-union", "top": 1}
WORKER = Path(__file__).parent / "expert_parallel.py"
SECONDS = 240  # two interpreters that import everything, on machines that may be busy


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_two_processes(family, tmp_path):
    families.build(family).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the same lynx as here
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(WORKER), str(rank), port, str(tmp_path), family] for rank in (0, 1)]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        outputs = [worker.communicate(timeout=SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-4000:]
    (first, one), (second, other) = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    count = families.routers(families.shared(family))[0].weight.shape[0]
    assert first["local"] == count // 2
    assert first["exact"]
    assert first["experts"] == "model"
    assert "spread over processes; use experts='model'" in first["refused"]
    assert first["active"] == first["active_in_one"]
    assert first["active"][1] < first["active"][0]
    assert first["as_one_process"]
    assert first["detached"]
    assert first["cut_exact"]
    assert first["cut_as_one_process"]
    assert first["cut_active"] == first["active"]
    assert first["cut_refused"] == first["refused"]
    assert first == second  # the same rows go to the same experts
    # counted where they run: the prompt wakes what it woke, steps wake fewer on the two together, and both work
    layers = len(families.routers(families.shared(family)))
    for mine in (one, other):
        assert mine["pruned"][:layers] == mine["plain"][:layers]
        assert len(mine["pruned"]) == len(mine["plain"]) == 4 * layers
        assert any(mine["pruned"][layers:])
    steps = {name: sum(map(len, one[name][layers:] + other[name][layers:])) for name in ("plain", "pruned")}
    assert steps["pruned"] < steps["plain"]
    assert steps["pruned"] == first["active"][1] * 3 * layers


class MakesIdsLocal:
    """What expert parallelism was before transformers 5.24: a hook that leaves a router's output for one process."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def __call__(self, module, args, output):
        logits, weights, ids = output
        elsewhere = ids // self.size != self.rank
        return logits, weights.masked_fill(elsewhere, 0.0), (ids % self.size).masked_fill(elsewhere, self.size)


@pytest.mark.parametrize("rank", [0, 1])
def test_ids_are_made_local_after_selection(rank):
    """Lynx sees the router's own ids, and what it makes of them goes to the process that has the expert."""
    model, batch, tokens = families.build("qwen3_moe"), families.prompts(), families.new_tokens(columns=1)
    with lynx.attach(model, PRUNING), families.counted(model) as chosen:
        families.stepwise(model, batch, tokens)
    size = families.routers(model)[0].weight.shape[0] // 2
    router = families.routers(model)[0]
    router._hf_tp_plan = "ep_router"
    router.register_forward_hook(MakesIdsLocal(rank, size))
    with lynx.attach(model, PRUNING, layers={"include": [0]}) as handle, families.counted(model) as local:
        families.stepwise(model, batch, tokens)
    assert handle.report().layers[0].phases["decode"].rows_changed > 0
    for call in (0, 2):  # of the first layer, whose input is the same: a prompt and a step
        (ids, weights), (own_ids, own_weights) = chosen.calls[call], local.calls[call]
        here = ids // size == rank
        assert torch.equal(own_ids, torch.where(here, ids % size, size))
        assert torch.equal(own_weights, torch.where(here, weights, 0.0))
