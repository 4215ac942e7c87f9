"""A tiny model to time; `harness_files` is imported by its bare name."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def tiny():
    """Two layers, 8 experts, top-2, random weights; a new one for each test."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
