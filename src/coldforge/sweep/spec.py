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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator

from coldforge.errors import RecipeError, nearest
from coldforge.recipe import Recipe, load_recipe, parse_override
from coldforge.records import StageRecord
from coldforge.spec import Spec, identity, spec_hash

_NAMES = {"name", "description"}
"""Keys of a recipe that name it and decide nothing."""
_ELSEWHERE = {
    "name": "the sweep's own name",
    "seed": "seeds, or --seeds",
    "compute.threads": "threads, beside seeds",
    "compute.devices": "`coldforge run`, which trains one network on several devices",
    "compute.num_nodes": "`coldforge run`, which trains one network on several machines",
}
"""Keys of a recipe that a sweep sets by itself, to what is to be said in their place."""
_COLUMNS = {*StageRecord.model_fields, "trial", "exported", "images", "n_attacked"}
"""Names that an axis cannot have: columns of the table are called so."""
_RANGE = {"from", "to", "step"}


def _flat(table: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Tables in tables as dotted keys: TOML reads ``finetune.epochs = 3`` without quotes as a table ``finetune``. A
    range { from, to, step } is a value.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping) and not _RANGE & value.keys()
        found |= _flat(value, f"{within}{key}.") if inner else {f"{within}{key}": value}
    return found


def _settable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the recipe, none of which the sweep sets by itself."""
    for key in settings:
        if key in _ELSEWHERE:
            raise ValueError(f"{key} cannot be set in a sweep; use {_ELSEWHERE[key]}")
    return settings


def _axes(given: object) -> object:
    """Axis to its values."""
    if not isinstance(given, Mapping):
        return given
    axes = {name: _values(name, item) for name, item in _flat(given).items()}
    for name, values in axes.items():
        _settable({name: values})
        if name in _COLUMNS:
            raise ValueError(f"an axis cannot be called {name}, as a column of the results is; choose another name")
        for value in values:
            if isinstance(value, Mapping):
                _settable(_flat(value))
    return axes


def _values(axis: str, given: object) -> tuple[object, ...]:
    if isinstance(given, Mapping):
        if given.keys() != _RANGE:
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


Settings = Annotated[dict[str, Any], AfterValidator(lambda table: _settable(_flat(table)))]
"""Changes of a recipe, by dotted keys."""
Axes = Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_axes)]
"""Axis to values. An axis is a key of the recipe, or any name whose values are tables of keys; of a table the key
``label`` names the value."""


class Grid(Spec):
    """Every combination of the values of its axes."""

    axes: Axes
    set: Settings = Field(default_factory=dict)
    """Changes of the recipe that the trials of this grid share."""


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
    set: Settings = Field(default_factory=dict)
    """Changes of the recipe that all trials share."""
    axes: Axes = Field(default_factory=dict)
    """Short for a single grid."""
    grid: tuple[Grid, ...] = ()
    """One or more grids."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Tables of settings; a trial that matches all of one is left out. A list matches any of its values."""

    @field_validator("exclude", mode="after")
    @classmethod
    def _dotted_rules(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(map(_flat, value))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids; without any axis one with a single point."""
        short = (Grid(axes=self.axes),) if self.axes or not self.grid else ()
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


def base_of(spec: SweepSpec) -> dict[str, Any]:
    """The recipe that the trials of a sweep change, as plain values.

    Raises:
        RecipeError: there is none, or a key or a value is not valid.
    """
    plain = load_recipe(spec.recipe)
    base = load_recipe(spec.recipe, overrides={"description": plain.description, **spec.set}).model_dump(mode="json")
    if base["compute"]["devices"] * base["compute"]["num_nodes"] > 1:
        raise RecipeError(
            "compute.devices, compute.num_nodes: expected 1 in a sweep, whose trials are made beside each other; "
            "`coldforge run` trains one network on several devices"
        )
    return {**base, "name": spec.name, "compute": {**base["compute"], "threads": spec.threads}}


def expand(spec: SweepSpec, *, resolve: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> list[Trial]:
    """The trials of a sweep, each once, in the order of the grids.

    Args:
        spec: what the file says.
        resolve: what is done to each recipe once its trial is named, such as :func:`coldforge.pipeline.resolve`: "auto"
            then means on all machines that make its stages what it means here.

    Raises:
        RecipeError: a key or a value is not valid in a recipe, or no trial is left.
    """
    base = base_of(spec)
    trials: dict[str, Trial] = {}
    taken: dict[object, str] = {}
    values: dict[str, list[object]] = {"seed": list(spec.seeds)}
    parts: dict[tuple[str, object], object] = {}
    for grid in spec.grids:
        for choice in product(*grid.axes.values()):
            point, settings = _settings(dict(zip(grid.axes, choice, strict=True)))
            settings = {**grid.set, **settings}
            for key, value in {**point, **settings}.items():
                values.setdefault(key, []).append(value)
            for seed in spec.seeds:
                everything = {**point, **settings, "seed": seed}
                if any(_matches(everything, rule) for rule in spec.exclude):
                    continue
                words = {"seed": seed, "description": base["description"]}
                recipe = load_recipe(base, overrides={**settings, **words})
                decides = {key: value for key, value in identity(recipe).items() if key not in _NAMES}
                decides["compute"] = recipe.compute.in_every_key()
                name = spec_hash(decides)[:12]
                if name not in trials:
                    trials[name] = Trial(name, point, seed, _sharing(resolve(recipe), parts))
                said = frozenset((axis, say(value)) for axis, value in point.items()), seed
                if taken.setdefault(said, name) != name:
                    raise RecipeError(
                        f"two trials are called {trials[name].label}, and differ all the same: their results would be "
                        "taken for those of two seeds; add an axis, or another label, that tells them apart"
                    )
    for rule in spec.exclude:
        _refuse_idle(rule, values)
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


def _matches(everything: Mapping[str, object], rule: Mapping[str, object]) -> bool:
    return all(key in everything and _is_meant(everything[key], value) for key, value in rule.items())


def _is_meant(value: object, rule: object) -> bool:
    """Whether an exclusion names this value: it is equal, or one of a list."""
    return value == rule or (isinstance(rule, list) and value in rule)


def _refuse_idle(rule: Mapping[str, object], values: Mapping[str, Sequence[object]]) -> None:
    """An exclusion that can match nothing is a mistake."""
    for key, value in rule.items():
        if key not in values:
            raise RecipeError(
                f"exclude: expected axes, keys that an axis sets, or seed, got {key!r}; {nearest(key, sorted(values))}"
            )
        if not any(_is_meant(each, value) for each in values[key]) and key != "seed":
            there = ", ".join(dict.fromkeys(map(say, values[key])))
            raise RecipeError(f"exclude: expected values that {key} takes ({there}), got {say(value)}")
