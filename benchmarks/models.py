"""Whole models with random weights: their sizes written out, nothing is downloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

RESERVE = 8 * 10**9  # of a GPU's memory: cache, logits, graphs, and what batched_mm gathers


@dataclass(frozen=True, slots=True)
class Model:
    """One model's sizes.

    Attributes:
        name: What it is called.
        family: transformers' `model_type`.
        E: Experts.
        k: Experts per token.
        sizes: What it is built with.
        small: What is different on a CPU.
    """

    name: str
    family: str
    E: int
    k: int
    sizes: dict[str, Any]
    small: dict[str, Any]


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "Qwen3-30B-A3B",
            "qwen3_moe",
            128,
            8,
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "max_position_embeddings": 40960,
                "tie_word_embeddings": False,
            },
            {
                "vocab_size": 512,
                "hidden_size": 1024,
                "moe_intermediate_size": 384,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
            },
        ),
        Model(
            "Mixtral-8x7B",
            "mixtral",
            8,
            2,
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 32768,
                "sliding_window": None,
                "tie_word_embeddings": False,
            },
            {
                "vocab_size": 512,
                "hidden_size": 1024,
                "intermediate_size": 3584,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
            },
        ),
    )
}


def make_config(model: Model, small: bool, layers: int = 0) -> Any:
    """Make a model's transformers configuration, at full size or as for a CPU, with all its layers or so many."""
    from transformers import AutoConfig

    sizes = model.sizes | (model.small if small else {}) | ({"num_hidden_layers": layers} if layers else {})
    return AutoConfig.for_model(model.family, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)


def shrink(config: Any, by: int) -> None:
    """Make a small model smaller, for a look at the script."""
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, getattr(config, name) // by)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a model on a device, with random weights; routers get normal ones, so that their logits have variance 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate.weight"):
            parameter.normal_(0, config.hidden_size**-0.5)
    return model


def layers_that_fit(config: Any, wanted: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many layers of a model a GPU's free memory holds, at most those that are wanted; all of them elsewhere."""
    if device.type != "cuda":
        return wanted
    one, two = (_bytes(config, layers, dtype) for layers in (1, 2))
    free = torch.cuda.mem_get_info(device)[0] - RESERVE - (one - (two - one))
    return max(0, min(wanted, int(free // (two - one))))


def shell(model: Any) -> Any:
    """Copy a model's modules and share its weights.

    Each setup that is timed gets modules of its own. So all can be attached to first, and what is compiled or captured
    then stays valid: attaching and detaching make torch forget all compiled code.
    """
    shared: dict[int, Tensor] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, dict(shared))


def _bytes(config: Any, layers: int, dtype: torch.dtype) -> int:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())
