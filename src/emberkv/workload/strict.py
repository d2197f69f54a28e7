"""The customs: what a workload description may say. An unknown key or kind is an error that names what is accepted."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator


class Strict(BaseModel):
    """Base of all parts of a description: no unknown keys, no silent conversions, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, dict):
            unknown = [str(key) for key in data if key not in cls.model_fields]
            if unknown:
                raise ValueError(f"unknown: {', '.join(unknown)}; accepted: {', '.join(cls.model_fields)}")
        return data
