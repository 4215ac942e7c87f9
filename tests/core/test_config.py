"""Configuration: one schema for Python, YAML, JSON and LYNX_CONFIG, and errors that say what to do."""

import json
import re

import pydantic
import pytest
import yaml

import lynx
from lynx.config import Config, resolve_config
from lynx.plugins import registry

STRATEGIES = {name: found.cls.example() for name, found in registry().strategies.items()}
NESTED = {
    "name": "phase-aware",
    "prefill": {"name": "per-layer", "default": "exact", "strategies": {1: {"name": "top-budget", "budget": 12}}},
    "decode": {"name": "by-batch-size", "sizes": {2: {"name": "importance-threshold", "mass": 0.7}, 16: "exact"}},
}


@pytest.fixture
def write(tmp_path):
    def write(text, name="lynx.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
    @pytest.mark.parametrize("strategy", [*STRATEGIES.values(), lynx.make_strategy(NESTED)], ids=lambda s: s.name)
    def test_files_give_back_what_was_saved(self, strategy, suffix, tmp_path):
        config = Config(strategy=strategy, min_tokens=3, max_decode_q=4, layers={"include": (0, "a.b")}, experts="lynx")
        path = tmp_path / f"lynx.{suffix}"
        config.save(path)
        again = lynx.load_config(path)
        assert again == config
        assert type(again.strategy) is type(strategy)
        assert again.dump() == config.dump()

    @pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda s: s.name)
    def test_dumps_are_plain_data(self, strategy):
        data = Config(strategy=strategy).dump()
        assert lynx.load_config(json.loads(json.dumps(data))) == Config(strategy=strategy)
        assert data["strategy"]["name"] == strategy.name
        assert data["strategy"] == strategy.model_dump(mode="json")

    def test_a_saved_yaml_reads_like_the_documented_one(self, tmp_path):
        config = lynx.load_config({"strategy": {"name": "batch-union", "top": 3}})
        config.save(tmp_path / "lynx.yaml")
        assert yaml.safe_load((tmp_path / "lynx.yaml").read_text()) == {
            "strategy": {"name": "batch-union", "protect": 1, "refill": "re-pick", "floor": 0.0, "top": 3},
            "min_tokens": 2,
            "max_decode_q": 1,
            "layers": "all",
            "experts": "auto",
        }
        assert (tmp_path / "lynx.yaml").read_text().startswith("strategy:\n  name: batch-union\n")

    @pytest.mark.parametrize(
        "layers",
        [
            lynx.MoESpec(),
            lynx.MoESpec(router="gate", shared="shared_expert", top_k=2),
            {"blocks": "layers.*.moe", "exclude": [1], "up": "w_in", "down": "w_out", "score": "sigmoid"},
        ],
        ids=["nothing", "an-object", "a-mapping"],
    )
    @pytest.mark.parametrize("suffix", ["yaml", "json"])
    def test_descriptions_of_blocks(self, layers, suffix, tmp_path):
        config = Config(strategy=lynx.make_strategy("exact"), layers=layers)
        assert type(config.layers) is lynx.MoESpec
        assert lynx.MoESpec(shared="a", blocks="b") == lynx.MoESpec(shared=["a"], blocks=("b",))
        config.save(tmp_path / f"lynx.{suffix}")
        assert lynx.load_config(tmp_path / f"lynx.{suffix}") == config

    def test_nested_strategies_keep_their_options(self):
        config = lynx.load_config({"strategy": NESTED})
        assert config.strategy.prefill.strategies[1].budget == 12
        assert config.strategy.decode.sizes[2].mass == 0.7
        assert config.strategy.decode.sizes[16] == lynx.make_strategy("exact")


class TestForms:
    """A strategy is a name with options, an instance or a mapping, wherever one is expected."""

    WANTED = lynx.make_strategy("batch-union", top=3)

    @pytest.mark.parametrize("given", [{"name": "batch-union", "top": 3}, WANTED], ids=["mapping", "instance"])
    def test_forms_are_equal(self, given):
        assert lynx.make_strategy(given) == self.WANTED
        assert lynx.load_config({"strategy": given}).strategy == self.WANTED
        assert lynx.make_strategy("phase-aware", decode=given).decode == self.WANTED
        assert resolve_config(given, {}).strategy == self.WANTED

    def test_a_name_alone(self):
        assert lynx.make_strategy("batch-union").top == 2
        assert lynx.load_config({"strategy": "batch-union"}).strategy.top == 2

    def test_options_beside_a_mapping_win(self):
        assert lynx.make_strategy({"name": "batch-union", "top": 3}, top=4).top == 4

    def test_options_beside_an_instance_are_refused(self):
        with pytest.raises(lynx.ConfigError, match=re.escape("options ['top'] were given with a finished strategy")):
            lynx.make_strategy(self.WANTED, top=4)

    def test_options_are_frozen(self):
        with pytest.raises(pydantic.ValidationError):
            self.WANTED.top = 4

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (3, "a strategy is a name, a mapping with `name`, or an instance; got int"),
            (None, "got NoneType"),
            ({"top": 3}, "a strategy mapping needs `name`; got the keys ['top']"),
        ],
    )
    def test_other_things_are_refused(self, given, message):
        with pytest.raises(lynx.ConfigError, match=re.escape(message)):
            lynx.make_strategy(given)


class TestErrors:
    def test_an_unknown_strategy_is_told_its_neighbour_and_all_that_exist(self):
        with pytest.raises(lynx.ConfigError) as told:
            lynx.make_strategy("batch-unoin")
        assert "unknown strategy 'batch-unoin'. Did you mean 'batch-union'? Registered: affinity-binning, " in str(
            told.value
        )
        for name in STRATEGIES:
            assert name in str(told.value)

    def test_an_unknown_option_too(self):
        with pytest.raises(lynx.ConfigError) as told:
            lynx.make_strategy("batch-union", tpo=3)
        expected = (
            "strategy 'batch-union': no option 'tpo'. Did you mean 'top'? Options: name, protect, refill, floor, top."
        )
        assert str(told.value) == expected
        assert isinstance(told.value.__cause__, pydantic.ValidationError)

    def test_nested_faults_name_their_place(self):
        with pytest.raises(lynx.ConfigError, match=r"strategy: .*decode: .*no option 'tpo'\. Did you mean 'top'\?"):
            lynx.load_config({"strategy": {"name": "phase-aware", "decode": {"name": "batch-union", "tpo": 3}}})

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"strategy": "exact", "min_token": 3}, "no option 'min_token'. Did you mean 'min_tokens'?"),
            ({"strategy": "exact", "min_tokens": "many"}, "min_tokens: Input should be a valid integer"),
            ({"strategy": "exact", "min_tokens": 0}, "min_tokens: Input should be greater than or equal to 1 (got 0)"),
            ({"strategy": "exact", "max_decode_q": 0}, "max_decode_q"),
            ({"strategy": "exact", "experts": "gpu"}, "experts: Input should be 'auto', 'model' or 'lynx' (got 'gpu')"),
            ({"strategy": "exact", "layers": {}}, "`layers` needs `include` or `exclude`"),
            ({"strategy": "exact", "layers": {"includes": [1]}}, "no option 'includes'. Did you mean 'include'?"),
            ({"strategy": "exact", "layers": "some"}, "`layers` is `all`, or a mapping with lists under `include`"),
            ({}, "strategy: Field required"),
            ({"strategy": 3}, "a strategy is a name, a mapping with `name`, or an instance; got int"),
            ({"strategy": {"name": "top-budget"}}, "budget: Field required"),
            ({"strategy": {"name": "top-budget", "budget": "two"}}, "(got 'two')"),
        ],
        ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
    )
    def test_what_is_wrong_is_said_with_its_value(self, data, message, write):
        with pytest.raises(lynx.ConfigError, match=re.escape(message)):
            lynx.load_config(data)
        path = write(json.dumps(data), "lynx.json")
        with pytest.raises(lynx.ConfigError, match=re.escape(message)) as told:
            lynx.load_config(path)
        assert str(path) in str(told.value)

    def test_errors_are_value_errors_with_pydantics_report(self):
        with pytest.raises(ValueError, match="min_tokens") as told:
            lynx.load_config({"strategy": "exact", "min_tokens": 0})
        assert isinstance(told.value, lynx.LynxError)
        assert told.value.__cause__.errors()[0]["loc"] == ("min_tokens",)


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "name", "message"),
        [
            ("strategy: [", "lynx.yaml", "is not valid YAML"),
            ("{", "lynx.json", "is not valid JSON"),
            ("- strategy\n", "lynx.yaml", "must hold a mapping with the key `strategy`; it holds list"),
            ("exact\n", "lynx.yaml", "it holds str"),
            ("", "lynx.yaml", "it holds NoneType"),
            ("[1]", "lynx.json", "it holds list"),
        ],
    )
    def test_what_is_not_a_configuration(self, text, name, message, write):
        path = write(text, name)
        with pytest.raises(lynx.ConfigError, match=re.escape(message)) as told:
            lynx.load_config(path)
        assert str(path) in str(told.value)

    def test_what_cannot_be_read(self, tmp_path):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
            with pytest.raises(lynx.ConfigError, match="cannot read the configuration") as told:
                lynx.load_config(path)
            assert str(path) in str(told.value)

    def test_yaml_that_wants_to_run_code_is_refused(self, write):
        with pytest.raises(lynx.ConfigError, match="is not valid YAML"):
            lynx.load_config(write("strategy: !!python/object/apply:os.getcwd []\n"))

    def test_paths_may_be_text_and_configs_pass_through(self, write):
        path = write("strategy: exact\n")
        config = lynx.load_config(str(path))
        assert config == lynx.load_config(path)
        assert lynx.load_config(config) is config


class TestPrecedence:
    """Argument over file over LYNX_CONFIG."""

    FILE = "strategy: {name: batch-union, top: 3}\nmin_tokens: 5\nexperts: model\n"

    def test_the_environment_is_the_last_resort(self, write, monkeypatch):
        monkeypatch.setenv("LYNX_CONFIG", str(write(self.FILE)))
        config = resolve_config(None, {})
        assert (config.strategy.name, config.strategy.top, config.min_tokens) == ("batch-union", 3, 5)
        assert resolve_config("exact", {}).strategy.name == "exact"
        assert resolve_config("exact", {}).min_tokens == 2

    def test_arguments_win_over_the_environment(self, write, monkeypatch):
        monkeypatch.setenv("LYNX_CONFIG", str(write(self.FILE)))
        config = resolve_config(None, {"min_tokens": 7})
        assert (config.strategy.top, config.min_tokens, config.experts) == (3, 7, "model")

    def test_a_file_wins_over_the_environment(self, write, monkeypatch):
        monkeypatch.setenv("LYNX_CONFIG", str(write("strategy: exact\nmin_tokens: 9\n")))
        config = resolve_config(lynx.load_config(write(self.FILE, "other.yaml")), {})
        assert (config.strategy.name, config.min_tokens) == ("batch-union", 5)

    def test_arguments_win_over_a_file(self, write):
        config = resolve_config(lynx.load_config(write(self.FILE)), {"experts": "lynx", "layers": {"exclude": [0]}})
        assert (config.min_tokens, config.experts, config.layers.exclude) == (5, "lynx", (0,))

    def test_a_mapping_may_be_a_whole_configuration(self):
        config = resolve_config({"strategy": "exact", "min_tokens": 4}, {"experts": "model"})
        assert (config.strategy.name, config.min_tokens, config.experts) == ("exact", 4, "model")

    def test_options_of_strategy_and_configuration_are_told_apart(self):
        config = resolve_config("batch-union", {"top": 4, "min_tokens": 3})
        assert (config.strategy.top, config.min_tokens) == (4, 3)

    @pytest.mark.parametrize(
        ("spec", "options", "message"),
        [
            (None, {}, "no strategy was given and LYNX_CONFIG is not set"),
            (Config(strategy="exact"), {"top": 3}, "unknown arguments ['top']"),
            ("batch-union", {"tpo": 3}, "Did you mean 'top'?"),
            ("batch-union", {"min_token": 3}, "Did you mean 'min_tokens'?"),
            ("batch-union", {"min_tokens": 0}, "min_tokens"),
        ],
    )
    def test_what_is_refused(self, spec, options, message, monkeypatch):
        monkeypatch.delenv("LYNX_CONFIG", raising=False)
        with pytest.raises(lynx.ConfigError, match=re.escape(message)):
            resolve_config(spec, options)

    def test_a_wrong_path_in_the_environment_is_named(self, monkeypatch):
        monkeypatch.setenv("LYNX_CONFIG", "/nowhere/lynx.yaml")
        with pytest.raises(lynx.ConfigError, match=r"/nowhere/lynx\.yaml"):
            resolve_config(None, {})
