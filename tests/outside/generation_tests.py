"""Tests of generation, ours: transformers' own are not in its source distribution.

Each holds a model against itself, so that it passes or fails on the plain model as well. The tokens are recorded, and
compared with those of the plain model.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

NEW = 6


class GenerationTests:
    """Beside transformers' mixins in a `unittest.TestCase`."""

    model_tester: Any

    @pytest.fixture(autouse=True)
    def _keep_tokens(self, record_property):
        self.tokens: list[list[list[int]]] = []
        record_property("tokens", self.tokens)  # the list itself: what is appended later is in it

    def test_ours_cache_changes_no_token(self):
        model, batch = self._model(), self._batch()
        assert self._tokens(model, batch) == self._tokens(model, batch, use_cache=False)

    def test_ours_padded_rows_generate_what_they_do_alone(self):
        model, batch = self._model(), self._batch()
        together = self._tokens(model, batch)
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            alone = {"input_ids": ids[mask.bool()].unsqueeze(0), "attention_mask": mask[mask.bool()].unsqueeze(0)}
            assert self._tokens(model, alone) == [together[row]]

    def test_ours_rows_end_by_themselves(self):
        model, batch = self._model(), self._batch()
        unended = self._tokens(model, batch)
        end = unended[0][NEW // 2]
        ended = self._tokens(model, batch, eos_token_id=end, pad_token_id=0)
        for row, tokens in zip(unended, ended, strict=True):
            until = row.index(end) + 1 if end in row else NEW
            assert tokens[:until] == row[:until]
            assert set(tokens[until:]) - {0} == set()

    def test_ours_static_cache_changes_no_token(self):
        model, batch = self._model(), self._batch()
        if not model._can_compile_fullgraph:
            self.skipTest("no static cache")
        options = {"cache_implementation": "static", "disable_compile": True}
        assert self._tokens(model, batch, **options) == self._tokens(model, batch)

    def test_ours_beams_of_width_one_are_greedy(self):
        model, batch = self._model(), self._batch()
        self._tokens(model, batch, num_beams=3, num_return_sequences=2)
        assert self._tokens(model, batch, num_beams=1) == self._tokens(model, batch)

    def test_ours_sampling_follows_its_seed(self):
        model, batch = self._model(), self._batch()
        torch.manual_seed(0)
        sampled = self._tokens(model, batch, do_sample=True, top_k=20)
        torch.manual_seed(0)
        assert self._tokens(model, batch, do_sample=True, top_k=20) == sampled

    def test_ours_lookup_in_the_prompt_changes_no_token(self):
        self._assisted(prompt_lookup_num_tokens=2)

    def test_ours_assistant_changes_no_token(self):
        self._assisted(assistant_model=self._model(seed=1))

    def test_ours_scores_are_those_of_one_forward(self):
        model, batch = self._model(), self._batch()
        out = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        mask = torch.cat([batch["attention_mask"], torch.ones(len(out.sequences), NEW, dtype=torch.long)], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            whole = model(input_ids=out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -NEW - 1 : -1], rtol=1e-4, atol=1e-4)

    def test_ours_copies_generate_the_same(self):
        model, batch = self._model(), self._batch()
        tokens = self._tokens(model, batch)
        assert self._tokens(copy.deepcopy(model), batch) == tokens
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            assert self._tokens(type(model).from_pretrained(folder), batch) == tokens

    def test_ours_training_between_changes_what_it_should(self):
        model, batch = self._model(), self._batch()
        before = self._tokens(model, batch)
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert self._tokens(model.eval(), batch) == before
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 10.0 * parameter.grad
        assert self._tokens(model, batch) != before

    def _assisted(self, **options: Any) -> None:
        model, batch = self._model(), self._batch()
        if model._is_stateful:
            self.skipTest("its state cannot be taken back")
        row = {"input_ids": batch["input_ids"][3:], "attention_mask": batch["attention_mask"][3:]}
        assert self._tokens(model, row, **options) == self._tokens(model, row)

    def _model(self, seed: int = 0) -> Any:
        config = self.model_tester.get_config()
        torch.manual_seed(seed)
        return self.model_tester.causal_lm_class(config).eval()

    def _batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 90, (4, 6), generator=generator)
        mask = (torch.arange(6) >= torch.tensor([[3], [2], [1], [0]])).long()
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    def _tokens(self, model: Any, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
        tokens = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
        self.tokens.append(tokens)
        return tokens
