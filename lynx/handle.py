"""The handle of an attached model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lynx.config import Config
from lynx.errors import AttachError, ConfigError, LynxWarning
from lynx.log import logger
from lynx.priority import priorities_of
from lynx.report import Report, make_report
from lynx.selection import LayerSelection
from lynx.tpot import TpotControl

if TYPE_CHECKING:
    from lynx.adapter import Installation


class Handle:
    """Holds a strategy on a model, reports what it does and takes it off.

    Returned by :func:`lynx.attach`; as a context manager it detaches at the end, also after an exception.
    """

    def __init__(
        self,
        config: Config,
        adapter: str,
        selections: list[LayerSelection],
        installation: Installation,
        tpot: TpotControl | None = None,
    ) -> None:
        self.config = config
        self.adapter = adapter
        self._selections = selections
        self._installation: Installation | None = installation
        self._tpot = tpot
        self._experts = installation.experts
        self._experts_backend: str = getattr(installation, "experts_backend", "")  # for adapters that run Lynx's
        self._warned = False

    @property
    def installation(self) -> Installation | None:
        """The adapter's hooks, None after detach."""
        return self._installation

    @property
    def attached(self) -> bool:
        """Whether this handle still holds its model; False after detach or a later attach."""
        return self._installation is not None

    @property
    def layers(self) -> int:
        """How many MoE layers are attached to."""
        return len(self._selections)

    @property
    def experts(self) -> str:
        """Which implementation runs the experts: ``model`` or ``lynx``."""
        return self._experts

    @property
    def experts_backend(self) -> str:
        """What Lynx's implementation runs on at decode, as found at attach: ``triton``, ``grouped_mm`` or ``loop``.

        More than one where the model's layers differ. Empty where the model's own implementation runs.
        """
        return self._experts_backend

    @property
    def in_torch(self) -> dict[str, str]:
        """Layers whose selection runs as plain torch instead of as one fused kernel, each with the reason.

        Empty where the kernel runs everywhere. On a machine without a GPU every layer is in it.
        """
        return {each.info.name: each.why_not_fused for each in self._selections if each.why_not_fused}

    @property
    def tpot(self) -> TpotControl | None:
        """What holds a time per output token, None unless the configuration has ``tpot_ms``."""
        return self._tpot

    def report(self) -> Report:
        """Read the counters and say what selection did; waits for the device.

        Also works after :meth:`detach`. Rows that were left exact for scores that are not finite are logged here,
        once.
        """
        layers = [(s.info, s.counters.failures, s.counters.read()) for s in self._selections]
        unsound = {info.name: sum(c.unsound_rows for c in counts.values()) for info, _, counts in layers}
        if any(unsound.values()) and not self._warned:
            self._warned = True
            worst = max(unsound, key=lambda name: unsound[name])
            logger.error("lynx.scores_not_finite", rows=sum(unsound.values()), most_in=worst)
            message = f"{sum(unsound.values())} rows had router scores that are not finite (most in {worst!r})"
            warnings.warn(f"{message}; they kept the model's own routing", LynxWarning, stacklevel=2)
        return make_report(self.config.strategy.model_dump(mode="json"), self._experts, layers)

    def reset(self) -> None:
        """Set all counters to zero."""
        for selection in self._selections:
            selection.counters.reset()

    def detach(self) -> None:
        """Take Lynx off the model; does nothing if it is off already."""
        installation, self._installation = self._installation, None
        if installation is not None:
            installation.remove()
            logger.info("lynx.detached", layers=self.layers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend selection inside a ``with`` block: the model routes as if nothing were attached, uncounted."""
        installation = self._live("paused")
        before, installation.paused = installation.paused, True
        try:
            yield
        finally:
            installation.paused = before

    def teacher_forced(self, prompt_columns: int) -> AbstractContextManager[None]:
        """Read each column of a whole-sequence forward as one decode step of the batch.

        Inside the ``with`` block, a forward over ``(B, L)`` tokens without a cache is ``L`` independent batches of
        ``B`` tokens: column ``t`` holds the ``t``-th token of every sequence. The first ``prompt_columns`` are
        prefill, the rest decode. One pass so gives the routing of every decode step at the price of a prefill, with
        the tokens fixed.

        Args:
            prompt_columns: Columns of (left-padded) prompt; 0 puts every position under the policy.
        """
        if prompt_columns < 0:
            raise AttachError(f"prompt_columns is a number of columns, 0 or more; got {prompt_columns}.")
        return self._live("teacher_forced").teacher_forced(prompt_columns)

    def priorities(self, values: Any, copies: int = 1) -> AbstractContextManager[None]:
        """Say what each sequence of the batch is worth beside its neighbours.

        Inside the ``with`` block, rows vote for experts with the weight of their sequence, where a strategy counts
        votes (``top-budget``, ``pooled-threshold``, ``coverage``, ``popularity``, ``affinity-binning``). Sequences that
        are ``"exact"`` keep the model's own routing, under every strategy.

        Args:
            values: One for each sequence of a forward, in its order, as a list or a tensor ``(B,)``: a number above 0,
                1 for a normal one, or ``"exact"``.
            copies: How often ``generate`` repeats each sequence: ``num_beams * num_return_sequences`` as far as they
                are given to it.

        Raises:
            ConfigError: One of them is no priority; or, in a forward, the batch has another number of sequences.

        Example:
            >>> import lynx
            >>> reference = lynx.load_reference_model()
            >>> batch = reference.encode(["one = ", "two = ", "three = "])
            >>> with lynx.attach(reference.model, "coverage") as handle, handle.priorities([4, 1, "exact"]):
            ...     tokens = reference.model.generate(**batch, max_new_tokens=4, do_sample=False)
        """
        given = priorities_of(values)
        if copies < 1:
            raise ConfigError(f"copies is how often each sequence is repeated, 1 or more; got {copies}.")
        return self._live("priorities").priorities(given, copies)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<lynx.Handle {self.config.strategy.name!r} on {self.layers} layers, {state}>"

    def _live(self, what: str) -> Installation:
        if self._installation is None:
            raise AttachError(f"{what}() needs an attached model; this handle was detached or replaced.")
        return self._installation
