"""What `lynx eval --standins` measures beside each setting, and `lynx calibrate` on the command line."""

from __future__ import annotations

import json

import pytest

from lynx.cli.app import main
from lynx.errors import ConfigError
from lynx.measuring.settings import describe, parse_setting, with_standins


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little text of both domains of the reference model."""
    from lynx.reference_model import load_reference_model

    reference = load_reference_model()
    lines = [{"prompt": item.prompt, "continuation": item.continuation} for item in reference.code[:6]]
    lines += [{"prompt": item.prompt, "solution": item.solution, "domain": "p"} for item in reference.problems[:6]]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(text):
    path = text.with_name("standins.safetensors")
    main_quietly(["calibrate", "reference", "--data", str(text), "-o", str(path), "--rank", "2,4", "--batch", "4"])
    return path


def main_quietly(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)


def test_eval_measures_each_setting_with_them_too(file, text, capsys):
    options = [
        "--strategy",
        "importance-threshold ratio=0.5",
        "--standins",
        str(file),
        "--batch",
        "4",
        "--columns",
        "8",
    ]
    main_quietly(["eval", "reference", "--data", str(text), *options, "--seeds", "1", "--batches", "1", "--json"])
    plain, answered, *rest = json.loads(capsys.readouterr().out)["rows"]
    assert plain["answered_mass_mean"] == 0
    assert 0 < answered["answered_mass_mean"] < answered["answered_mass_most"] < 1
    assert answered["label"] == f"{plain['label']} + stand-ins (blend)"
    assert answered["setting"]["standins"]["file"] == file.as_posix()
    assert answered["kl"] != plain["kl"]
    assert all(row["control"] and row["answered_mass_mean"] == 0 for row in rest)


def test_the_table_has_their_columns_where_they_are(file, text, capsys):
    options = ["--strategy", "batch-union top=1", "--batch", "4", "--columns", "8", "--seeds", "1", "--batches", "1"]
    main_quietly(["eval", "reference", "--data", str(text), *options, "--standins", str(file)])
    assert "stood in" in capsys.readouterr().out
    main_quietly(["eval", "reference", "--data", str(text), *options])
    assert "stood in" not in capsys.readouterr().out


def test_calibrate_says_what_it_made(text, tmp_path, capsys):
    made = tmp_path / "s.safetensors"
    options = ["--data", str(text), "-o", str(made), "--rank", "1", "--batch", "4", "--least", "40"]
    main_quietly(["calibrate", "reference", *options])
    printed = capsys.readouterr().out
    assert "too little was seen of experts" in printed
    assert "model.layers.3.mlp.gate" in printed
    main_quietly(["calibrate", "reference", *options, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["bytes"] == made.stat().st_size
    assert [layer["rank"] for layer in plain["layers"]] == [1, 1, 1, 1]
    assert any(layer["missing"] for layer in plain["layers"])
    assert plain["conditions"]["model"] == "reference"


@pytest.mark.parametrize("rank", ["x", "4,", "-1", "4.5"])
def test_ranks_that_are_none_are_refused(rank, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "reference", "--rank", rank, "-o", str(tmp_path / "s")])
    assert ended.value.code == 2
    assert "rank" in capsys.readouterr().err


def test_settings_with_a_file_stand_beside_those_without(tmp_path):
    setting = parse_setting("batch-union top=1")
    assert with_standins([setting], None) == [setting]
    plain, answered = with_standins([setting], tmp_path / "s")
    assert plain == setting
    assert describe(answered) == "batch-union top=1 + stand-ins (blend)"
    with pytest.raises(ConfigError):
        parse_setting("batch-union standins=3")
