"""What transformers calls a model's cache, which depends on its version."""

from __future__ import annotations

import inspect
from typing import Any


def as_argument(cache: Any, model: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument that a model of transformers takes it by.

    That is ``cache`` from transformers 5.24 on and ``past_key_values`` before.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}
