import io
import tomllib

import pytest
from rich.console import Console

from coldforge.console import Forecast, RichProgress, about, documented_toml, plan_line
from coldforge.progress import Step
from coldforge.recipe import Recipe, load_recipe

STEPS = [Step("data", 0, cached=True), Step("baseline", 60.0), Step("tune", 120.0)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def progress(clock, *, terminal=False, quiet=False):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return RichProgress(console, quiet=quiet, clock=clock), out


def test_forecast_uses_the_plan_until_it_knows_better(clock):
    forecast = Forecast(STEPS, clock)
    assert forecast.left() == 180
    assert forecast.fraction() == 0
    forecast.begin("data")
    forecast.end(cached=True)
    forecast.begin("baseline")
    clock.now = 30
    assert forecast.left() == 150
    forecast.advance(0.25)  # a quarter in 30 s: 90 s to go
    assert forecast.stage_left() == pytest.approx(90)
    assert forecast.fraction() == pytest.approx(15 / 180)
    clock.now = 130
    assert forecast.end() == 130
    assert forecast.left() == pytest.approx(120 * 140 / 70)  # twice as slow as planned
    forecast.begin("tune")
    forecast.advance(1.0)
    assert forecast.fraction() == 1.0
    forecast.end()
    assert forecast.left() == 0


def test_forecast_of_nothing_and_of_an_unplanned_stage(clock):
    forecast = Forecast([], clock)
    assert (forecast.left(), forecast.fraction()) == (0, 1)
    forecast.begin("surprise")
    clock.now = 1
    assert forecast.end() == 1


def test_lines_where_there_is_no_terminal(clock):
    display, out = progress(clock)
    with display:
        display.plan(STEPS)
        display.begin("data")
        display.end("data", cached=True)
        display.begin("baseline")
        for second in range(1, 61):
            clock.now = second
            display.advance(second / 60, f"epoch {second}")
        display.note("a collapse; trying again")
        display.end("baseline")
    assert out.getvalue().splitlines() == [
        "3 stages (1 in the store), about 3 min of computing; stop with Ctrl-C at any time",
        "  data: in the store",
        "  baseline: about 60 s",
        "  tune: about 2 min",
        "[1/3] data: in the store",
        "[2/3] baseline …",
        "[2/3] baseline: 25 %, about 3 min left (epoch 15)",
        "[2/3] baseline: 50 %, about 2 min left (epoch 30)",
        "[2/3] baseline: 75 %, about 2 min left (epoch 45)",
        "[2/3] baseline: 100 %, about 2 min left (epoch 60)",
        "note: a collapse; trying again",
        "[2/3] baseline: done in 1 min 00 s",
    ]


def test_a_terminal_gets_one_live_bar_that_ends_with_the_run(clock):
    display, out = progress(clock, terminal=True)
    with display:
        display.plan(STEPS)
        display.begin("baseline")
        clock.now = 30
        display.advance(0.5, "epoch 4 of 8")
        display._bars.refresh()
        assert "epoch 4 of 8" in out.getvalue()
        assert "about 2 min left" in out.getvalue()
        display.end("baseline")
    assert display._bars is None
    assert "[1/3] baseline: done in 30 s" in out.getvalue()


def test_the_bar_ends_when_the_run_fails(clock):
    display, _ = progress(clock, terminal=True)

    def fail():
        with display:
            display.plan(STEPS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert display._bars is None


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_only_notes(clock, terminal):
    display, out = progress(clock, terminal=terminal, quiet=True)
    with display:
        display.plan(STEPS)
        display.begin("data")
        clock.now = 100
        display.advance(0.5)
        display.note("damaged [/weird]")
        display.end("data")
    assert out.getvalue() == "note: damaged [/weird]\n"


def test_plan_line():
    assert plan_line(STEPS[:1]) == "1 stage, all in the store: nothing to compute"
    assert plan_line(STEPS[1:2]) == "1 stage, about 60 s of computing; stop with Ctrl-C at any time"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "a few seconds"), (8, "about 10 s"), (47, "about 50 s"), (89, "about 1 min"), (4000, "about 1 h 07 min")],
)
def test_about(seconds, text):
    assert about(seconds) == text


def test_documented_toml_is_the_same_recipe():
    recipe = load_recipe({}, overrides=["finetune.epochs=7", "model.train.lr=0.5"])
    text = documented_toml(recipe)
    assert load_recipe(tomllib.loads(text)) == recipe
    for spec in (recipe, recipe.finetune, recipe.model.train):
        for field in type(spec).model_fields.values():
            assert not field.description or field.description.splitlines()[0] in text
    assert "schedule.\n[model.train]\n# natural: " in documented_toml(Recipe())
    assert "# One of: l1, l2, batchnorm, taylor, taylor-adversarial, random.\nimportance" in documented_toml(Recipe())
    assert "# One of: linf, l2.\nnorm" in documented_toml(Recipe())
