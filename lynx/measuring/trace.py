"""Trace once, simulate many: what a model's routers decide on a user's text, recorded to a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lynx.attachment import attach
from lynx.config import Config
from lynx.errors import ConfigError
from lynx.measuring.batches import ForcedBatch, align
from lynx.measuring.examples import Example, examples_hash
from lynx.measuring.origin import origin
from lynx.measuring.recorder import Recorder
from lynx.measuring.subject import Subject
from lynx.measuring.trace_file import TraceWriter, read_trace_file
from lynx.routing import Phase, Role, Routing, WeightRule
from lynx.strategy import LayerInfo

_NUMBERS = ("start", "prompt", "continuation")


@dataclass(frozen=True, slots=True)
class TracedSequence:
    """Where a trace holds a sequence.

    Attributes:
        start: Its first row.
        prompt: Rows of prompt, 0 where prompts were not recorded.
        continuation: Rows of continuation.
        domain: What kind of text it is.
    """

    start: int
    prompt: int
    continuation: int
    domain: str

    @property
    def rows(self) -> int:
        """Rows of it, one after the other."""
        return self.prompt + self.continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Router logits and decisions of a model on a text, in a file that is read as it is used.

    Attributes:
        path: The file.
        layers: The MoE layers, in running order.
        sequences: The sequences, in the order of the examples.
        conditions: What was recorded of what: model, hash of the data, columns, versions.
        tensors: What the file holds, rows of one token after the other. For layer ``i``: ``layers.i.logits``
            ``(N, E)`` float32, ``layers.i.ids`` ``(N, k)``, ``layers.i.weights`` ``(N, k)``, and ``layers.i.choice``
            ``(N, E)`` where it is not the logits.
    """

    path: Path
    layers: tuple[LayerInfo, ...]
    sequences: tuple[TracedSequence, ...]
    conditions: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def has_prompts(self) -> bool:
        """Whether prompts were recorded."""
        return bool(self.conditions["prompts"])

    @property
    def tokens(self) -> int:
        """``N``, how many tokens were recorded."""
        return sum(each.rows for each in self.sequences)

    def routing(self, layer: LayerInfo, rows: Tensor) -> Routing:
        """Return what the router of a layer decided over decode steps.

        Args:
            layer: One of :attr:`layers`.
            rows: ``(..., B)`` int64, which tokens stand in the batch of a step; -1 for none.
        """
        held = rows.clamp_min(0)

        def of(name: str) -> Tensor | None:
            tensor = self.tensors.get(f"layers.{layer.index}.{name}")
            return None if tensor is None else tensor[held]

        logits, ids, weights, choice = of("logits"), of("ids"), of("weights"), of("choice")
        assert logits is not None
        assert ids is not None
        assert weights is not None
        return Routing(
            choice=logits if choice is None else choice,
            logits=logits,
            ids=ids.long(),
            weights=weights,
            role=torch.where(rows < 0, int(Role.PADDING), int(Role.OPEN)).to(torch.int8),
            phase=torch.full_like(rows, int(Phase.DECODE), dtype=torch.int8),
            rule=layer.rule,
        )


def record(
    subject: Subject,
    examples: Sequence[Example],
    path: str | Path,
    *,
    columns: int = 64,
    prompts: bool = False,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> Trace:
    """Write down what a model's routers decide on a text, as the model alone routes it.

    Each example is read once, prompt and continuation in one pass. What is held in memory is one pass.

    Args:
        subject: The model, not attached.
        examples: The text; those without a continuation are left out.
        path: The file that is written.
        columns: Most tokens of a continuation, each one a decode step.
        prompts: Record prompts, too.
        batch: Sequences that are read in one pass.
        advance: Called after each of the :func:`passes`.

    Returns:
        The trace.

    Raises:
        ConfigError: No example has a continuation, or the file cannot be written.
        UnsupportedModelError: No adapter can take the model, or its routing cannot be told apart by token.
    """
    path = Path(path)
    if columns < 1 or batch < 1:
        raise ConfigError(f"columns={columns} and batch={batch} are counts from 1.")
    used = [example for example in examples if example.continuation]
    if not used:
        raise ConfigError(f"none of {len(examples)} examples has a continuation; decode steps are recorded of those.")
    columns = min(columns, max(len(example.continuation) for example in used))
    sequences, order = _laid_out(used, columns, prompts)
    recorder = Recorder(prompts=prompts)
    origins = {
        **origin(subject.model),
        "model": subject.name,
        "data": examples_hash(examples),
        "examples": len(used),
        "columns": columns,
        "prompts": prompts,
    }
    config = Config(strategy=recorder, min_tokens=1, experts="model")
    with attach(subject.model, config) as handle, torch.inference_mode():
        table, texts = _described(sequences, recorder.layers, origins)
        with TraceWriter(path, sum(each.rows for each in sequences), table, texts) as writer:
            for begin in range(0, len(order), batch):
                group = order[begin : begin + batch]
                read = align(
                    [used[place].prompt for place in group],
                    [used[place].continuation[:columns] for place in group],
                    subject.pad_id,
                )
                with handle.teacher_forced(read.prompt_columns):
                    _forward(subject.model, read)
                decided = recorder.take(sum(sequences[place].rows for place in group))
                writer.write(sequences[group[0]].start, decided)
                advance()
    return open_trace(path)


def passes(examples: Sequence[Example], batch: int = 8) -> int:
    """How often :func:`record` calls ``advance``."""
    return -(-sum(bool(example.continuation) for example in examples) // batch)


def open_trace(path: str | Path) -> Trace:
    """Open a trace; tensors are read as they are used.

    Raises:
        ConfigError: There is no such file, it is no trace, or it was written in another version of the format.
    """
    metadata, tensors = read_trace_file(Path(path))
    domains = json.loads(metadata["domains"])
    columns = [tensors.pop(f"sequences.{name}").tolist() for name in (*_NUMBERS, "domain")]
    return Trace(
        path=Path(path),
        layers=tuple(
            LayerInfo(**{**info, "rule": WeightRule(**info["rule"])}) for info in json.loads(metadata["layers"])
        ),
        sequences=tuple(
            TracedSequence(start, prompt, continuation, domains[domain])
            for start, prompt, continuation, domain in zip(*columns, strict=True)
        ),
        conditions=json.loads(metadata["conditions"]),
        tensors=tensors,
    )


def _laid_out(examples: Sequence[Example], columns: int, prompts: bool) -> tuple[list[TracedSequence], list[int]]:
    """Return where each example goes, and the order in which they are read."""
    lengths = [(len(each.prompt) if prompts else 0, min(len(each.continuation), columns)) for each in examples]
    # by length, so that little of a pass is padding
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt) + lengths[place][1])
    ends = itertools.accumulate((sum(lengths[place]) for place in order), initial=0)
    starts = dict(zip(order, ends, strict=False))
    sequences = [
        TracedSequence(starts[place], *lengths[place], example.domain) for place, example in enumerate(examples)
    ]
    return sequences, order


def _described(
    sequences: Sequence[TracedSequence], layers: Sequence[LayerInfo], conditions: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what stands in the file beside the decisions: a table of sequences, and texts."""
    domains = sorted({each.domain for each in sequences})
    table = {name: torch.tensor([getattr(each, name) for each in sequences]) for name in _NUMBERS}
    table["domain"] = torch.tensor([domains.index(each.domain) for each in sequences])
    data = {"layers": [asdict(info) for info in layers], "domains": domains, "conditions": conditions}
    return (
        {f"sequences.{name}": column for name, column in table.items()},
        {name: json.dumps(value) for name, value in data.items()},
    )


def _forward(model: Any, batch: ForcedBatch) -> None:
    model(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask.to(model.device),
        position_ids=batch.positions.to(model.device),
        use_cache=False,
        logits_to_keep=1,
    )
