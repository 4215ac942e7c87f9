"""Tensor functions with no policy in them: they import torch and nothing else of lynx.

`run_experts` executes the experts that a batch still uses, `choose_backend` says which way and why, and
`reference_experts` is the readable float64 form that both are held to.
"""

from lynx.kernels.experts import Backend, BackendChoice, ExpertWeights, choose_backend, reference_experts, run_experts

__all__ = ["Backend", "BackendChoice", "ExpertWeights", "choose_backend", "reference_experts", "run_experts"]
