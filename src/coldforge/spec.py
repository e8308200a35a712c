"""The base of all specs: configuration, cache key and label at once. :func:`spec_hash` is the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: object) -> object:
    """Accept ``"8/255"`` wherever a number is expected."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"expected a number or a fraction such as '8/255', got {value!r}") from None
    return value


_BEFORE = "value_before_it_was_added"

Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of all specs: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def known_as(self, plain: dict[str, Any]) -> dict[str, Any]:
        """What :func:`identity` says of this spec, given all of it as plain values: normally just that."""
        return plain

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: object) -> object:
        """Take a word, words separated by commas, or a number where a list is expected, as command lines have them."""
        if not isinstance(values, Mapping):
            return values
        found = dict(values)
        for name, field in cls.model_fields.items():
            value = found.get(name)
            if get_origin(field.annotation) is not tuple or isinstance(value, bool):
                continue
            if isinstance(value, str):
                found[name] = [word.strip() for word in value.split(",") if word.strip()]
            elif isinstance(value, int | float):
                found[name] = [value]
        return found


def added(before: Any, **settings: Any) -> Any:
    """The field of a key that specs once did not have, with the value that means what was so before.

    That value is no part of :func:`identity`: what is in a store, and trials of sweeps, later versions find, too.
    """
    return Field(default=before, json_schema_extra={_BEFORE: before}, **settings)


def identity(spec: BaseModel) -> dict[str, Any]:
    """What a spec is known by: all that it says as plain values, but no :func:`added` key with the value of before."""
    plain = spec.model_dump(mode="json")
    for name, field in type(spec).model_fields.items():
        extra, value = field.json_schema_extra, getattr(spec, name)
        if isinstance(value, BaseModel):
            plain[name] = identity(value)
        elif isinstance(extra, dict) and _BEFORE in extra and value == extra[_BEFORE]:
            del plain[name]
    return spec.known_as(plain) if isinstance(spec, Spec) else plain


def spec_hash(*parts: object) -> str:
    """SHA-256 (hex) of specs, mappings and plain values in canonical JSON."""

    def plain(part: object) -> object:
        return identity(part) if isinstance(part, BaseModel) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def seed_of(*parts: object) -> int:
    """A seed of its own for whatever ``parts`` name; below 2**60."""
    return int(spec_hash(*parts)[:15], 16)
