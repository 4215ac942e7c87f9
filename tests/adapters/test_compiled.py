"""Attaching to a model that was compiled before."""

import families
import torch

import lynx

PRUNING = {"name": "batch-union", "top": 1}


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
