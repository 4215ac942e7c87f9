"""Stand-ins at work in models: what is added, when nothing is, and which files and models are refused."""

from __future__ import annotations

import copy
import json
import pickle

import families
import pytest
import torch
import zoo
from transformers import CompileConfig, MixtralConfig, MixtralForCausalLM

import lynx
from lynx.attachment import discover
from lynx.calibration.calibrate import Effort, calibrate
from lynx.calibration.listening import Passage
from lynx.counters import Counters
from lynx.matching import experts_of
from lynx.standins import LayerStandIns
from lynx.standins_file import StandInLayer, experts_hash, read_standins, write_standins


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=3, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def drawn(model, path, known=None, rank: int = 16, seed: int = 0):
    """Write stand-ins of random values for every layer of a model."""
    generator = torch.Generator().manual_seed(seed)
    found = discover(model)
    layers = []
    for layer in found.layers:
        experts = experts_of(found.adapter, model, layer)
        E, H = layer.info.num_experts, 16
        code = experts_hash(experts.tensors())

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / 4

        have = torch.ones(E, dtype=torch.bool) if known is None else known
        maps = normal(E, rank, H), normal(E, rank, H), normal(E, H), normal(E, H)
        layers.append(StandInLayer(layer.info.name, layer.info.index, code, *maps, have))
    write_standins(path, layers, {})
    return path


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def file(model, tmp_path):
    return drawn(model, tmp_path / "s.safetensors")


def steps(model, many: int = 5):
    """Logits of a prompt, and of one decode step of a batch."""
    ids = torch.arange(many * 6, device=model.device).reshape(many, 6) % 60 + 2
    with torch.no_grad():
        prompt = model(ids, use_cache=True)
        decode = model(ids[:, :1], past_key_values=prompt.past_key_values, use_cache=True)
    return prompt.logits, decode.logits


def heard(model):
    """Keep what experts of the first layer are given and give in the last forward."""
    kept = {}
    module = model.model.layers[0].mlp.experts
    router = model.model.layers[0].mlp.gate

    def before(module, args):
        kept["given"] = args

    def routed(module, args, output):
        kept["own"] = output

    handles = [module.register_forward_pre_hook(before), router.register_forward_hook(routed, prepend=True)]
    return kept, handles


class TestAgainstTheirFormula:
    @pytest.mark.parametrize(("mode", "share"), [("stand-in", 0.0), ("blend", 0.2)])
    def test_one_layer_by_hand(self, model, file, mode, share):
        kept, handles = heard(model)
        answers = {}
        options = {"top": 1, "standins": {"file": file, "mode": mode}}
        with lynx.attach(model, "batch-union", **options) as handle:
            experts = model.model.layers[0].mlp.experts
            handles.append(experts.register_forward_hook(lambda m, a, o: answers.update(output=o)))
            steps(model)
        for each in handles:
            each.remove()
        hidden, *_ = kept["given"]
        _, own_weights, own_ids = kept["own"]
        stands = read_standins(file).layers[0]
        with lynx.attach(model, "batch-union", top=1) as plain:
            again, hooks = heard(model)
            steps(model)
            for each in hooks:
                each.remove()
        _, re_ids, re_weights = again["given"]
        assert torch.equal(own_ids, again["own"][2])
        active = own_ids[:, :1].flatten().tolist()
        expected = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            lost = [e not in active for e in own_ids[t].tolist()]
            for slot, e in enumerate(own_ids[t].tolist()):
                w, x = own_weights[t, slot], hidden[t]
                if not any(lost) or not lost[slot]:
                    expected[t] += (1 - share if any(lost) else 1) * w * one(experts, x, e)
                else:
                    answer = stands.mean_out[e] + (x - stands.mean_in[e]) @ stands.inner[e].T @ stands.outer[e]
                    expected[t] += (1 - share) * w * answer
            if any(lost):
                for slot, e in enumerate(re_ids[t].tolist()):
                    expected[t] += share * re_weights[t, slot] * one(experts, hidden[t], e)
        torch.testing.assert_close(answers["output"], expected, rtol=1e-4, atol=1e-5)
        assert handle.report().total["decode"].answered_mass_mean > 0
        assert plain.report().total["decode"].answered_mass_mean == 0

    def test_a_stand_in_for_every_expert_that_is_the_expert_changes_nothing(self, tmp_path):
        model = linear_experts()
        ids = torch.randn(6, 1, 16)
        exact = model(ids)
        path = tmp_path / "s.safetensors"
        calibrate(model, [Passage(torch.randn(40, 1, 16)) for _ in range(4)], path, Effort(ranks=(16,), least=8))
        options = {"standins": {"file": path, "mode": "stand-in"}}
        with lynx.attach(model, "batch-union", top=1, **options) as handle, lynx.step("decode"), torch.no_grad():
            answered = model(ids)
        assert handle.report().total["decode"].answered_mass_mean > 0.05
        torch.testing.assert_close(answered, exact, rtol=0, atol=3e-2)
        with lynx.attach(model, "batch-union", top=1), lynx.step("decode"), torch.no_grad():
            assert (model(ids) - exact).abs().max() > 3 * (answered - exact).abs().max()


def one(experts, hidden, expert):
    """One expert of transformers' for one token."""
    with torch.no_grad():
        return experts.forward(hidden[None], torch.tensor([[expert]]), torch.ones(1, 1))[0]


def linear_experts():
    """A hand-written block whose experts are linear, so that stand-ins can be exact."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.gate = torch.nn.Linear(16, 6, bias=False)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6))

        def forward(self, hidden):
            flat = hidden.reshape(-1, 16)
            weights, ids = torch.topk(torch.softmax(self.gate(flat).float(), -1), 3)
            weights = (weights / weights.sum(-1, keepdim=True)).to(flat.dtype)
            out = torch.zeros_like(flat)
            for e, expert in enumerate(self.experts):
                rows, slots = torch.where(ids == e)
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
            return out.reshape(hidden.shape)

    return torch.nn.Sequential(Block()).eval().requires_grad_(False)


class TestWhatIsLeftAlone:
    def test_prefill_and_detached_models(self, model, file):
        prompt, decode = steps(model)
        before = families.footprint(model)
        with lynx.attach(model, "batch-union", top=1, standins=file):
            under = steps(model)
            assert torch.equal(under[0], prompt)
            assert not torch.allclose(under[1], decode)
        after = steps(model)
        assert torch.equal(after[0], prompt)
        assert torch.equal(after[1], decode)
        assert families.footprint(model) == before

    def test_rows_that_lose_nothing(self, model, file):
        _, decode = steps(model)
        with lynx.attach(model, "batch-union", top=3, standins=file) as handle:
            assert torch.equal(steps(model)[1], decode)
        assert handle.report().total["decode"].answered_mass_mean == 0

    def test_mode_re_pick_leaves_the_file_unused(self, model, file):
        with lynx.attach(model, "batch-union", top=1):
            expected = steps(model)[1]
        with lynx.attach(model, "batch-union", top=1, standins={"file": file, "mode": "re-pick"}):
            assert torch.equal(steps(model)[1], expected)

    def test_a_file_without_any_stand_in_is_refused(self, model, tmp_path):
        none = drawn(model, tmp_path / "none.safetensors", torch.zeros(6, dtype=torch.bool))
        with pytest.raises(lynx.ConfigError, match="no stand-in for any expert"):
            lynx.attach(model, "batch-union", top=1, standins=none)

    def test_tokens_with_one_expert_have_nothing_to_answer_for(self, model, file):
        torch.manual_seed(0)
        one = MixtralForCausalLM(MixtralConfig(**{**model.config.to_dict(), "num_experts_per_tok": 1})).eval()
        with pytest.raises(lynx.UnsupportedModelError, match="one expert"):
            lynx.attach(one, "batch-union", standins=file)

    def test_a_pause(self, model, file):
        _, decode = steps(model)
        with lynx.attach(model, "batch-union", top=1, standins=file) as handle, handle.paused():
            assert torch.equal(steps(model)[1], decode)


class TestOnTheWay:
    @pytest.mark.parametrize("mode", ["blend", "stand-in"])
    def test_teacher_forcing_gives_what_decode_steps_give(self, model, file, mode):
        ids = torch.arange(5 * 6).reshape(5, 6) % 60 + 2
        options = {"top": 1, "standins": {"file": file, "mode": mode}}
        with lynx.attach(model, "batch-union", **options) as handle, torch.no_grad():
            cache, found = None, []
            prompt = model(ids[:, :3], use_cache=True)
            cache = prompt.past_key_values
            for column in range(3, 6):
                found.append(model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits[:, 0])
            with handle.teacher_forced(3):
                forced = model(ids, use_cache=False).logits
        torch.testing.assert_close(forced[:, 3:], torch.stack(found, 1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("experts", ["model", "lynx"])
    def test_either_implementation_of_the_experts(self, model, file, experts):
        with lynx.attach(model, "batch-union", top=1, standins=file, experts="model"):
            expected = steps(model)[1]
        with lynx.attach(model, "batch-union", top=1, standins=file, experts=experts):
            torch.testing.assert_close(steps(model)[1], expected, rtol=1e-4, atol=1e-5)

    def test_lower_ranks_are_the_leading_directions(self, model, file):
        outputs = []
        for rank in (None, 16, 4, 0):
            with lynx.attach(model, "batch-union", top=1, standins={"file": file, "rank": rank}):
                outputs.append(steps(model)[1])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.allclose(outputs[1], outputs[2])
        assert not torch.allclose(outputs[2], outputs[3])

    def test_copies_and_pickles_answer_for_themselves(self, model, file):
        with lynx.attach(model, "batch-union", top=1, standins=file):
            expected = steps(model)[1]
            assert torch.equal(steps(copy.deepcopy(model))[1], expected)
            assert torch.equal(steps(pickle.loads(pickle.dumps(model)))[1], expected)

    @pytest.mark.parametrize("mode", ["blend", "stand-in"])
    def test_compiled_whole(self, model, file, mode):
        """Generation in whole graphs gives the tokens of eager code."""
        torch.compiler.reset()
        settings = CompileConfig(fullgraph=True, mode=None, backend="eager")
        settings._compile_all_devices = True  # it is for GPUs only, otherwise
        batch = {"input_ids": torch.arange(20).reshape(5, 4) + 2, "max_new_tokens": 4, "do_sample": False}
        batch |= {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
        batch["suppress_tokens"] = [0, 1]
        with lynx.attach(model, "batch-union", top=1, standins={"file": file, "mode": mode}) as handle:
            eager = model.generate(**batch, disable_compile=True)
            answered = handle.report().total["decode"].answered_mass_mean
            handle.reset()
            compiled = model.generate(**batch, compile_config=settings)
            assert 0 < answered == pytest.approx(handle.report().total["decode"].answered_mass_mean)
        assert torch.equal(compiled.sequences, eager.sequences)
        torch.testing.assert_close(compiled.logits, eager.logits)
        torch.compiler.reset()

    @pytest.mark.kernel
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("mode", ["blend", "stand-in"])
    def test_kernels_give_what_torch_gives(self, model, file, mode, monkeypatch):
        """Who answers, the answers and the count: one launch, two launches and none of torch's operations."""
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = {}
        for word in ("loop", "triton"):
            monkeypatch.setenv("LYNX_KERNELS", word)
            if word == "triton":
                for name in ("answer", "add_answered"):  # the torch form of what the kernel does
                    monkeypatch.delattr(LayerStandIns if name == "answer" else Counters, name)
            with lynx.attach(model, "batch-union", top=1, standins={"file": file, "mode": mode}) as handle:
                found[word] = steps(model)[1], handle.report().total["decode"]
        torch.testing.assert_close(found["triton"][0], found["loop"][0])
        in_torch, in_kernel = (found[word][1] for word in ("loop", "triton"))
        assert 0 < in_torch.answered_mass_mean == pytest.approx(in_kernel.answered_mass_mean)
        assert in_torch.answered_mass_most == pytest.approx(in_kernel.answered_mass_most)

    def test_hand_written_blocks(self, tmp_path):
        model = linear_experts()
        calibrate(model, [Passage(torch.randn(40, 1, 16)) for _ in range(4)], tmp_path / "s", Effort(ranks=(4,)))
        ids = torch.randn(6, 1, 16)
        exact = model(ids)
        with lynx.attach(model, "batch-union", top=1, standins=tmp_path / "s"), lynx.step("decode"):
            assert not torch.allclose(model(ids), exact)
        assert torch.equal(model(ids), exact)


class TestConfiguration:
    def test_files_are_read_from_where_the_configuration_stands(self, model, file, tmp_path):
        (tmp_path / "lynx.yaml").write_text("strategy: {name: batch-union, top: 1}\nstandins: s.safetensors\n")
        config = lynx.load_config(tmp_path / "lynx.yaml")
        assert config.standins.file == file
        with lynx.attach(model, "batch-union", top=1, standins=file):
            expected = steps(model)[1]
        with lynx.attach(model, config):
            assert torch.equal(steps(model)[1], expected)
        config.save(tmp_path / "again.yaml")
        assert "file: s.safetensors" in (tmp_path / "again.yaml").read_text()
        assert lynx.load_config(tmp_path / "again.yaml") == config
        other = tmp_path / "elsewhere"
        other.mkdir()
        config.save(other / "lynx.json")
        assert json.loads((other / "lynx.json").read_text())["standins"]["file"] == file.as_posix()

    def test_what_is_refused(self, model, file, tmp_path):
        for options in ({"file": file, "mode": "none"}, {"mode": "blend"}, {"file": file, "rank": -1}, 3):
            with pytest.raises(lynx.ConfigError, match="standins"):
                lynx.attach(model, "batch-union", standins=options)
        with pytest.raises(lynx.ConfigError, match="rank=17"):
            lynx.attach(model, "batch-union", standins={"file": file, "rank": 17})
        with pytest.raises(lynx.ConfigError, match="there is no file"):
            lynx.attach(model, "batch-union", standins=tmp_path / "none")

    def test_a_file_of_other_experts_is_refused(self, file, model):
        with pytest.raises(lynx.ConfigError, match="other experts"):
            lynx.attach(tiny(1), "batch-union", standins=file)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[3] *= 1.1
        with pytest.raises(lynx.ConfigError, match="other experts"):
            lynx.attach(model, "batch-union", standins=file)
        with lynx.attach(model, "batch-union", standins=file, layers={"include": [0]}):
            pass  # the layer that is taken is as it was

    def test_a_file_that_lacks_a_layer_is_refused(self, model, file, tmp_path):
        layers = read_standins(file).layers
        write_standins(tmp_path / "one.safetensors", [layers[0]], {})
        with pytest.raises(lynx.ConfigError, match="no stand-ins for layer"):
            lynx.attach(model, "batch-union", standins=tmp_path / "one.safetensors")

    def test_the_same_weights_in_another_precision_are_known(self, model, file):
        rounded = model.bfloat16()
        path = drawn(rounded, file.with_name("half.safetensors"))
        with lynx.attach(rounded.float(), "batch-union", standins=path):
            pass

    def test_experts_that_are_weighed_before_they_run_are_refused(self, file):
        llama = zoo.build("llama4")
        with pytest.raises(lynx.UnsupportedModelError, match="takes no stand-ins"):
            lynx.attach(llama, "batch-union", standins=file)


def test_longcat_is_calibrated_and_answered_for(tmp_path):
    """Its experts squeeze the axis of slots away where there is one, and some of them compute nothing."""
    model = zoo.build("longcat_flash")
    ids = torch.arange(4 * 12).reshape(4, 12) % 40 + 3
    passages = [Passage({"input_ids": ids + shift, "use_cache": False}) for shift in (0, 5, 9)]
    made = calibrate(model, passages, tmp_path / "s.safetensors", Effort(ranks=(4,), least=1))
    assert any(bool(layer.known.any()) for layer in made.layers.values())
    with lynx.attach(model, "batch-union", top=1, standins=tmp_path / "s.safetensors") as handle, torch.no_grad():
        prompt = model(ids, use_cache=True)
        decode = model(ids[:, :1], past_key_values=prompt.past_key_values, use_cache=True)
    assert torch.isfinite(decode.logits).all()
    assert handle.report().total["decode"].steps == 1
