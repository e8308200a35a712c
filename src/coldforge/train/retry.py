"""What a training that collapsed changes in its next attempt.

A network that fooled its own inner attack gets a stronger one. A network that gave up, and answers the same whatever it
sees, meets the attack more slowly: narrow networks that must withstand all of eps at once never leave that answer, at
no learning rate. Where that did not help, and in all other cases, the learning rate falls.
"""

from __future__ import annotations

from dataclasses import replace

from coldforge.attacks import InnerAttack, parse_inner
from coldforge.recipe import TrainSpec
from coldforge.train.checkpoint import TrainState
from coldforge.train.guard import Collapse, Overfitting, SameAnswer

LOWER_LR = 1 / 3
LONGER_RAMP = 1 / 2
"""What is left of the part of training at full eps."""


def after(collapse: Collapse, collapsed: TrainState, back: TrainState, spec: TrainSpec) -> TrainState:
    """The state ``back``, from which training goes on in another way than that of ``collapsed``."""
    attacked = spec.objective != "natural"
    return replace(
        back,
        attempt=collapsed.attempt + 1,
        stronger=collapsed.stronger + isinstance(collapse, Overfitting),
        slower=collapsed.slower + (attacked and isinstance(collapse, SameAnswer)),
    )


def peak_lr(spec: TrainSpec, state: TrainState) -> float:
    """Peak learning rate: a third for each collapse, but for those answered by the attack alone."""
    return spec.lr * LOWER_LR ** (state.attempt - state.stronger - min(state.slower, 1))


def inner_attack(spec: TrainSpec, state: TrainState) -> InnerAttack | None:
    """The inner attack; one more step for each time that it was overfitted."""
    return None if spec.objective == "natural" else parse_inner(spec.attack).stronger(state.stronger)


def eps_ramp(spec: TrainSpec, state: TrainState) -> float:
    """Part of training in which eps rises; after each constant answer, half of the rest more.

    >>> eps_ramp(TrainSpec(eps_ramp=0.2), TrainState(slower=2))
    0.8
    """
    return 1 - (1 - spec.eps_ramp) * LONGER_RAMP**state.slower if state.slower else spec.eps_ramp


def described(spec: TrainSpec, state: TrainState) -> str:
    """In words, such as "lr 0.05 and pgd-2, eps rising over 58 % of training"."""
    inner = inner_attack(spec, state)
    ramp = f", eps rising over {eps_ramp(spec, state):.0%} of training" if state.slower else ""
    return f"lr {peak_lr(spec, state):.3g}" + (f" and {inner.label}{ramp}" if inner else "")
