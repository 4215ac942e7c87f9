"""The end of a step, where it is seen whether the routers decided: kernels that go past them do not go unnoticed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lynx.adapters.transformers.hooks import RouterHook, StepContext
from lynx.errors import AttachError, LynxWarning
from lynx.log import logger


@dataclass(slots=True)
class StepEnds:
    """Forward hook of a backbone: forgets the step, also after an exception, and sees to it that routers decide.

    A router is silent if it was not called, but the block around it was. A layer that did not run is none of ours:
    experts of another modality, layers behind an early exit.

    Attributes:
        context: The step.
        waiting: Hooks of routers that have not decided yet.
        answering: Hooks of routers whose lost slots stand-ins answer for.
    """

    context: StepContext
    waiting: list[RouterHook] = field(default_factory=list)
    answering: tuple[RouterHook, ...] = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the step.

        Raises:
            AttachError: A router was passed over.
        """
        step, self.context.step = self.context.step, None
        if torch.compiler.is_compiling():  # before anything else: what is read is guarded on
            return
        self._all_answered(output)
        if not self.waiting:
            return
        waiting = [hook for hook in self.waiting if not hook.decided]
        silent = [hook.selection.info.name for hook in waiting if hook.entered and not hook.fired]
        astray = [hook for hook in waiting if hook.astray and step and (hook.acts_on_prefill or not step.all_prefill)]
        for hook in waiting:
            hook.entered = hook.fired = hook.astray = False
        if step is None or output is None:
            return
        if silent:
            logger.error("lynx.routers_silent", layers=len(silent), first=silent[0])
            raise AttachError(
                f"{len(silent)} of {len(self.waiting)} routers were not called in this forward, though their blocks "
                f"were ({', '.join(silent)}): nothing can be selected there. A fused kernel goes past them "
                "(use_kernels=True, MXFP4 experts). Load the model without it, or leave these layers out "
                "(layers={'exclude': [...]}). Once it is detached (lynx.detach), the model is as it was."
            )
        self.waiting = [hook for hook in waiting if not any(hook is each for each in astray)]
        if astray:
            names = [hook.selection.info.name for hook in astray]
            logger.error("lynx.routers_silent", layers=len(names), first=names[0])
            message = f"{len(names)} routers did not decide over this forward's tokens, but over other rows"
            warnings.warn(f"{message} ({', '.join(names)}); nothing is selected there", LynxWarning, 2)

    def _all_answered(self, output: Any) -> None:
        """Raise where slots were lost and the experts, to whose output stand-ins add, were not called."""
        open_ended = [hook for hook in self.answering if hook.answers is not None and hook.answers.take() is not None]
        if open_ended and output is not None:
            names = ", ".join(hook.selection.info.name for hook in open_ended)
            raise AttachError(
                f"the experts of {names} were not called as modules, so what stand-ins answer was not added there. "
                "Load the model without fused kernels that go past them, or leave out `standins`."
            )
