"""The formulas that kernels compute, and recognising a model's own gate as one of them."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.moe import _default_apply_gate

from lynx.kernels.gates import GATES, find_gate, recognise

I = 24  # noqa: E741
NAMES = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
GATED = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu"}
MODELS = {
    "gpt_oss.GptOssExperts": "gpt_oss",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "gpt_oss_halves",
    "minimax_m3_vl.MiniMaxM3VLExperts": "gpt_oss_halves",
    "deepseek_v4.DeepseekV4Experts": "swiglu_clamp10",
}


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - {"xielu"}))
def test_each_activation_of_transformers_is_recognised_or_left(name: str) -> None:
    class Experts:
        act_fn = ACT2FN[name]

        def gate(self, rows: Tensor) -> Tensor:
            return _default_apply_gate(self, rows)

    experts = Experts()
    assert recognise(experts.act_fn, I, gated=False) == NAMES.get(name)
    assert recognise(experts.gate, I, gated=True) == GATED.get(NAMES.get(name, ""))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_gates_of_models_are_recognised(model: str) -> None:
    family, _, experts_class = model.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    experts = object.__new__(getattr(module, experts_class))
    nn.Module.__init__(experts)
    experts.alpha = experts.swiglu_alpha = 1.702
    experts.limit = experts.swiglu_limit = 10.0 if "clamp10" in MODELS[model] else 7.0
    experts.act_fn = F.silu
    assert recognise(experts._apply_gate, I, gated=True) == MODELS[model]
    experts.limit = experts.swiglu_limit = 9.0
    assert recognise(experts._apply_gate, I, gated=True) is None


@pytest.mark.parametrize("name", sorted(GATES))
@pytest.mark.parametrize("size", [16, 8192])
def test_each_formula_is_told_from_all_others(name: str, size: int) -> None:
    gate = GATES[name]
    assert recognise(lambda rows: gate(rows), size, gate.gated) == name
    assert recognise(lambda rows: gate(rows), size, not gate.gated) is None


def halves(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def refuse(rows: Tensor) -> Tensor:
    raise AssertionError("only bfloat16")


@pytest.mark.parametrize(
    "stranger",
    [
        lambda rows: F.silu(rows[:, I:]) * rows[:, :I],  # up first
        lambda rows: F.silu(rows[:, ::2]) * rows[:, 1::2],  # interleaved
        lambda rows: halves(rows[:, :I], rows[:, I:], 7.0),  # clamped after the nonlinearity
        lambda rows: F.silu(rows[:, :I].clamp(max=1e3)) * rows[:, I:],  # a clamp far out
        lambda rows: F.silu(rows[:, :I].clamp(min=-9)) * rows[:, I:],
        lambda rows: F.silu(rows[:, :I]) * rows[:, I:].abs(),
        lambda rows: F.silu(rows[:, :I]) * rows[:, I:].clamp(max=7.0),  # one side only
        lambda rows: F.silu(rows[:, :I]) * (rows[:, I:] + 1e-3),
        lambda rows: F.silu(rows[:, :I] * 1.001) * rows[:, I:],
        lambda rows: (F.silu(rows[:, :I]) * rows[:, I:]).softmax(-1),  # not element by element
        lambda rows: (F.silu(rows[:, :I]) * rows[:, I:]).flip(0),
        lambda rows: F.silu(rows[:, :I]) * rows[:, I:] * torch.nan,
        lambda rows: F.silu(rows[:, :I]),
        lambda rows: rows,
        lambda rows: (F.silu(rows[:, :I]) * rows[:, I:]).sum(),
        lambda rows: rows.reshape(7, 7, 7),
        lambda rows: None,
        lambda rows: {}[len(rows)],
        refuse,
        nn.Linear(2 * I, I, dtype=torch.bfloat16),  # does not take float32
    ],
)
def test_strangers_are_never_guessed(stranger) -> None:
    assert recognise(stranger, I, gated=True) is None


def test_halves_and_interleaved_are_one_for_one_column() -> None:
    """Where two formulas fit, neither is named."""
    assert recognise(GATES["gpt_oss"], 1, gated=True) is None


def test_recognising_changes_nothing_and_needs_no_gradients() -> None:
    scale = nn.Parameter(torch.ones(()))
    seen = []

    def gate(rows: Tensor) -> Tensor:
        seen.append(rows.requires_grad)
        rows.mul_(scale)  # an activation in place is the host's right
        return GATES["swiglu"](rows)

    assert [recognise(gate, I, gated=True) for _ in range(2)] == ["swiglu"] * 2
    assert seen == [False, False]


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown gate='swish'. Known: geglu, geglu_tanh, gelu, "):
        find_gate("swish")
