"""What holds of `lynx eval --tasks` where the harness is not installed, too."""

import sys

import pytest

from lynx.cli import main


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "reference", "--strategy", "exact", *arguments])
    assert stopped.value.code == 2


def test_a_missing_harness_is_told_with_its_command(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run("--tasks", "gsm8k")
    told = capsys.readouterr().err
    assert "not installed here" in told
    assert "pip install 'lynx-moe[lm-eval]'" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "gsm8k", "--columns", "8", "--similar"], "--columns, --similar does not go with --tasks"),
        (["--limit", "8", "--controls", "exact"], "--limit, --controls goes with --tasks"),
        (["--tasks", " , "], "names no task"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, capsys):
    run(*arguments)
    assert words in capsys.readouterr().err
