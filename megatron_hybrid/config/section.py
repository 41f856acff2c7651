"""What every group of options is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen group of options that refuses keys it does not know and documents each field by its docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would take true for 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation not in (bool, Literal[False]):
            raise ValueError("expected a value, not true or false")
        return value


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise ValueError unless the one number divides the other; both are named as options are."""
    if value % divisor:
        raise ValueError(f"{name}={value} does not divide by {divisor_name}={divisor}; change one of them")
