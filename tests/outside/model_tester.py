"""What transformers' mixins ask of a model tester, over the small models of `tests/adapters/families.py`."""

from __future__ import annotations

from typing import Any

import families
import torch
import transformers
from torch import Tensor

_HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# The mixins want two layers at most, and no generation that ends early. The weights stay as large as they are there:
# with the usual small ones the experts add less to an output than the mixins tolerate.
_FOR_THE_MIXINS = {"num_hidden_layers": 2, "eos_token_id": None}
_FOR_A_FAMILY = {
    "mixtral": {"head_dim": 8},  # the tests of rotary embeddings read it
    "deepseek_v3": {"initializer_range": 0.1},  # in bfloat16, its own implementations differ by more than is tolerated
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},  # both layers have experts
}


class ModelTester:
    """Configurations and inputs of one family."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, name: str) -> None:
        self.name, self.family = name, families.FAMILIES[name]
        names = [self.family.model.__name__.removesuffix("ForCausalLM") + head for head in _HEADS]
        self.model_classes = tuple(getattr(transformers, each) for each in names if hasattr(transformers, each))
        self.base_model_class, self.causal_lm_class = self.model_classes[:2]

    def get_config(self) -> Any:
        changes = _FOR_THE_MIXINS | _FOR_A_FAMILY.get(self.name, {})
        return self.family.config(**{**families._COMMON, **self.family.options, **changes})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        ids = torch.randint(3, families.VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(4)}
