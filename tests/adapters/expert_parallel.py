"""One of two processes over which a tiny model's experts are spread.

`python expert_parallel.py RANK PORT FOLDER FAMILY` prints one line of JSON: what it saw, for the test to judge.
"""

import json
import os
import sys
from dataclasses import fields

import families
import torch
import torch.distributed
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

import lynx

PRUNING = {"name": "batch-union", "top": 1}


# Before transformers 5.24, the option has another name, and ids are local when they come to the experts.
GLOBAL_IDS = "ep_size" in {each.name for each in fields(DistributedConfig)}


def parallel():
    """Both processes hold the same batch and half of the experts."""
    return DistributedConfig(tp_size=2, **({"ep_size": 2} if GLOBAL_IDS else {"enable_expert_parallel": True}))


def decode(model):
    return families.stepwise(model, families.prompts(), families.new_tokens())


def tokens(model):
    settings = {"output_logits": False, "return_dict_in_generate": False}
    return families.generate(model, families.prompts(), **settings)


class Woken:
    """An experts implementation: transformers' own, which keeps the local ids of experts that it runs here."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, hidden, ids, weights):
        here = (weights != 0) & (ids < module.num_experts)
        self.calls.append(sorted(ids[here].unique().tolist()))
        return grouped_mm_experts_forward(module, hidden, ids, weights)

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def main(rank, port, folder, family):
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = families.FAMILIES[family].model.from_pretrained(folder, distributed_config=parallel()).eval()
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    local = experts.gate_up_proj.to_local() if hasattr(experts.gate_up_proj, "to_local") else experts.gate_up_proj
    seen = {"local": len(local)}
    plain, before = tokens(model), decode(model)

    with lynx.attach(model, "exact") as handle:
        seen["experts"] = handle.experts
        seen["exact"] = torch.equal(tokens(model), plain) and torch.equal(decode(model).decode, before.decode)
    try:
        lynx.attach(model, PRUNING, experts="lynx")
    except lynx.ConfigError as error:
        seen["refused"] = str(error)

    woken = Woken()
    ExpertsInterface.register("woken", woken)
    model.set_experts_implementation("woken")
    decode(model)
    mine = {"plain": woken.take()}
    with lynx.attach(model, PRUNING) as handle, families.counted(model) as chosen:
        pruned = decode(model)
    mine["pruned"] = woken.take()
    if GLOBAL_IDS:
        seen["chosen"] = [ids[weights != 0].tolist() for ids, weights in chosen.calls]
    report = handle.report().total["decode"]
    seen["active"] = [report.active_before, report.active_after]

    whole = families.build(family)
    with lynx.attach(whole, PRUNING) as handle:
        seen["as_one_process"] = families.same(decode(whole).decode, pruned.decode)
    report = handle.report().total["decode"]
    seen["active_in_one"] = [report.active_before, report.active_after]
    seen["detached"] = torch.equal(decode(model).decode, before.decode)

    # every expert cut in two instead: the same choice once more
    cut = DistributedConfig(tp_size=2)
    model = families.FAMILIES[family].model.from_pretrained(folder, distributed_config=cut).eval()
    before = decode(model)
    with lynx.attach(model, "exact"):
        seen["cut_exact"] = torch.equal(decode(model).decode, before.decode)
    with lynx.attach(model, PRUNING) as handle:
        seen["cut_as_one_process"] = families.same(decode(model).decode, pruned.decode)
    report = handle.report().total["decode"]
    seen["cut_active"] = [report.active_before, report.active_after]
    try:
        lynx.attach(model, PRUNING, experts="lynx")
    except lynx.ConfigError as error:
        seen["cut_refused"] = str(error)
    print(json.dumps([seen, mine]), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
