"""Tensor functions with no policy in them: they import torch, and triton where they run it, and nothing else of lynx.

`run_experts` executes the experts that a batch still uses, `choose_backend` says which way and why, `why_not` what
keeps the others from it, and `reference_experts` is the readable float64 form that all are held to. `add_standins`
answers for experts that were left out, held to `reference_standins`.
"""

from lynx.kernels.backends import Backend, BackendChoice, choose_backend, why_not
from lynx.kernels.experts import run_experts
from lynx.kernels.plan import Plan, make_plan
from lynx.kernels.reference import reference_experts
from lynx.kernels.standins import StandInWeights, add_standins, reference_standins
from lynx.kernels.weights import ExpertWeights

__all__ = [
    "Backend",
    "BackendChoice",
    "ExpertWeights",
    "Plan",
    "StandInWeights",
    "add_standins",
    "choose_backend",
    "make_plan",
    "reference_experts",
    "reference_standins",
    "run_experts",
    "why_not",
]
