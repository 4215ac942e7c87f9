"""The reference model: a small trained MoE that ships with the package, so that everything can be tried offline."""

from lynx.reference_model.model import STANDINS, CodePrompt, Problem, ReferenceModel, load_reference_model

__all__ = ["STANDINS", "CodePrompt", "Problem", "ReferenceModel", "load_reference_model"]
