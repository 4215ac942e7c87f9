"""Stand-ins from a small model's own text to its file, and what happens when somebody stops on the way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

import lynx
from lynx.calibration import calibrate as room
from lynx.calibration.calibrate import Effort, calibrate, readings
from lynx.calibration.listening import Passage, doubt
from lynx.standins_file import experts_hash, read_standins

EFFORT = Effort(ranks=(3,), least=4)


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def model():
    return tiny()


def passages(count: int = 5, seed: int = 0) -> list[Passage]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(2, 64, (3, 24), generator=generator)
        live = torch.ones_like(ids, dtype=torch.bool)
        live[0, 20:] = False
        made.append(Passage({"input_ids": ids, "attention_mask": live.long(), "use_cache": False}, live))
    return made


def same(one, other):
    assert one.layers.keys() == other.layers.keys()
    for index, layer in one.layers.items():
        for name in ("inner", "outer", "mean_in", "mean_out", "known"):
            assert torch.equal(getattr(layer, name), getattr(other.layers[index], name)), name


def test_the_file_holds_what_answers_for_every_expert(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []
    made = calibrate(model, passages(), tmp_path / "s.safetensors", EFFORT, advance=lambda: calls.append(1))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert len(calls) == readings(model, passages(), EFFORT) == 5
    assert list(made.layers) == [0, 1]
    layer = made.layers[1]
    assert layer.inner.shape == layer.outer.shape == (4, 3, 16)
    assert layer.known.all()
    assert layer.inner.dtype == torch.float32
    assert len(layer.unexplained) == 4
    assert made.conditions["passages"] == 5
    assert made.conditions["tokens"] == 5 * 68
    assert made.missing == {}
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_slot_counts_by_what_its_loss_would_show():
    weights = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    ids = torch.tensor([[0, 1], [2, 3], [1, -1]])
    open_next = torch.tensor([0.5, 0.5, 0.0])
    counted = room._counted(ids, weights, open_next, torch.tensor([[True, True, True]]), 4)
    assert counted[0, 0] == counted[1, 0] == counted[1, 1] == 0  # the best of a token is not dropped
    assert counted[2, 1] == 0  # of the host's own
    torch.testing.assert_close(counted[0, 1], torch.tensor(0.4**2 * (1 - 4 / 6) ** 2 * 0.501))
    assert not room._counted(ids, weights, open_next, torch.tensor([[False, True, True]]), 4)[0].any()


def test_doubt_is_that_of_the_next_token():
    logits = torch.tensor([[[100.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(doubt(logits, 2), torch.tensor([0.0, 0.5]))
    assert doubt(logits, 3) is None
    assert doubt(object(), 2) is None


def test_padding_tells_nothing(model, tmp_path):
    plain = calibrate(model, passages(), tmp_path / "a.safetensors", EFFORT)
    other = passages()
    for passage in other:
        passage.inputs["input_ids"][0, 20:] = 5
    same(plain, calibrate(model, other, tmp_path / "b.safetensors", EFFORT))


def test_little_memory_reads_the_text_again_for_each_layer(model, tmp_path):
    calls = []
    little = Effort(ranks=(3,), least=4, memory=4e-5)
    made = calibrate(model, passages(), tmp_path / "a.safetensors", little, advance=lambda: calls.append(1))
    assert len(calls) == readings(model, passages(), little) == 10
    same(made, calibrate(model, passages(), tmp_path / "b.safetensors", EFFORT))


@pytest.mark.parametrize(("stop", "memory"), [(3, 4.0), (7, 4e-5)])
def test_it_goes_on_where_it_was_stopped(model, tmp_path, stop, memory):
    effort = Effort(ranks=(3,), least=4, memory=memory, save_every=0.0)
    whole = calibrate(model, passages(), tmp_path / "whole.safetensors", effort)
    path, calls = tmp_path / "s.safetensors", []

    def advance():
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, passages(), path, effort, advance=advance)
    assert not path.exists()
    calls.clear()
    again = calibrate(model, passages(), path, effort, advance=lambda: calls.append(1))
    assert len(calls) == readings(model, passages(), effort) - stop
    same(whole, again)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["s.safetensors", "whole.safetensors"]


def test_another_text_starts_anew(model, tmp_path):
    path, calls = tmp_path / "s.safetensors", []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    effort = Effort(ranks=(3,), least=4, save_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, passages(), path, effort, advance=stop)
    calls.clear()
    calibrate(model, passages(seed=1), path, effort, advance=lambda: calls.append(1))
    assert len(calls) == 5


def test_of_several_ranks_each_layer_takes_its_own(model, tmp_path):
    several = calibrate(model, passages(), tmp_path / "a.safetensors", Effort(ranks=(1, 3), least=4))
    one = calibrate(model, passages(), tmp_path / "b.safetensors", EFFORT)
    for index, layer in several.layers.items():
        assert layer.rank in (1, 3)
        assert torch.equal(layer.inner, one.layers[index].inner[:, : layer.rank])


def test_experts_that_saw_too_little_are_listed(model, tmp_path):
    all_of_them = calibrate(model, passages(), tmp_path / "all.safetensors", Effort(ranks=(1,), least=1))
    assert all_of_them.missing == {}
    with pytest.raises(lynx.ConfigError, match="nothing to write"):
        calibrate(model, passages(2), tmp_path / "none.safetensors", Effort(ranks=(3,), least=10_000))
    assert not (tmp_path / "none.safetensors").exists()


def test_a_wide_rank_beside_a_narrow_one_leaves_no_expert_out(model, tmp_path):
    narrow = calibrate(model, passages(), tmp_path / "a.safetensors", Effort(ranks=(2,), least=4))
    both = calibrate(model, passages(), tmp_path / "b.safetensors", Effort(ranks=(2, 16), least=4))
    assert narrow.missing == both.missing == {}
    for layer in both.layers.values():
        assert layer.rank in (2, 16)


def test_half_precision_is_kept(model, tmp_path):
    made = calibrate(model.bfloat16(), passages(), tmp_path / "a.safetensors", EFFORT)
    assert made.layers[0].inner.dtype == torch.bfloat16


def test_a_hash_knows_weights_again_in_another_precision():
    weights = torch.randn(4, 8, 6).bfloat16()
    assert experts_hash([weights]) == experts_hash([weights.float()])
    assert experts_hash([weights]) != experts_hash([weights * 1.01])
    changed = weights.clone()
    changed[2] *= 1.1
    assert experts_hash([weights]) != experts_hash([changed])
    wide = torch.randn(4, 64, 64)
    for column in range(64):
        changed = wide.clone()
        changed[:, :, column] += 1
        assert experts_hash([wide]) != experts_hash([changed])
    biases = torch.randn(8, 64)
    changed = biases.clone()
    changed[3] += 1
    assert experts_hash([biases]) != experts_hash([changed])


class TestRefusals:
    def test_of_layers_that_do_not_fit_into_memory(self, model, tmp_path):
        with pytest.raises(lynx.ConfigError, match="give more memory"):
            calibrate(model, passages(), tmp_path / "a.safetensors", Effort(memory=1e-6))

    def test_of_models_whose_tokens_have_one_expert(self, tmp_path):
        torch.manual_seed(0)
        one = MixtralForCausalLM(MixtralConfig(**{**tiny().config.to_dict(), "num_experts_per_tok": 1})).eval()
        with pytest.raises(lynx.UnsupportedModelError, match="one expert"):
            calibrate(one, passages(), tmp_path / "a.safetensors", EFFORT)

    def test_of_models_in_training(self, model, tmp_path):
        with pytest.raises(lynx.ConfigError, match="eval"):
            calibrate(model.train(), passages(), tmp_path / "a.safetensors", EFFORT)

    def test_of_damaged_files(self, model, tmp_path):
        path = tmp_path / "a.safetensors"
        calibrate(model, passages(), path, EFFORT)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        changes = (
            lambda found: found.pop("layers.0.known"),
            lambda found: found.update({"layers.1.inner": found["layers.1.inner"] * torch.nan}),
            lambda found: found.update({"layers.1.mean_in": found["layers.1.mean_in"][:, :3].contiguous()}),
        )
        for place, change in enumerate(changes):
            damaged = dict(tensors)
            change(damaged)
            other = tmp_path / f"{place}.safetensors"
            save_file(damaged, other, metadata)
            with pytest.raises(lynx.ConfigError, match="damaged"):
                lynx.attach(model, "batch-union", standins=other)

    def test_of_attached_models(self, model, tmp_path):
        with lynx.attach(model, "batch-union"), pytest.raises(lynx.AttachError, match="not"):
            calibrate(model, passages(), tmp_path / "a.safetensors", EFFORT)

    @pytest.mark.parametrize("effort", [Effort(ranks=()), Effort(ranks=(-1,)), Effort(memory=0), Effort(least=0)])
    def test_of_numbers_that_make_no_sense(self, model, effort, tmp_path):
        with pytest.raises(lynx.ConfigError):
            calibrate(model, passages(), tmp_path / "a.safetensors", effort)

    def test_of_too_little_text(self, model, tmp_path):
        with pytest.raises(lynx.ConfigError, match="1 passages"):
            calibrate(model, passages(1), tmp_path / "a.safetensors", EFFORT)

    def test_of_a_folder_that_is_not_there(self, model, tmp_path):
        with pytest.raises(lynx.ConfigError, match="no folder"):
            calibrate(model, passages(), tmp_path / "none" / "a.safetensors", EFFORT)

    def test_of_experts_that_give_nothing_finite(self, model, tmp_path):
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.fill_(torch.nan)
        with pytest.raises(lynx.MeasureError, match="not finite"):
            calibrate(model, passages(), tmp_path / "a.safetensors", EFFORT)

    def test_of_files_that_hold_something_else(self, model, tmp_path):
        path = tmp_path / "a.safetensors"
        with pytest.raises(lynx.ConfigError, match="there is no file"):
            read_standins(path)
        path.write_bytes(b"no")
        with pytest.raises(lynx.ConfigError, match="holds no stand-ins"):
            read_standins(path)
        calibrate(model, passages(), path, EFFORT)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["conditions"])["passages"] == 5
