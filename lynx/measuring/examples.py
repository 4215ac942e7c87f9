"""The user's text: prompts with the continuations that the model is held to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynx.errors import ConfigError
from lynx.measuring.subject import Subject
from lynx.reference_model import load_reference_model

PROMPT_TOKENS = 128
_CONTINUATIONS = ("continuation", "completion", "response", "solution")
_KEYS = f"`messages`, `prompt` with one of {', '.join(f'`{key}`' for key in _CONTINUATIONS)}, or `text`"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and how it goes on, in tokens.

    Attributes:
        prompt: What the model is given.
        continuation: What it is held to; ends with the model's stop token where the text ends.
        answer: What a generated continuation must end on, None where there is nothing to check.
        domain: What kind of text it is; batches of similar text are made within one.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    answer: str | None = None
    domain: str = ""

    def solved_by(self, text: str) -> bool:
        """Say whether the last words of a generated text are the answer."""
        lines, wanted = text.strip().splitlines(), (self.answer or "").split()
        return bool(lines) and bool(wanted) and lines[-1].split()[-len(wanted) :] == wanted


def read_examples(path: Path, subject: Subject, window: int = 2 * PROMPT_TOKENS) -> list[Example]:
    """Read text.

    Args:
        path: A ``.jsonl`` file, one example a line: a conversation under ``messages`` whose last message the model is
            held to; ``prompt`` and ``continuation``; or ``text``. ``answer`` and ``domain`` may stand beside them. Any
            other file is plain text.
        subject: Whose tokens it is turned into.
        window: Plain text is cut into pieces of so many tokens, of which the first half, or the first
            ``PROMPT_TOKENS``, is the prompt.

    Raises:
        ConfigError: The file cannot be read or holds nothing to measure; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [example for number, line in lines for example in _from_line(line, f"{path}:{number}", subject, window)]
    else:
        found = list(_windows(subject.encode(text), window, path.stem, subject.begin))
    if not found:
        raise ConfigError(f"{str(path)!r} holds no example: it is empty, or shorter than {window} tokens.")
    return found


def reference_examples() -> list[Example]:
    """Return the held-out prompts that come with the reference model: domains ``code`` and ``problems``."""
    reference = load_reference_model()
    stop = reference.model.generation_config.eos_token_id
    code = [Example(_utf8(item.prompt), _utf8(item.continuation), domain="code") for item in reference.code]
    problems = [
        Example(_utf8(item.prompt), (*_utf8(item.solution), stop), item.answer, "problems")
        for item in reference.problems
    ]
    return [*code, *problems]


def examples_hash(examples: Sequence[Example]) -> str:
    """Return a hash of examples, by which a result names its data."""
    content = json.dumps([[each.prompt, each.continuation, each.answer, each.domain] for each in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def split(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Split examples in two by a hash of their prompts: an example stays on its side however many others there are.

    Args:
        examples: All of them.
        share: Of the first part.
        seed: Another one splits otherwise.
    """

    def place(example: Example) -> float:
        digest = hashlib.sha256(f"{seed} {example.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    first = [example for example in examples if place(example) < share]
    return first, [example for example in examples if place(example) >= share]


def _from_line(line: str, where: str, subject: Subject, window: int) -> Iterator[Example]:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    if not isinstance(item, dict):
        raise ConfigError(f"{where} holds {type(item).__name__}; an example is a mapping with {_KEYS}.")
    answer, domain = item.get("answer"), str(item.get("domain", ""))
    stop, begin = subject.stop_ids[:1], subject.begin
    if "messages" in item:
        begin = ()  # the template says how a conversation begins
        prompt, continuation = _conversation(item["messages"], where, subject)
    elif "prompt" in item:
        prompt, continuation = str(item["prompt"]), next((str(item[key]) for key in _CONTINUATIONS if key in item), "")
    elif "text" in item:
        yield from _windows([*subject.encode(str(item["text"])), *stop], window, domain, subject.begin)
        return
    else:
        raise ConfigError(f"{where} has the keys {sorted(item)}; an example has {_KEYS}.")
    if not continuation and answer is None:
        raise ConfigError(f"{where} has a prompt and neither a continuation nor an answer; an example has {_KEYS}.")
    tokens = (*subject.encode(continuation), *stop) if continuation else ()
    yield Example((*begin, *subject.encode(prompt)), tokens, None if answer is None else str(answer), domain)


def _conversation(messages: Any, where: str, subject: Subject) -> tuple[str, str]:
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ConfigError(f"{where}: `messages` is a list of at least two, the last one by the assistant.")
    if subject.template is None:
        raise ConfigError(f"{where} has `messages`, but {subject.name} has no chat template; give `prompt` instead.")
    return subject.template(messages[:-1]), str(messages[-1]["content"])


def _windows(tokens: Sequence[int], window: int, domain: str, begin: tuple[int, ...]) -> Iterator[Example]:
    prompt = min(window // 2, PROMPT_TOKENS)
    for start in range(0, len(tokens) - window + 1, window):
        piece = tuple(tokens[start : start + window])
        yield Example((*begin, *piece[:prompt]), piece[prompt:], domain=domain)


def _utf8(text: str) -> tuple[int, ...]:
    return tuple(text.encode())
