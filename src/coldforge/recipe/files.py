"""Recipes in and out: TOML files, presets, overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from coldforge.errors import RecipeError, nearest
from coldforge.recipe.specs import Recipe

_OF_NO_CONCERN = {"name", "seed", "compute"}
"""Keys and tables that no description of a recipe is about."""


def preset_names() -> list[str]:
    """Names of the recipes that ship with coldforge."""
    folder = resources.files("coldforge") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] = "quickstart", *, overrides: Iterable[str] | Mapping[str, object] = ()
) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        source: name of a shipped preset, path of a TOML file (whose recipe is called like the file, where it does not
            say), or a nested mapping.
        overrides: texts such as ``"finetune.epochs=5"`` or ``"threat_model.eps=8/255"``, whose values are TOML or
            bare words; or a mapping such as ``{"finetune.epochs": 5}``. A description, which may speak of what they
            change, names them.

    Raises:
        RecipeError: for a file that is missing or not TOML, an unknown key (names the nearest valid one), or a value
            out of range.
    """
    table = _read(source)
    changes = overrides if isinstance(overrides, Mapping) else dict(parse_override(text) for text in overrides)
    changed = [key for key, value in changes.items() if _set(table, key, value)]
    recipe = _validate(table)
    told = [key for key in changed if key.partition(".")[0] not in _OF_NO_CONCERN]
    if not told or not recipe.description or "description" in changes:
        return recipe
    return recipe.model_copy(update={"description": f"{recipe.description} Set by hand: {', '.join(told)}."})


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source))  # type: ignore[no-any-return]  # a deep copy of plain values
    name = str(source)
    unnamed = ""
    if name in preset_names():
        text = (resources.files("coldforge") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        except UnicodeDecodeError:
            raise RecipeError(f"{name} is no recipe: expected TOML in UTF-8, got other bytes") from None
        except OSError as error:
            raise RecipeError(f"{name} cannot be read: {error.strerror}") from None
        unnamed = Path(name).stem
    elif name.endswith(".toml") or os.sep in name:
        raise RecipeError(f"expected a recipe file, found nothing at {name}")
    else:
        raise RecipeError(f"expected a recipe file or a preset, got {name!r}; {nearest(name, preset_names())}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not valid TOML: {error}") from None
    return {"name": unnamed, **table} if unnamed else table


def parse_override(text: str) -> tuple[str, object]:
    """Key and value of a text such as "finetune.epochs=5"; the value is TOML or a bare word.

    Raises:
        RecipeError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"expected key=value, such as finetune.epochs=5, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _set(table: dict[str, Any], key: str, value: object) -> bool:
    """Put a value where it belongs; whether another one, or none, was there."""
    *path, last = key.split(".")
    for part in path:
        child = table.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{key}: expected a table at {part!r}, found a value")
        table = child
    is_new = last not in table or table[last] != value
    table[last] = value
    return is_new


def _validate(table: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(item) for item in error.errors())) from None


def _fields_at(path: Iterable[Any]) -> list[str]:
    """Names of the keys that are valid beside the last element of ``path``."""
    spec: type[BaseModel] = Recipe
    for part in path:
        annotation = spec.model_fields[part].annotation if part in spec.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        spec = annotation
    return list(spec.model_fields)


def _explain(item: Mapping[str, Any]) -> str:
    location = [part for part in item["loc"] if isinstance(part, str) and not part.startswith("function-")]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(str(location[-1]), _fields_at(location[:-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    prefix = "" if not key or message.startswith(key) else f"{key}: "
    got = "" if "got" in message or item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{prefix}{message}{got}"


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML; :func:`load_recipe` reads it back to an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json"))
