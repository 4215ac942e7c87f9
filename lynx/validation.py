"""Options that say what is wrong with them: pydantic models whose faults are :class:`lynx.ConfigError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lynx.errors import ConfigError, did_you_mean


class Options(BaseModel):
    """Frozen options; an unknown key is refused with its closest neighbour and a list of all that exist."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(f"{self.described()}: {_describe(error)}") from error

    # Without this mark pydantic would validate nested models through __init__, outside of its own error report.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, data: Mapping[str, Any]) -> Self:
        """Validate a mapping.

        Raises:
            ConfigError: Carries pydantic's report as its cause.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(f"{cls.described()}: {_describe(error)}") from error

    @classmethod
    def described(cls) -> str:
        """Return what error messages call an object of this class."""
        return cls.__name__

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    hint = did_you_mean(str(key), known)
                    raise ConfigError(f"no option {key!r}.{hint} Options: {', '.join(known)}.")
        return data


def _describe(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        given = "" if fault["type"] in ("value_error", "missing") else f" (got {fault['input']!r})"
        lines.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    return "; ".join(lines)
