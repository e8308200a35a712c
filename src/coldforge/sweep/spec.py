"""A sweep file: a recipe, and the keys of it that take many values; and the trials that this means.

recipe = "fashion-mnist"
seeds = [0, 1, 2]

[set]                                   # the same in all trials
"finetune.epochs" = 3

[[grid]]                                # every combination of its axes; further grids add theirs
axes."prune.ratio" = { from = 0.1, to = 0.9, step = 0.1 }
axes."finetune.arms" = [["natural"], ["adversarial"]]

[[grid]]
set."finetune.float_epochs" = 1         # the same in all trials of this grid
axes.bits = [                           # an axis may set several keys at once
    { label = "8", "quantize.weight_bits" = 8, "quantize.activation_bits" = 8 },
    { label = "4", "quantize.weight_bits" = 4, "quantize.activation_bits" = 4 },
]

[[exclude]]                             # trials that match all of these are left out
"prune.ratio" = [0.8, 0.9]
seed = 2
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from coldforge.errors import RecipeError, nearest
from coldforge.recipe import Recipe, load_recipe, parse_override
from coldforge.spec import Spec, spec_hash

_NAMES = {"name", "description"}
"""Keys of a recipe that name it and decide nothing."""
_COMPUTE = ("threads", "precision", "compile", "device")
"""Keys of [compute] that a trial is known by; the others are the same in all sweeps."""


class Grid(Spec):
    """Every combination of the values of its axes."""

    axes: dict[str, tuple[Any, ...]]
    """Axis to values. An axis is a key of the recipe, or any name whose values are tables of keys; of a table the key
    ``label`` names the value."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes of the recipe that the trials of this grid share."""

    @field_validator("set", mode="after")
    @classmethod
    def _dotted(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _flat(value)

    @field_validator("axes", mode="before")
    @classmethod
    def _ranges(cls, value: object) -> object:
        return {name: _values(name, item) for name, item in value.items()} if isinstance(value, Mapping) else value


class SweepSpec(Spec):
    """What a sweep file says."""

    name: str = "sweep"
    """Names the folder and the report."""
    description: str = ""
    """One sentence for the report."""
    recipe: str | dict[str, Any] = "quickstart"
    """A preset, the path of a recipe (from the sweep file), or a table."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each trial is made once with each."""
    threads: int = Field(default=1, ge=1)
    """Threads of each trial (compute.threads); part of every stage's key, so that all executors give the same bits."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes of the recipe that all trials share."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """Short for a single grid."""
    grid: tuple[Grid, ...] = ()
    """One or more grids."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Tables of settings; a trial that matches all of one is left out. A list matches any of its values."""

    @field_validator("set", mode="after")
    @classmethod
    def _dotted(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _flat(value)

    @field_validator("exclude", mode="after")
    @classmethod
    def _dotted_rules(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(map(_flat, value))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids; without any axis one with a single point."""
        short = (Grid.model_validate({"axes": self.axes}),) if self.axes or not self.grid else ()
        return (*short, *self.grid)


@dataclass(frozen=True)
class Trial:
    """One point of a sweep."""

    id: str
    """Hash of all that decides its results."""
    point: Mapping[str, object]
    """Axis to value or label."""
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """For people, such as "prune.ratio=0.5 seed=1"."""
        return " ".join([*(f"{axis}={say(value)}" for axis, value in self.point.items()), f"seed={self.seed}"])


def say(value: object) -> str:
    """A value as it stands in labels and tables."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(say, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def load_sweep(path: str | Path, *, overrides: Iterable[str] = (), seeds: Sequence[int] = ()) -> SweepSpec:
    """Read a sweep file.

    Args:
        path: a TOML file.
        overrides: texts such as ``"finetune.epochs=5"``, added to ``[set]``; axes stay as they are.
        seeds: in place of the file's; none: the file's.

    Raises:
        RecipeError: it is missing, is no TOML, or has a key or value that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"expected a sweep file, found nothing at {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    table.setdefault("name", path.stem)
    recipe = table.get("recipe")
    if isinstance(recipe, str) and (path.parent / recipe).is_file():
        table["recipe"] = str(path.parent / recipe)
    if changes := dict(map(parse_override, overrides)):
        table["set"] = {**table.get("set", {}), **changes}
    if seeds:
        table["seeds"] = list(seeds)
    try:
        return SweepSpec.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def expand(spec: SweepSpec) -> list[Trial]:
    """The trials of a sweep, each once, in the order of the grids.

    Raises:
        RecipeError: a key or a value is not valid in a recipe, or no trial is left.
    """
    base = load_recipe(spec.recipe, overrides=spec.set).model_dump(mode="json")
    base |= {"name": spec.name, "compute": {**base["compute"], "threads": spec.threads}}
    trials: dict[str, Trial] = {}
    known = {"seed"}
    parts: dict[tuple[str, object], object] = {}
    for grid in spec.grids:
        for choice in product(*grid.axes.values()):
            point, settings = _settings(dict(zip(grid.axes, choice, strict=True)))
            settings = {**grid.set, **settings}
            known |= {*point, *settings}
            for seed in spec.seeds:
                everything = {**point, **settings, "seed": seed}
                if any(_matches(everything, rule) for rule in spec.exclude):
                    continue
                recipe = load_recipe(base, overrides={**settings, "seed": seed})
                if recipe.compute.devices * recipe.compute.num_nodes > 1:
                    raise RecipeError(
                        "compute.devices, compute.num_nodes: expected 1 in a sweep, whose trials are made beside each "
                        "other; `coldforge run` trains one network on several devices"
                    )
                decides = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _NAMES}
                decides["compute"] = {key: decides["compute"][key] for key in _COMPUTE}
                name = spec_hash(decides)[:12]
                if name not in trials:
                    trials[name] = Trial(name, point, seed, _sharing(recipe, parts))
    if strange := sorted({key for rule in spec.exclude for key in rule} - known):
        raise RecipeError(
            f"exclude: expected axes, keys that an axis sets, or seed, got {strange[0]!r}; "
            f"{nearest(strange[0], sorted(known))}"
        )
    if not trials:
        raise RecipeError("the sweep has no trials: every combination is excluded")
    return list(trials.values())


def _sharing(recipe: Recipe, parts: dict[tuple[str, object], object]) -> Recipe:
    """The same recipe, made of one object for each table that is equal in many trials: a tenth of the memory."""
    return recipe.model_copy(update={name: parts.setdefault((name, part), part) for name, part in recipe})


def _settings(choice: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """(axis to value or label, key of the recipe to value) of one combination."""
    point: dict[str, object] = {}
    settings: dict[str, object] = {}
    for axis, value in choice.items():
        if isinstance(value, Mapping):
            keys = {key: item for key, item in _flat(value).items() if key != "label"}
            point[axis] = value.get("label") or " ".join(f"{key}={say(item)}" for key, item in keys.items())
            settings |= keys
        else:
            point[axis] = settings[axis] = value
    return point, settings


def _flat(table: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Tables in tables as dotted keys: TOML reads ``finetune.epochs = 3`` without quotes as a table ``finetune``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{within}{key}.") if isinstance(value, Mapping) else {f"{within}{key}": value}
    return found


def _matches(everything: Mapping[str, object], rule: Mapping[str, object]) -> bool:
    return all(
        key in everything and everything[key] in (value if isinstance(value, list) else [value])
        for key, value in rule.items()
    )


def _values(axis: str, given: object) -> tuple[object, ...]:
    if isinstance(given, Mapping):
        if set(given) != {"from", "to", "step"}:
            raise ValueError(f"{axis}: expected a list of values, or {{ from, to, step }}, got {json.dumps(given)}")
        return tuple(_range(float(given["from"]), float(given["to"]), float(given["step"])))
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{axis}: expected a list of values, or {{ from, to, step }}, got {given!r}")
    return tuple(given)


def _range(start: float, stop: float, step: float) -> Iterator[float]:
    if step <= 0 or stop < start:
        raise ValueError(f"expected a step above 0 and to >= from, got from {start:g} to {stop:g} in steps of {step:g}")
    for number in range(int((stop - start) / step + 1e-9) + 1):
        yield round(start + number * step, 10)
