"""The user's text, as examples and as decode batches."""

import json

import pytest

from lynx.errors import ConfigError
from lynx.measuring.batches import align, forced_batches
from lynx.measuring.examples import Example, examples_hash, read_examples, reference_examples, split
from lynx.measuring.subject import Subject

PAD, STOP = 0, 1


def encode(text):
    return [ord(letter) for letter in text]


def template(messages):
    return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


SUBJECT = Subject("toy", None, encode, lambda ids: "".join(map(chr, ids)), PAD, (STOP,), template)


def lines(tmp_path, *items):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items) + "\n\n")
    return path


@pytest.mark.parametrize("key", ["continuation", "completion", "response", "solution"])
def test_prompts_with_continuations(tmp_path, key):
    path = lines(tmp_path, {"prompt": "ab", key: "cd", "answer": 7, "domain": "x"})
    (example,) = read_examples(path, SUBJECT)
    assert example == Example((97, 98), (99, 100, STOP), "7", "x")


def test_a_question_with_its_answer_alone(tmp_path):
    (example,) = read_examples(lines(tmp_path, {"prompt": "ab", "answer": "c"}), SUBJECT)
    assert (example.continuation, example.answer) == ((), "c")


def test_conversations(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = read_examples(lines(tmp_path, {"messages": talk}), SUBJECT)
    assert example.prompt == tuple(encode("<user>a<assistant>"))
    assert example.continuation == (98, STOP)


def test_texts_are_cut_into_windows(tmp_path):
    text = "abcdefghij" * 2
    found = read_examples(lines(tmp_path, {"text": text, "domain": "x"}), SUBJECT, window=6)
    assert [(len(each.prompt), len(each.continuation)) for each in found] == [(3, 3)] * 3
    assert tuple(encode("abcdef")) == found[0].prompt + found[0].continuation
    plain = tmp_path / "notes.txt"
    plain.write_text(text)
    assert [each.domain for each in read_examples(plain, SUBJECT, window=10)] == ["notes", "notes"]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("{", r"data.jsonl:2 is not JSON"),
        ([1], r":2 holds list; an example is a mapping"),
        ({"question": "a"}, r"has the keys \['question'\]; an example has `messages`"),
        ({"prompt": "a"}, r"neither a continuation nor an answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"the last one by the assistant"),
    ],
)
def test_lines_that_are_not_understood_are_named(tmp_path, item, words):
    with pytest.raises(ConfigError, match=words):
        read_examples(lines(tmp_path, {"prompt": "a", "answer": "b"}, item), SUBJECT)


def test_conversations_need_a_template(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = Subject("toy", None, encode, str, PAD, (STOP,))
    with pytest.raises(ConfigError, match="toy has no chat template"):
        read_examples(lines(tmp_path, {"messages": talk}), plain)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl", SUBJECT)
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(ConfigError, match="shorter than 256 tokens"):
        read_examples(short, SUBJECT)


def test_answers_are_the_last_words():
    example = Example((), (), "1 2")
    assert example.solved_by("so\nAnswer: 1 2\n")
    assert not example.solved_by("1 2\nAnswer: 11 2")
    assert not example.solved_by("")
    assert not Example((), ()).solved_by("anything")


def test_examples_stay_on_their_side_of_a_split():
    examples = reference_examples()
    first, second = split(examples, 0.3)
    assert {*first} | {*second} == {*examples}
    assert 0.2 < len(first) / len(examples) < 0.4
    assert split(examples[:50], 0.3)[0] == [each for each in first if each in examples[:50]]
    assert split(examples, 0.3, seed=1)[0] != first
    assert examples_hash(first) != examples_hash(second)


def example(domain, number, length=4):
    return Example((number,), tuple(range(10, 10 + length)), domain=domain)


def test_mixed_batches_hold_every_domain():
    examples = [example("a", n) for n in range(9)] + [example("b", n) for n in range(100, 106)]
    batches = list(forced_batches(examples, 4, 3, PAD))
    assert len(batches) == 3
    firsts = [sorted(batch.ids[:, 0].tolist()) for batch in batches]
    assert all(sum(first >= 100 for first in batch) == 2 for batch in firsts)
    drawn = [first for batch in firsts for first in batch]
    assert len({*drawn}) == len(drawn)
    again = list(forced_batches(examples, 4, 3, PAD))
    assert [batch.ids.tolist() for batch in again] == [batch.ids.tolist() for batch in batches]
    other = list(forced_batches(examples, 4, 3, PAD, seed=1))
    assert [batch.ids.tolist() for batch in other] != [batch.ids.tolist() for batch in batches]


def test_similar_batches_are_of_one_domain():
    examples = [example("a", n) for n in range(9)] + [example("b", n) for n in range(100, 106)]
    batches = list(forced_batches(examples, 4, 3, PAD, "similar"))
    assert sorted({first >= 100 for first in batch.ids[:, 0].tolist()} == {True} for batch in batches) == [
        False,
        False,
        True,
    ]


def test_short_continuations_make_no_batch():
    examples = [example("a", n, length=2) for n in range(9)]
    with pytest.raises(ConfigError, match="0 of 9 examples go on for 3 tokens or more, which makes no batch of 4"):
        list(forced_batches(examples, 4, 3, PAD))


def test_rows_are_aligned_where_continuations_start():
    batch = align([(5,), (6, 7, 8)], [(9, 10), (11,)], PAD)
    assert batch.ids.tolist() == [[0, 0, 5, 9, 10], [6, 7, 8, 11, 0]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.prompt_columns == 3
    # what the first continuation token predicts is scored, and what the prompt predicts is not
    assert batch.scored.tolist() == [[False, False, False, True], [False] * 4]
    assert batch.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_what_texts_begin_with_is_put_before_them(tmp_path):
    """As by tokenizers that add a token; a chat template brings its own."""
    begun = Subject("toy", None, encode, str, PAD, (STOP,), template, (7,))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = lines(tmp_path, {"prompt": "ab", "continuation": "c"}, {"text": "abcdef"}, {"messages": talk})
    asked, text, spoken = read_examples(path, begun, window=6)
    assert asked.prompt == (7, 97, 98)
    assert (text.prompt, text.continuation) == ((7, 97, 98, 99), (100, 101, 102))
    assert spoken.prompt[0] == ord("<")


def test_batches_say_which_texts_they_hold():
    examples = [example("a", n) for n in range(8)]
    batches = [*forced_batches(examples, 4, 3, PAD), *forced_batches(examples, 4, 3, PAD, seed=1)]
    for batch in batches:
        assert [examples[place].prompt[0] for place in batch.examples] == batch.ids[:, 0].tolist()
    assert sorted(place for batch in batches for place in batch.examples) == sorted([*range(8)] * 2)
