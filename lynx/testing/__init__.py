"""For authors of strategies: the contract that every strategy must pass, and routings to try one on.

Needs Hypothesis, which ``pip install lynx-moe[testing]`` brings.
"""

from __future__ import annotations

from lynx.testing.errors import ContractViolation, MissingHypothesisError

try:
    from lynx.testing.contract import check_strategy
    from lynx.testing.routings import make_routing
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise MissingHypothesisError(
        "lynx.testing needs Hypothesis, which is not installed; run `pip install lynx-moe[testing]`."
    ) from error

__all__ = ["ContractViolation", "check_strategy", "make_routing"]
