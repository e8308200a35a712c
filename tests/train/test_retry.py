import pytest

from coldforge.recipe import TrainSpec
from coldforge.records import CurvePoint
from coldforge.train.checkpoint import TrainState
from coldforge.train.guard import Collapse, NotFinite, Overfitting, SameAnswer
from coldforge.train.retry import after, changed, described

SPEC = TrainSpec(epochs=10, lr=0.09, eps_ramp=0.2, objective="adversarial", attack="pgd-2")


def good(epochs: int) -> TrainState:
    point = CurvePoint(epoch=1, loss=1.0, lr=0.1, eps=0.1, clean_accuracy=0.9, robust_accuracy=0.5)
    return TrainState(curve=(point,) * epochs)


@pytest.mark.parametrize(
    ("collapses", "said"),
    [
        ([], "lr 0.09 and pgd-2"),
        ([SameAnswer], "lr 0.09 and pgd-2, eps rising over 60% of training"),
        ([SameAnswer, SameAnswer], "lr 0.01 and pgd-2, eps rising over 80% of training"),
        ([Overfitting], "lr 0.09 and pgd-3"),
        ([NotFinite], "lr 0.03 and pgd-2"),
        ([Collapse, Collapse], "lr 0.01 and pgd-2"),
        ([Overfitting, SameAnswer], "lr 0.09 and pgd-3, eps rising over 60% of training"),
        ([SameAnswer, NotFinite], "lr 0.03 and pgd-2, eps rising over 60% of training"),
    ],
)
def test_what_is_changed(collapses, said):
    state = TrainState()
    for collapse in collapses:
        state = after(collapse(""), state, TrainState(), SPEC)
    assert state.attempt == len(collapses)
    assert described(SPEC, state) == said


@pytest.mark.parametrize("settings", [{}, {"eps_ramp": 0.0}, {"epochs": 3}])
@pytest.mark.parametrize("collapse", [SameAnswer, Overfitting, NotFinite])
@pytest.mark.parametrize("epochs", range(10))
def test_the_rest_of_training_is_never_the_same_again(epochs, collapse, settings):
    """From there on, at least one step has another rate, eps or attack."""
    spec = SPEC.model_copy(update=settings)
    back = good(min(epochs, spec.epochs - 1))
    state = after(collapse(""), TrainState(), back, spec)
    now = changed(spec, state)
    rising = now.eps_ramp != spec.eps_ramp and now.eps_ramp * spec.epochs > len(back.curve)
    assert rising or now.lr < spec.lr or state.stronger


def test_natural_training_learns_more_slowly():
    natural = SPEC.model_copy(update={"objective": "natural"})
    assert described(natural, after(SameAnswer(""), TrainState(), TrainState(), natural)) == "lr 0.03"
