"""Recording what routers decide: the file holds what the model itself answers, wherever a token stands."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lynx
import lynx.attachment
from lynx.cli import main
from lynx.errors import ConfigError, UnsupportedModelError
from lynx.measuring.examples import Example, examples_hash, reference_examples
from lynx.measuring.recorder import Recorder
from lynx.measuring.subject import load_subject
from lynx.measuring.trace import open_trace, passes, record
from lynx.measuring.trace_file import TraceWriter

COLUMNS = 6


@pytest.fixture(scope="module")
def subject():
    return load_subject("reference")


@pytest.fixture(scope="module")
def examples():
    """Prompts and continuations of many lengths, of two domains in turns, and one without a continuation."""
    chosen = reference_examples()[:4] + reference_examples()[200:206]
    cut = [
        Example(each.prompt[-5 - 7 * place :], each.continuation[: 4 + place], each.answer, each.domain)
        for place, each in enumerate(chosen)
    ]
    return [cut[0], cut[9], Example((1, 2), (), "7", "code"), *cut[1:9]]


@pytest.fixture(scope="module")
def trace(subject, examples, tmp_path_factory):
    path, calls = tmp_path_factory.mktemp("trace") / "all.safetensors", []
    found = record(
        subject, examples, path, columns=COLUMNS, prompts=True, batch=4, advance=lambda: calls.append(path.exists())
    )
    # the file appears when it is whole
    assert calls == [False] * passes(examples, 4) == [False] * 3
    return found


def routers_alone(model, example):
    """What every router answers when the model reads one example by itself."""
    answers, hooks = [], []
    for router in (layer.mlp.gate for layer in model.model.layers):
        hooks.append(router.register_forward_hook(lambda module, args, output: answers.append(output)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[*example.prompt, *example.continuation[:COLUMNS]]]))
    for hook in hooks:
        hook.remove()
    return answers


def test_holds_what_the_model_answers(subject, examples, trace):
    used = [example for example in examples if example.continuation]
    assert [(each.prompt, each.continuation, each.domain) for each in trace.sequences] == [
        (len(each.prompt), min(len(each.continuation), COLUMNS), each.domain) for each in used
    ]
    for example, sequence in zip(used, trace.sequences, strict=True):
        rows = slice(sequence.start, sequence.start + sequence.rows)
        for info, (logits, weights, ids) in zip(trace.layers, routers_alone(subject.model, example), strict=True):
            held = {name: trace.tensors[f"layers.{info.index}.{name}"][rows] for name in ("logits", "ids", "weights")}
            torch.testing.assert_close(held["logits"], logits.float(), rtol=1e-4, atol=1e-4)
            assert torch.equal(held["ids"].long(), ids)
            torch.testing.assert_close(held["weights"], weights, rtol=1e-4, atol=1e-5)


def test_the_file_is_safetensors_and_says_what_it_holds(subject, examples, trace):
    tensors = load_file(trace.path)
    rows = trace.tokens
    assert rows == sum(sequence.rows for sequence in trace.sequences)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name[:8] == "layers.0"}
    assert shapes == {
        "layers.0.logits": (torch.float32, (rows, 32)),
        "layers.0.ids": (torch.int16, (rows, 4)),
        "layers.0.weights": (torch.float32, (rows, 4)),
    }
    assert len(tensors) == 4 * 3 + 4
    assert trace.layers == tuple(layer.info for layer in lynx.attachment.discover(subject.model).layers)
    conditions = trace.conditions
    assert (conditions["model"], conditions["data"]) == ("reference", examples_hash(examples))
    assert (conditions["lynx"], conditions["torch"]) == (lynx.__version__, torch.__version__)


def test_reading_in_other_batches_changes_nothing(subject, examples, trace, tmp_path):
    """Neither does leaving prompts out, which are read all the same."""
    other = record(subject, examples, tmp_path / "other.safetensors", columns=COLUMNS, batch=3)
    assert not other.has_prompts
    assert {each.prompt for each in other.sequences} == {0}
    for mine, its in zip(other.sequences, trace.sequences, strict=True):
        assert (mine.continuation, mine.domain) == (its.continuation, its.domain)
        begin = its.start + its.prompt
        for name, tensor in other.tensors.items():
            here, there = tensor[mine.start :][: mine.continuation], trace.tensors[name][begin:][: mine.continuation]
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_leaves_the_model_as_it_was(subject, examples, tmp_path):
    batch = {"input_ids": torch.tensor([examples[0].prompt])}
    with torch.no_grad():
        before = subject.model(**batch).logits
        keys = subject.model.state_dict().keys()
        record(subject, examples[:2], tmp_path / "some.safetensors", columns=2)
        assert torch.equal(subject.model(**batch).logits, before)
    assert subject.model.state_dict().keys() == keys
    with pytest.raises(lynx.AttachError, match="nothing is attached"):
        lynx.handle_of(subject.model)


def test_layers_that_are_not_shown_every_token_are_refused(trace):
    recorder = Recorder()
    recorder.bind(trace.layers[0]).keep(trace.routing(trace.layers[0], torch.arange(6)))
    with pytest.raises(UnsupportedModelError, match=r"decided over 6 tokens in 1 calls, where one pass read 7"):
        recorder.take(7)


def test_a_failure_leaves_no_file(subject, examples, tmp_path, trace):
    def stop():
        raise KeyboardInterrupt

    path = tmp_path / "never.safetensors"
    with pytest.raises(KeyboardInterrupt):
        record(subject, examples, path, columns=2, advance=stop)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="none of 1 examples has a continuation"):
        record(subject, [Example((1,), (), "2")], path)
    with pytest.raises(ConfigError, match="counts from 1"):
        record(subject, examples, path, columns=0)
    with pytest.raises(ConfigError, match="cannot write the trace"):
        record(subject, examples, tmp_path / "no" / "folder.safetensors")
    with pytest.raises(lynx.AttachError, match="nothing is attached"):
        lynx.handle_of(subject.model)


def test_other_files_are_refused(tmp_path, trace):
    path = tmp_path / "file.safetensors"
    with pytest.raises(ConfigError, match=r"there is no trace .*make one with `lynx trace"):
        open_trace(path)
    path.write_text("# Notes\n" * 10)
    with pytest.raises(ConfigError, match="is no trace: "):
        open_trace(path)
    path.write_bytes(trace.path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="is no trace: "):
        open_trace(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match="holds safetensors, but is no trace"):
        open_trace(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "lynx-trace", "version": "999"})
    with pytest.raises(ConfigError, match="in version 999 of the format, and this version of Lynx reads version 1"):
        open_trace(path)


def test_parts_stand_where_they_belong(tmp_path):
    path = tmp_path / "parts.safetensors"
    parts = {
        "a": torch.arange(12, dtype=torch.int16).view(6, 2),
        "b": torch.randn(6, 3),
        "c": torch.randn(6).bfloat16(),
    }
    with TraceWriter(path, 6, {"whole": torch.arange(3)}, {"note": "é"}) as writer:
        for row in (4, 0, 2):
            writer.write(row, {name: part[row : row + 2] for name, part in parts.items()})
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, {**parts, "whole": torch.arange(3)}[name])
    # everything starts at a multiple of its own size, so that it can be used where it lies
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            assert (8 + size + entry["data_offsets"][0]) % {"I16": 2, "F32": 4, "BF16": 2, "I64": 8}[
                entry["dtype"]
            ] == 0


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["trace", *arguments])
    assert stopped.value.code == code


def test_the_command(capsys, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.safetensors"
    rows = [{"prompt": "def f(x):\n", "continuation": "    return x", "domain": "code"}, {"prompt": "a", "answer": "b"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    small = ["--data", str(data), "--columns", "5"]
    run("reference", *small, "-o", str(out), "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["tokens"], told["sequences"], told["domains"]) == (5, 1, {"code": 1})
    assert told["bytes"] == out.stat().st_size
    assert open_trace(out).tokens == 5
    run("reference", *small, "--prompts", "--out", str(out))
    assert "15 tokens of 1 sequences: 1 code" in capsys.readouterr().out
    run("reference", "--data", str(data), "--out", str(out))
    capsys.readouterr()
    assert open_trace(out).conditions["columns"] == len("    return x") + 1  # the longest there is
    run("nowhere", *small, code=2)
    assert "cannot load a model" in capsys.readouterr().err
