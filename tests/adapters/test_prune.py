"""The decorator, on a loader, a class and a model."""

import families
import pytest
import torch
from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

import lynx

PRUNING = {"name": "batch-union", "top": 1}


def _prunes(model):
    """Whether decode differs from what the model does alone, and is that again after detach."""
    batch, tokens = families.prompts(), families.new_tokens()
    attached = families.stepwise(model, batch, tokens)
    lynx.detach(model)
    alone = families.stepwise(model, batch, tokens)
    return torch.equal(attached.prefill, alone.prefill) and not torch.equal(attached.decode, alone.decode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    families.shared("qwen3_moe").save_pretrained(path)
    return path


def test_loader():
    @lynx.prune("batch-union", top=1)
    def load(name, *, size=2):
        """Load a model."""
        return families.build(name, num_hidden_layers=size)

    assert (load.__name__, load.__doc__) == ("load", "Load a model.")
    model = load("mixtral", size=1)
    assert len(model.model.layers) == 1
    assert _prunes(model)


def test_loader_of_model_and_tokenizer(folder):
    @lynx.prune(lynx.Config(strategy=PRUNING, experts="lynx"))
    def load():
        return Qwen3MoeForCausalLM.from_pretrained(folder), "tokenizer"

    model, tokenizer = load()
    assert tokenizer == "tokenizer"
    assert _prunes(model)


def test_loader_that_returns_something_else():
    @lynx.prune("exact")
    def load(value):
        return value

    for value in (None, (), ("tokenizer", "model"), {"model": 1}):
        with pytest.raises(lynx.ConfigError, match=r"load\(\) returned"):
            load(value)


def test_class_by_construction(family):
    settings = families.FAMILIES[family]
    cls = lynx.prune("batch-union", top=1)(settings.model)
    assert issubclass(cls, settings.model)
    assert cls is not settings.model
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        settings.model.__name__,
        settings.model.__qualname__,
        settings.model.__module__,
        settings.model.__doc__,
    )
    # a model that is constructed is in training mode, where selection waits
    with pytest.warns(lynx.LynxWarning, match="training mode"):
        model = cls(families.shared(family).config)
    model.load_state_dict(families.shared(family).state_dict())
    assert _prunes(model.eval())


@pytest.mark.smoke
def test_class_from_a_folder(folder):
    cls = lynx.prune("batch-union", top=1)(Qwen3MoeForCausalLM)
    model = cls.from_pretrained(folder)
    assert isinstance(model, cls)
    assert not model.training
    for name, value in families.shared("qwen3_moe").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert _prunes(model)

    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert _prunes(model)
    model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert _prunes(model)
    # the class itself is as it was
    with pytest.raises(lynx.AttachError):
        lynx.detach(Qwen3MoeForCausalLM.from_pretrained(folder))


def test_own_class(folder):
    @lynx.prune("batch-union", top=1, experts="lynx")
    class Mine(Qwen3MoeForCausalLM):
        """My model."""

        def answer(self):
            return 42

    model = Mine.from_pretrained(folder)
    assert (Mine.__doc__, model.answer()) == ("My model.", 42)
    assert _prunes(model)

    class Derived(Mine):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(2, 2)

    assert hasattr(Derived.from_pretrained(folder), "extra")


def test_saved_and_loaded_again(folder, tmp_path):
    cls = lynx.prune("batch-union", top=1)(Qwen3MoeForCausalLM)
    cls.from_pretrained(folder).save_pretrained(tmp_path)
    plain = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert plain.config.architectures == ["Qwen3MoeForCausalLM"]
    batch, tokens = families.prompts(), families.new_tokens()
    expected = families.stepwise(families.shared("qwen3_moe"), batch, tokens)
    assert torch.equal(families.stepwise(plain, batch, tokens).decode, expected.decode)


def test_instance():
    model = families.build("mixtral")
    assert lynx.prune("batch-union", top=1)(model) is model
    assert _prunes(model)


def test_mistakes_are_told_where_they_are_written():
    with pytest.raises(lynx.ConfigError, match="batch-union"):
        lynx.prune("batch-unoin", top=1)
    with pytest.raises(lynx.ConfigError, match="toop"):
        lynx.prune("batch-union", toop=1)
    for target in (3, "model", None, [MixtralForCausalLM]):
        with pytest.raises(lynx.ConfigError, match="a loader, a model class or a model"):
            lynx.prune("exact")(target)
