"""Stand-ins in real engines: a file is made with transformers, and vLLM answers with it as transformers does."""

import json

import pytest
import torch
from reference import EOS, PAD, parts, problems, save_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

import lynx
from lynx.calibration.calibrate import Effort, calibrate
from lynx.calibration.listening import Passage
from lynx.calibration.text import calibrate_on
from lynx.measuring.examples import reference_examples
from lynx.measuring.subject import load_subject

TOKENS = 12
FEW = {"name": "top-budget", "budget": 8}
SIDE_BY_SIDE = {"max_num_batched_tokens": 4096, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Stand-ins of the reference model, from a part of the text that comes with it."""
    path = tmp_path_factory.mktemp("standins") / "standins.safetensors"
    calibrate_on(load_subject("reference"), reference_examples()[::16], path)
    return path


def configured(file, mode="stand-in"):
    return {"strategy": FEW, "standins": {"file": str(file), "mode": mode}}


def in_transformers(config, model=None):
    """What transformers says: tokens and their log-likelihoods, all problems side by side."""
    reference = lynx.load_reference_model()
    model = (model or reference.model).float()
    model.generation_config.eos_token_id = None
    batch = reference.encode(parts(problems()[:16]))
    with lynx.attach(model, lynx.Config.build(config)), torch.no_grad():
        done = model.generate(
            **batch, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    tokens = done.sequences[:, -TOKENS:]
    scores = torch.stack(done.scores, dim=1).log_softmax(-1)
    return tokens.tolist(), scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@pytest.fixture(scope="module")
def served(offline, file):
    """One engine: with stand-ins from its start, without anything, and with other settings put on it."""
    settings = [{"strategy": FEW}, configured(file, "blend")]
    return offline(lynx=configured(file), engine=SIDE_BY_SIDE, likelihoods=TOKENS, settings=settings)


@pytest.mark.first
def test_the_engine_says_what_transformers_says(served, file):
    result, log = served
    assert log.count("Lynx is armed: 4 MoE layers, strategy top-budget") == 1
    plain, blend = result["others"][1:]
    for said, config in (
        (result["configured"], configured(file)),
        (plain, {"strategy": FEW}),
        (blend, configured(file, "blend")),
    ):
        tokens, likely = in_transformers(config)
        assert said["tokens"] == tokens
        torch.testing.assert_close(torch.tensor(said["logprobs"]), likely, rtol=0, atol=1e-4)
    apart = torch.tensor(result["configured"]["logprobs"]) - torch.tensor(plain["logprobs"])
    assert apart.abs().max() > 0.05


@pytest.mark.first
def test_what_is_added_is_what_the_file_says(served):
    result, _ = served
    added = result["added"]
    assert added["rows"] > result["configured"]["rows"] > 100
    assert added["worst"] < 1e-4 < added["largest"]
    assert added["others_same"]
    assert result["configured"]["answered"] > 0.02


@pytest.mark.first
def test_detached_nothing_is_added(served):
    result, _ = served
    assert "forward_modular" in result["others"][0]["gone"]
    tokens, likely = in_transformers({"strategy": {"name": "exact"}})
    assert result["others"][0]["tokens"] == tokens
    torch.testing.assert_close(torch.tensor(result["others"][0]["logprobs"]), likely, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A random model with shared experts, a dense layer, sigmoid scores with a bias, and a scale; and a file for it."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, n_routed_experts=16, num_experts_per_tok=4,
        n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=2.5, max_position_embeddings=512,
        num_nextn_predict_layers=0, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config).eval()
    for tensor in model.parameters():
        tensor.data.mul_(4 if tensor.ndim > 1 else 1)
    model.lm_head.weight.data[PAD:] = 0.0  # never the likeliest: transformers would take such a row for one that ended
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    folder = save_tokenizer(tmp_path_factory.mktemp("shared"))
    model.save_pretrained(folder)
    path = tmp_path_factory.mktemp("standins") / "shared.safetensors"
    calibrate(model, [Passage(torch.randint(0, 256, (8, 64))) for _ in range(8)], path, Effort(ranks=(8,), least=8))
    return folder, model, path


def test_shared_experts_and_scales_are_as_they_were(offline, shared):
    folder, model, path = shared
    result, _ = offline(model=folder, lynx=configured(path), engine=SIDE_BY_SIDE, likelihoods=TOKENS)
    tokens, likely = in_transformers(configured(path), model)
    assert result["configured"]["tokens"] == tokens
    torch.testing.assert_close(torch.tensor(result["configured"]["logprobs"]), likely, rtol=0, atol=1e-4)
    _, plain = in_transformers({"strategy": FEW}, model)
    assert (plain - likely).abs().max() > 0.05


def test_compiled(served, offline, file):
    """Compiled code asks for what was lost when it runs."""
    options = SIDE_BY_SIDE | {"enforce_eager": False}
    result, _ = offline(lynx=configured(file), engine=options, likelihoods=TOKENS, settings=[{"strategy": FEW}])
    said, eager = result["configured"], served[0]["configured"]
    assert said["tokens"] == eager["tokens"]
    torch.testing.assert_close(torch.tensor(said["logprobs"]), torch.tensor(eager["logprobs"]), rtol=0, atol=1e-4)
    assert said["rows"] == eager["rows"] > 100
    assert result["others"][0]["tokens"] == served[0]["others"][0]["tokens"]
    assert "compiled its model" in result["others"][1]["refused"]  # it would go on as it was compiled


def test_second_model_runner(served, offline, file):
    """The one that vLLM takes by itself for many models on GPUs; here its kernels are interpreted."""
    second = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    result, log = offline(lynx=configured(file), engine=SIDE_BY_SIDE, environment=second, likelihoods=TOKENS)
    assert "Using V2 Model Runner" in log
    said, first = result["configured"], served[0]["configured"]
    assert said["tokens"] == first["tokens"]
    torch.testing.assert_close(torch.tensor(said["logprobs"]), torch.tensor(first["logprobs"]), rtol=0, atol=1e-4)
    assert said["rows"] == first["rows"] > 100


def test_files_for_other_experts_are_refused_before_anything_is_served(offline, file, tmp_path):
    """As the file of a model that was trained on: the hash of one layer is another one."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    layers = json.loads(metadata["layers"])
    layers[2]["experts"] = layers[1]["experts"]
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(file), foreign, metadata | {"layers": json.dumps(layers)})
    _, log = offline(lynx=configured(foreign), fails=True)
    assert "was made for other experts than those of this model" in log
    assert "Lynx is armed" not in log


def test_ranks_that_have_a_part_of_every_expert_are_refused(offline, file):
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    _, log = offline(lynx=configured(file), engine=options, environment=apart, fails=True)
    assert "its experts are spread over processes" in log
    assert "Lynx is armed" not in log
