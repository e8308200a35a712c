"""What a training that collapsed changes in its next attempt.

A network that fooled its own inner attack gets a stronger one. A network that gave up while eps was new to it, and
answers the same whatever it sees, meets the attack more slowly: narrow networks that must withstand all of eps at once
never leave that answer, at no learning rate. Where that did not help, the learning rate falls, too, as far as if it had
fallen at once; it alone in all other cases.
"""

from __future__ import annotations

from dataclasses import replace

from coldforge.attacks import InnerAttack, parse_inner
from coldforge.recipe import TrainSpec
from coldforge.train.checkpoint import TrainState
from coldforge.train.guard import Collapse, Overfitting, SameAnswer

LOWER_LR = 1 / 3
LESS_AT_FULL_EPS = 1 / 2
"""What is left of the part of training at full eps."""


def after(collapse: Collapse, collapsed: TrainState, back: TrainState, spec: TrainSpec) -> TrainState:
    """The state ``back``, from which training goes on in another way than that of ``collapsed``."""
    slower = spec.objective != "natural" and isinstance(collapse, SameAnswer)
    if slower:  # but not where eps was full already: it would be the same attempt again
        slower = _eps_ramp(spec, collapsed.slower + 1) * spec.epochs > len(back.curve)
    return replace(
        back,
        attempt=collapsed.attempt + 1,
        stronger=collapsed.stronger + isinstance(collapse, Overfitting),
        slower=collapsed.slower + slower,
    )


def changed(spec: TrainSpec, state: TrainState) -> TrainSpec:
    """The settings of this attempt: a third of the peak learning rate for each collapse that no stronger attack
    answered, and how slowly eps rises. One that did so once has the rate of before: nobody knows yet which it takes.
    """
    lowered = state.attempt - state.stronger - (state.slower == 1)
    ramp = _eps_ramp(spec, state.slower)
    return spec.model_copy(update={"lr": spec.lr * LOWER_LR**lowered, "eps_ramp": ramp})


def inner_attack(spec: TrainSpec, state: TrainState) -> InnerAttack | None:
    """The inner attack; one more step for each time that it was overfitted."""
    return None if spec.objective == "natural" else parse_inner(spec.attack).stronger(state.stronger)


def described(spec: TrainSpec, state: TrainState) -> str:
    """In words, such as "lr 0.05 and pgd-2, eps rising over 58 % of training"."""
    inner, now = inner_attack(spec, state), changed(spec, state)
    ramp = f", eps rising over {now.eps_ramp:.0%} of training" if state.slower else ""
    return f"lr {now.lr:.3g}" + (f" and {inner.label}{ramp}" if inner else "")


def _eps_ramp(spec: TrainSpec, slower: int) -> float:
    """Part of training in which eps rises; half of the rest more each time."""
    return 1 - (1 - spec.eps_ramp) * LESS_AT_FULL_EPS**slower if slower else spec.eps_ramp
