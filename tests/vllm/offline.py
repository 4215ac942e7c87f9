"""One engine of vLLM, and what it does under Lynx: run by test_engine.py, which reads the file that this writes.

python offline.py FOLDER OUT '{"lynx": ..., "engine": {...}, "strategies": [...], "exact_rows": [...]}'
"""

import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

if os.environ.get("TRITON_INTERPRET") == "1":
    # vLLM's second runner launches kernels of Triton. They are interpreted, which needs no backend, but vLLM looks for
    # one for CPUs.
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

from reference import EOS, parts, problems
from vllm import LLM, SamplingParams
from vllm.forward_context import get_forward_context
from vllm.inputs import TokensPrompt

from lynx.standins import LayerStandIns

MAX_TOKENS = 112  # as in `lynx demo`


def start(folder, lynx, options):
    """Start an engine, with Lynx's configuration if there is one."""
    settings = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    extra = {} if lynx is None else {"additional_config": {"lynx": lynx}}
    return LLM(folder, **(settings | options | extra))


def generate(engine, chosen, exact=()):
    """Answer problems greedily; those in `exact` ask for exact routing."""
    prompts = [TokensPrompt(prompt_token_ids=list(problem.prompt.encode())) for problem in chosen]
    sampling = [
        SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=0,
            stop_token_ids=[EOS],
            extra_args={"lynx": "exact"} if place in exact else None,
        )
        for place in range(len(prompts))
    ]
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling, use_tqdm=False)]


def say_likelihoods(engine, chosen, tokens):
    """Go on from parts of problems, side by side, for so many tokens: these, and how likely each was."""
    prompts = [TokensPrompt(prompt_token_ids=list(part.encode())) for part in parts(chosen)]
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1)
    outputs = [done.outputs[0] for done in engine.generate(prompts, sampling, use_tqdm=False)]
    said = [
        [place[token].logprob for place, token in zip(each.logprobs, each.token_ids, strict=True)] for each in outputs
    ]
    return {"tokens": [list(each.token_ids) for each in outputs], "logprobs": said}


def watch_answers():
    """Compare what is added to experts' outputs with its formula, slot by slot."""
    seen = {"worst": 0.0, "largest": 0.0, "rows": 0, "others_same": True}
    plain = LayerStandIns.add

    def add(self, output, hidden, ids, answered):
        done, maps, expected = plain(self, output, hidden, ids, answered), self.weights, output.double()
        for row, slot in (answered != 0).nonzero().tolist():
            expert, x = int(ids[row, slot]), hidden[row].double()
            map_of = x @ maps.inner[expert].double().T @ maps.outer[expert].double() + maps.bias[expert].double()
            expected[row] += float(answered[row, slot]) * map_of
        rows = (answered != 0).any(-1)
        seen["worst"] = max(seen["worst"], float((done - expected).abs().max()))
        seen["largest"] = max(seen["largest"], float((done - output).abs().max()))
        seen["rows"] += int(rows.sum())
        seen["others_same"] &= bool((done[~rows] == output[~rows]).all())
        return done

    LayerStandIns.add = add
    return seen


class Watcher:
    """Counts, where the experts are called, which of them a step wakes: beside Lynx's hook and not through it."""

    def __init__(self, model):
        self.forget()
        for name, module in model.named_modules():
            if hasattr(module, "forward_modular"):
                module.forward_modular = self._watched(name, module.forward_modular)

    def forget(self):
        self.distinct, self.prefill = defaultdict(list), Counter()

    def _watched(self, name, forward):
        def forward_modular(*args, **named):
            metadata = get_forward_context().attn_metadata
            if isinstance(metadata, dict):
                self._count(name, named["topk_ids"], named["topk_weights"], next(iter(metadata.values())))
            return forward(*args, **named)

        return forward_modular

    def _count(self, name, ids, weights, step):
        starts, lengths, decode = step.query_start_loc.tolist(), step.seq_lens.tolist(), []
        for start, end, length in zip(starts, starts[1:], lengths, strict=False):
            if end - start == 1 and length > 1:
                decode.append(start)
            else:
                self.prefill.update((name, *sorted(row)) for row in ids[start:end].tolist())
        if decode:
            self.distinct[name].append(ids[decode][weights[decode] != 0].unique().numel())

    def take(self):
        """Mean distinct experts per layer and decode step, and all decisions of prefill; forgets both."""
        counts = [count for layer in self.distinct.values() for count in layer]
        taken = sum(counts) / max(len(counts), 1), self.prefill
        self.forget()
        return taken


def rows_of_exact_requests(model):
    """Spy on the hooks: for every step, whether rows of exact requests left with the router's own decision."""
    from lynx.adapters.vllm import hook as room
    from lynx.adapters.vllm.runner import watched
    from lynx.routing import Phase, Role

    seen = {"same": 0, "changed": 0, "others_changed": 0}
    plain = room.Hook.__call__

    def call(self, logits, weights, ids):
        new_weights, new_ids = plain(self, logits, weights, ids)
        role, phase = watched[model].rows.kinds[:, : len(ids)]
        decode, exact = phase == int(Phase.DECODE), role == int(Role.EXACT)
        changed = ((new_ids != ids) | (new_weights != weights)).any(-1)
        seen["same"] += int((decode & exact & ~changed).sum())
        seen["changed"] += int((exact & changed).sum())
        seen["others_changed"] += int((decode & ~exact & changed).sum())
        return new_weights, new_ids

    room.Hook.__call__ = call
    return seen


def main(folder, out, wish):
    """Run what is wished for, and write what came of it."""
    engine = start(folder, wish.get("lynx"), wish.get("engine", {}))
    chosen = problems()[: wish.get("problems", 16)]
    if wish.get("likelihoods") is not None:
        result = likelihoods(engine, chosen, wish)
        Path(out).write_text(json.dumps(result))
        return
    result = {"tokens": generate(engine, chosen, wish.get("exact_rows", ()) if wish.get("mixed") else ())}
    if wish.get("strategies") is not None:
        result |= engine.apply_model(lambda model: strategies(engine, model, chosen, wish))[0]
    Path(out).write_text(json.dumps(result))


def likelihoods(engine, chosen, wish):
    """Answer with what is configured, then with nothing attached, then with one setting after another."""
    import lynx

    seen, tokens, outcomes = watch_answers(), wish["likelihoods"], []
    configured = say_likelihoods(engine, chosen, tokens) | {"rows": seen["rows"]}

    def others(model):
        configured["answered"] = lynx.handle_of(model).report().total["decode"].answered_mass_mean
        names = {name for module in model.modules() for name in vars(module)}
        lynx.detach(model)
        left = {name for module in model.modules() for name in vars(module)}
        outcomes.append(say_likelihoods(engine, chosen, tokens) | {"gone": sorted(names - left)})
        for setting in wish.get("settings", []):
            try:
                with lynx.attach(model, setting):
                    outcomes.append(say_likelihoods(engine, chosen, tokens))
            except lynx.AttachError as error:
                outcomes.append({"refused": str(error)})

    engine.apply_model(others)
    return {"configured": configured, "others": outcomes, "added": seen}


def strategies(engine, model, chosen, wish):
    """Put one strategy after another on the running engine."""
    import lynx

    watcher, outcomes, prefills = Watcher(model), {}, {}
    for setting in wish["strategies"]:
        with lynx.attach(model, setting) as handle:
            tokens = generate(engine, chosen)
            total = handle.report().total["decode"]
        active, prefill = watcher.take()
        name = json.dumps(setting)
        prefills[name] = prefill
        outcomes[name] = {
            "tokens": tokens,
            "active": active,
            "reported": total.active_after,
            "reported_before": total.active_before,
            "prefill_as_first": prefill == next(iter(prefills.values())),
            "solved": sum(
                problem.solved_by(bytes(token for token in answer if token < 256).decode(errors="replace"))
                for problem, answer in zip(chosen, tokens, strict=True)
            ),
        }
    stock = generate(engine, chosen)
    stock_active, _ = watcher.take()
    seen = rows_of_exact_requests(model)
    with lynx.attach(model, wish["strategies"][-1]):
        mixed = generate(engine, chosen, exact=wish["exact_rows"])
    rest = {"mixed": mixed, "exact_rows": seen, "times": times_held(engine, model, chosen)}
    return {"outcomes": outcomes, "stock": stock, "stock_active": stock_active} | rest


def times_held(engine, model, chosen):
    """Have a time held that every step keeps, then one that none does."""
    import lynx

    found = []
    with lynx.attach(model, "target-active", share=0.5, floor=0.3, tpot_ms=1e6) as handle:
        for target in (1e3, 1e-6):
            handle.tpot.target, steps = target, handle.tpot.steps
            generate(engine, chosen)  # the way from one end to the other
            timed = handle.tpot.steps - steps
            handle.reset()
            generate(engine, chosen)
            total = handle.report().total["decode"]
            found.append(
                {
                    "timed": timed,
                    "steps": total.steps,
                    "position": handle.tpot.position,
                    "measured": handle.tpot.measured,
                    "share": total.active_after / total.active_before,
                }
            )
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
