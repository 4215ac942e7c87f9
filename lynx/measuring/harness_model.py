"""What lm-evaluation-harness asks of a model, answered under a setting in true decode batches."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lynx.attachment import attach
from lynx.config import Config
from lynx.errors import ConfigError, MeasureError
from lynx.handle import Handle
from lynx.measuring.generation import generate
from lynx.measuring.scoring import score
from lynx.measuring.subject import Messages, Subject
from lynx.report import PhaseReport

_MAX_NEW_TOKENS = 256  # of the harness, where a task names none
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LONGEST = 2048  # where a model does not say how much it reads
_SEED = 1234

Pair = tuple[list[int], list[int]]
Run = Callable[[list[int], Handle], Sequence[Any]]


class HarnessModel(LM):
    """A model under a setting, for ``lm_eval.evaluator.evaluate``.

    The setting is attached while a task's requests run, anew for each task: a batch is of one task.

    Args:
        subject: The model, not attached.
        setting: Its configuration.
        batch: Sequences of a decode batch.
        stress: Put the prompts of texts that are scored under the setting, too.
        max_new_tokens: Longest generated answer; None for what each task says.
        advance: Called with a task's name after each of its documents.

    Attributes:
        decode: Reports of the decode phase, by task.
        truncated: How many requests had more text than the model reads, and lost the front of their prompts.
    """

    def __init__(
        self,
        subject: Subject,
        setting: Config,
        batch: int = 16,
        stress: bool = False,
        max_new_tokens: int | None = None,
        advance: Callable[[str], None] = lambda task: None,
    ) -> None:
        super().__init__()
        self._device = subject.model.device
        self._subject = subject
        self._setting = setting
        self._batch = batch
        self._stress = stress
        self._max_new_tokens = max_new_tokens
        self._advance = advance
        self._documents: set[tuple[str, int]] = set()
        self.decode: dict[str, list[PhaseReport]] = defaultdict(list)
        self.truncated = 0

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        config = self._subject.model.config.get_text_config()
        known = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
        return next((length for length in known if isinstance(length, int)), _LONGEST)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells prompts of models apart."""
        return self._subject.name

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """Turn a conversation into a prompt, or go on with its last message."""
        if self._subject.template is None:
            raise ConfigError(f"{self._subject.name} has no chat template; leave out --chat-template.")
        if add_generation_prompt:
            return self._subject.template(chat_history)
        return self._subject.template(chat_history[:-1]) + chat_history[-1]["content"]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate for requests; those with the same options share batches."""
        prompts = [self._encode(request.args[0]) for request in requests]
        options = [_options(request.args[1], self._max_new_tokens) for request in requests]

        def run(chunk: list[int], handle: Handle) -> list[str]:
            until, longest, rest = options[chunk[0]]
            if longest >= self.max_length:
                raise MeasureError(
                    f"task {requests[chunk[0]].task_name!r} asks for answers of {longest} tokens, and the model reads "
                    f"{self.max_length} with the prompt; give --max-new-tokens less."
                )
            room = self.max_length - longest
            self.truncated += sum(len(prompts[place]) > room for place in chunk)
            return generate(self._subject, [prompts[place][-room:] for place in chunk], longest, until, **rest)

        repeats = _repeats(requests)
        same = [json.dumps(each, sort_keys=True, default=str) for each in options]
        order = [(same[place], repeats[place], -len(prompts[place])) for place in range(len(requests))]
        return self._by_task(requests, range(len(requests)), order, run, lambda place: same[place])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each continuation behind its context.

        The answers to one question go into batches apart: side by side they would share nearly all experts.

        Raises:
            ConfigError: A task scores nothing but the token behind each prompt, which prefill says.
        """
        pairs = [self._pair(*request.args) for request in requests]
        self._refuse_single_tokens(requests, pairs)
        repeats = _repeats(requests)
        order = [
            (repeat, request.idx, -len(continuation), -len(prompt))
            for repeat, request, (prompt, continuation) in zip(repeats, requests, pairs, strict=True)
        ]
        return self._by_task(requests, range(len(requests)), order, self._scorer(pairs))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Score whole texts: all but the first token comes from a decode step."""
        owners, pairs = [], []
        for place, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._subject.encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                owners.append(place)
                pairs.append((context, continuation))
        order = [(-len(continuation), -len(prompt)) for prompt, continuation in pairs]
        totals = [0.0] * len(requests)
        found = self._by_task(requests, owners, order, self._scorer(pairs))
        for owner, (value, _) in zip(owners, found, strict=True):
            totals[owner] += value
        return totals

    def _by_task(
        self,
        requests: Sequence[Any],
        owners: Sequence[int],
        order: Sequence[Any],
        run: Run,
        kind: Callable[[int], Any] = lambda place: None,
    ) -> list[Any]:
        """Run items in batches; ``owners`` says whose request each is, ``kind`` which may share a batch."""
        answers: list[Any] = [None] * len(owners)
        by_task = defaultdict(list)
        for place, owner in enumerate(owners):
            by_task[str(requests[owner].task_name)].append(place)
        for task, places in by_task.items():
            setting = attach(self._subject.model, self._setting, tpot_ms=None)  # not by how fast this machine is
            with setting as handle, torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(_SEED)
                for chunk in self._batches(sorted(places, key=order.__getitem__), kind):
                    for place, answer in zip(chunk, run(chunk, handle), strict=True):
                        answers[place] = answer
                    self._count(task, {int(requests[owners[place]].doc_id) for place in chunk})
                self.decode[task].append(handle.report().total["decode"])
        return answers

    def _batches(self, places: Sequence[int], kind: Callable[[int], Any]) -> Iterator[list[int]]:
        for _, same in groupby(places, kind):
            together = list(same)
            yield from (together[start : start + self._batch] for start in range(0, len(together), self._batch))

    def _count(self, task: str, documents: set[int]) -> None:
        for document in documents:
            if (task, document) not in self._documents:
                self._documents.add((task, document))
                self._advance(task)

    def _scorer(self, pairs: Sequence[Pair]) -> Run:
        def run(chunk: list[int], handle: Handle) -> list[tuple[float, bool]]:
            fitted = [self._fit(*pairs[place]) for place in chunk]
            prompts, continuations = zip(*fitted, strict=True)
            found = score(self._subject, prompts, continuations, handle, self._stress)
            return [(each.log_likelihood, each.greedy) for each in found]

        return run

    def _fit(self, prompt: list[int], continuation: list[int]) -> Pair:
        room = self.max_length + 1 - len(continuation)  # the last token is not read
        if room < 1:
            raise MeasureError(
                f"a text of {len(continuation)} tokens is scored, and the model reads {self.max_length}."
            )
        self.truncated += len(prompt) > room
        return prompt[-room:], continuation

    def _pair(self, context: str, continuation: str) -> Pair:
        # spaces between the two belong to the word behind them, as tokenizers have it
        prompt, whole = self._encode(context.rstrip()), self._encode(context + continuation)
        return prompt or [self._prefix], whole[len(prompt) :]

    def _encode(self, text: str) -> list[int]:
        """Turn a text into tokens, begun as the model's texts begin; a chat template may have done so already."""
        ids, begin = self._subject.encode(text), list(self._subject.begin)
        return ids if ids[: len(begin)] == begin else begin + ids

    @property
    def _prefix(self) -> int:
        """The token that texts without a context follow."""
        return (*self._subject.begin, *self._subject.stop_ids, self._subject.pad_id)[0]

    def _refuse_single_tokens(self, requests: Sequence[Any], pairs: Sequence[Pair]) -> None:
        longest: dict[str, int] = defaultdict(int)
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            longest[request.task_name] = max(longest[request.task_name], len(continuation))
        for task, length in longest.items():
            if length < 2 and not self._stress:
                raise ConfigError(
                    f"task {task!r} scores the one token behind each prompt. That comes from prefill, which is exact, "
                    "so no setting changes it: leave the task out, take a variant that generates, or give --stress to "
                    "put prompts under the setting, too."
                )


def _repeats(requests: Sequence[Any]) -> list[int]:
    """How often each request has been there before: the harness repeats those that are sampled."""
    seen: dict[int, int] = defaultdict(int)
    found = []
    for request in requests:
        found.append(seen[id(request)])
        seen[id(request)] += 1
    return found


def _options(given: dict[str, Any], max_new_tokens: int | None) -> tuple[list[str], int, dict[str, Any]]:
    """Read what a task says of generation: stop strings, longest answer, and what goes on to ``generate``."""
    options = dict(given)
    until = options.pop("until", None) or []
    lengths = [options.pop(name, None) for name in _LENGTH_NAMES]
    longest = max_new_tokens or next((int(length) for length in lengths if length is not None), _MAX_NEW_TOKENS)
    temperature = float(options.pop("temperature", None) or 0.0)
    sampled = options.pop("do_sample", None)
    if temperature > 0 and sampled is not False:
        options |= {"do_sample": True, "temperature": temperature}
    return [until] if isinstance(until, str) else list(until), longest, options
