"""Recipes: one frozen spec per stage, TOML in and out.

A spec is configuration, cache key and label at once: :func:`spec_hash` of the same spec is the same on every machine.
Every key has a default, so an empty recipe is a valid one. Unknown keys are refused with the
nearest valid one. Numbers may be written as fractions (``eps = "8/255"``).
"""

from coldforge.recipe.files import load_recipe, parse_override, preset_names, to_toml
from coldforge.recipe.specs import (
    ComputeSpec,
    DataSpec,
    DeploySpec,
    EvaluateSpec,
    ModelSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    ThreatModelSpec,
)
from coldforge.recipe.training import ControlSpec, FinetuneSpec, HardenSpec, ReferenceSpec, TrainSpec

__all__ = [
    "ComputeSpec",
    "ControlSpec",
    "DataSpec",
    "DeploySpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "HardenSpec",
    "ModelSpec",
    "PruneSpec",
    "QuantizeSpec",
    "Recipe",
    "ReferenceSpec",
    "ThreatModelSpec",
    "TrainSpec",
    "load_recipe",
    "parse_override",
    "preset_names",
    "to_toml",
]
