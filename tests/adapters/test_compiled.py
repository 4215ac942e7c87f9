"""torch.compile with a static cache, and attaching to a model that was compiled before."""

import families
import pytest
import torch
from transformers import CompileConfig

import lynx

PRUNING = {"name": "batch-union", "top": 1}


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example):
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self  # `generate` copies its options


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def test_model_compiled_before_attach():
    """PyTorch does not guard on hooks that were not there: the code must be compiled anew, or nothing is selected."""
    model = families.build("mixtral", num_hidden_layers=1)
    batch = {**families.prompts(), "use_cache": False}
    model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        before = model(**batch).logits
        with lynx.attach(model, {"name": "phase-aware", "prefill": PRUNING}) as handle:
            pruned = model(**batch).logits
        assert handle.report().total["prefill"].rows_changed > 0
        assert not families.same(pruned, before)
        assert torch.equal(model(**batch).logits, before)
    torch.compiler.reset()


def test_wrapper_of_torch_compile(graphs):
    """The module that torch.compile returns can be attached to, or the model in it: both run the same code."""
    model = families.build("mixtral", num_hidden_layers=1)
    compiled = torch.compile(model, backend=graphs)
    batch = {**families.prompts(), "use_cache": False}
    with torch.no_grad():
        before = compiled(**batch).logits
        pruned = []
        for root in (model, compiled):
            with lynx.attach(root, {"name": "phase-aware", "prefill": PRUNING}) as handle:
                pruned.append(compiled(**batch).logits)
            assert handle.report().total["prefill"].rows_changed > 0
            assert torch.equal(compiled(**batch).logits, before)
    assert torch.equal(*pruned)
    assert not families.same(pruned[0], before)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_generate_compiles_no_more_graphs(family, graphs):
    """Whole graphs, as many as the model alone needs, the same tokens under `exact`, and those of eager if pruned.

    `generate` compiled the model before Lynx was attached, and goes on with code of its own after detach.
    """
    few = {"num_hidden_layers": 2 if family == "deepseek_v3" else 1}  # its first layer is dense
    model, batch = families.build(family, **few), families.prompts()
    settings = CompileConfig(fullgraph=True, mode=None, backend=graphs)
    settings._compile_all_devices = True  # it is for GPUs only, otherwise

    def run(compiled=True):
        before = graphs.count
        asked = {"compile_config": settings} if compiled else {"disable_compile": True}
        out = families.generate(model, batch, cache_implementation="static", suppress_tokens=[0, 1], **asked)
        return torch.cat([out.sequences, torch.stack(out.logits).argmax(-1).T], dim=1), graphs.count - before

    plain, needed = run()
    assert needed > 0
    assert run()[1] == 0
    with lynx.attach(model, "exact"):
        tokens, count = run()
        assert torch.equal(tokens, plain)
        assert count <= needed
        assert run()[1] == 0
    with lynx.attach(model, PRUNING) as handle:
        eager, count = run(compiled=False)
        assert count == 0
        expected = handle.report().total["decode"]
        handle.reset()
        tokens, count = run()
        found = handle.report().total["decode"]
    assert count <= needed
    assert torch.equal(tokens, eager)
    assert found.active_after == expected.active_after < found.active_before
    assert (found.steps, found.open_rows) == (expected.steps, expected.open_rows) == (5, 20)
    tokens, count = run()
    assert torch.equal(tokens, plain)
    assert count <= needed
