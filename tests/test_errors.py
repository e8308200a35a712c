import pytest

from coldforge import errors
from coldforge.errors import ColdforgeError, nearest


def all_errors():
    return [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_has_the_root_and_stands_in_the_tree_of_the_docstring(error):
    assert issubclass(error, ColdforgeError)
    assert error.__name__ in errors.__doc__
    assert error.__doc__


def test_errors_are_also_the_builtin_kind_that_callers_expect():
    assert issubclass(errors.RecipeError, ValueError)
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.TraceError, errors.ModelError)
    assert issubclass(errors.CollapseError, errors.TrainingError)


def test_nearest_names_the_closest_word_or_all_of_them():
    assert nearest("epoch", ["epochs", "lr"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["lr", "epochs"]) == "valid: epochs, lr"
