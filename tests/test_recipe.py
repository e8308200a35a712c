import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldforge.errors import RecipeError
from coldforge.recipe import QuantizeSpec, Recipe, TrainSpec, load_recipe, preset_names, to_toml
from coldforge.spec import Spec, added, spec_hash
from coldforge.store import key


def test_an_empty_recipe_is_valid():
    assert load_recipe({}) == Recipe()


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_explain_themselves(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_quickstart_is_a_preset_and_the_default():
    assert load_recipe() == load_recipe("quickstart")


@pytest.mark.parametrize("name", preset_names())
def test_toml_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "r.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(path) == recipe


@given(
    eps=st.floats(0.001, 0.99),
    ratio=st.floats(0, 0.99),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    seed=st.integers(0, 2**31),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
)
def test_any_recipe_survives_toml(eps, ratio, bits, seed, name):
    recipe = load_recipe(
        {
            "name": name,
            "seed": seed,
            "threat_model": {"eps": eps},
            "prune": {"ratio": ratio},
            "quantize": {"weight_bits": bits, "activation_bits": bits},
        }
    )
    again = load_recipe(tomllib.loads(to_toml(recipe)))
    assert again == recipe
    assert spec_hash(again) == spec_hash(recipe)


def test_a_description_names_what_was_set_by_hand():
    plain = load_recipe("quickstart").description
    changed = load_recipe("quickstart", overrides={"threat_model.eps": 0.05, "prune.ratio": 0.25, "compute.threads": 1})
    assert changed.description == f"{plain} Set by hand: threat_model.eps, prune.ratio."
    assert load_recipe("quickstart", overrides=["seed=3"]).description == plain
    assert load_recipe("quickstart", overrides=["prune.ratio=0.25", "description=my own"]).description == "my own"
    assert load_recipe({}, overrides=["prune.ratio=0.25"]).description == ""
    same = {"model.source": "zoo:cnn8"}  # as forge() says it of a network that it is given by name
    assert load_recipe(load_recipe("quickstart").model_dump(mode="json"), overrides=same).description == plain


def test_fractions_and_overrides():
    overrides = ["threat_model.eps=8/255", "finetune.epochs = 5", "data.source=cifar10", "seed=3"]
    recipe = load_recipe({}, overrides=overrides)
    assert recipe.threat_model.eps == 8 / 255
    assert (recipe.finetune.epochs, recipe.data.source, recipe.seed) == (5, "cifar10", 3)
    assert load_recipe({}, overrides=["model.train.epochs=2", 'finetune.arms=["adversarial"]']).model.train.epochs == 2


def test_the_source_mapping_is_not_changed():
    table = {"finetune": {"epochs": 2}}
    load_recipe(table, overrides=["finetune.epochs=5"])
    assert table == {"finetune": {"epochs": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.epoch=5", r"unknown key 'finetune.epoch'; did you mean 'epochs'\?"),
        ("fine_tune.epochs=5", r"unknown key 'fine_tune'; did you mean 'finetune'\?"),
        ("model.train.learning_rate=1", "unknown key 'model.train.learning_rate'; valid: .*lr"),
        ("threat_model.eps=8", r"expected a fraction of the pixel range \[0, 1\], got 8; did you mean 8/255\?"),
        ("threat_model.eps=0", "threat_model.eps: expected a number above 0, got 0"),
        ("threat_model.eps=8/0", "expected a number or a fraction such as '8/255', got '8/0'"),
        ("threat_model.norm=l1", "threat_model.norm: .*'linf' or 'l2', got 'l1'"),
        ("prune.ratio=1", "prune.ratio: expected a part of the channels, .* got 1; 1 would remove every channel"),
        ("quantize.weight_bits=3.5", r"quantize.weight_bits: expected a whole number of bits, one of 1, .* got 3.5"),
        ("quantize.weight_bits=32", "weight_bits and activation_bits both quantized or both 32, got 32 and 8"),
        ("finetune.arms=[]", r"finetune.arms: expected distinct arms, at least one, got \[\]"),
        ('evaluate.stages=["baseline"]', r"evaluate.stages: expected at least \"artifact\", got \['baseline'\]"),
        ('finetune.arms=["natural"]', r"deploy.arm: expected one of finetune.arms \['natural'\], got 'adversarial'"),
        (
            "finetune.objective=natural",
            r'finetune\.objective is that of the adversarial arm; expected finetune\.arms = \["natural"\] instead',
        ),
        ("evaluate.attacks=[]", r"evaluate\.attacks: .*at least 1 item"),
        ("compute.device=cuda", r"compute\.device: .*'cpu'.*got 'cuda'"),
        ("finetune.epochs=0", "finetune.epochs: .*greater than or equal to 1, got 0"),
        ("seed=-1", "seed: .*greater than or equal to 0, got -1"),
        ("nonsense", "expected key=value, such as finetune.epochs=5, got 'nonsense'"),
        ("=3", "expected key=value"),
    ],
)
def test_bad_values_are_explained(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", overrides=[override])


def test_a_value_is_not_a_table():
    with pytest.raises(RecipeError, match=r"seed\.x: expected a table at 'seed', found a value"):
        load_recipe({"seed": 1}, overrides=["seed.x=1"])


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(RecipeError, match=r"did you mean 'quickstart'\?"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"expected a recipe file, found nothing at .*r\.toml"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("a = ")
    with pytest.raises(RecipeError, match=r"r\.toml is not valid TOML"):
        load_recipe(tmp_path / "r.toml")


def test_specs_are_frozen_and_every_key_is_documented():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 2

    def undocumented(spec, path):
        for name, field in type(spec).model_fields.items():
            value = getattr(spec, name)
            if isinstance(value, Spec):
                yield from undocumented(value, f"{path}{name}.")
            elif not field.description:
                yield path + name

    assert list(undocumented(Recipe(), "")) == []


def test_hash_depends_on_every_part_and_not_on_the_order_of_keys():
    assert spec_hash({"a": 1, "b": 2}) == spec_hash({"b": 2, "a": 1})
    assert spec_hash(TrainSpec()) == spec_hash(TrainSpec())
    assert len({spec_hash(TrainSpec()), spec_hash(TrainSpec(epochs=4)), spec_hash(TrainSpec(), 1), spec_hash("a")}) == 4
    # the same on every machine and for ever: a change here makes all stores useless
    assert spec_hash("baseline", 1, {"eps": 0.1})[:16] == "555a9325e8947306"


class Part(Spec):
    old: int = 1
    """."""


class LaterPart(Part):
    new: float = added(1.0)
    """."""


class Whole(Spec):
    part: Part | LaterPart = Part()
    """."""


def test_a_key_that_was_added_later_is_no_part_of_what_was_there_before():
    assert spec_hash(LaterPart()) == spec_hash(Part())
    assert spec_hash(LaterPart(new=2)) != spec_hash(Part())
    assert spec_hash(Whole(part=LaterPart())) == spec_hash(Whole())  # in tables of tables, too
    assert spec_hash(Whole(part=LaterPart(new=2))) != spec_hash(Whole())
    assert key("stage", 1, [{"a": LaterPart()}]) == key("stage", 1, [{"a": Part()}])
    assert LaterPart().model_dump() == {"old": 1, "new": 1.0}  # records say it


def test_recipes_are_what_they_were():
    """A new key that is not `added` makes every store and every sweep useless; say so in the changelog if it must."""
    assert spec_hash(Recipe())[:16] == "e5b106bb7ff70e17"


# --- what editors and command lines write


def test_a_recipe_is_called_like_its_file_where_it_does_not_say(tmp_path):
    (tmp_path / "my-net.toml").write_text("seed = 1")
    assert load_recipe(tmp_path / "my-net.toml").name == "my-net"
    (tmp_path / "my-net.toml").write_text('name = "said"')
    assert load_recipe(str(tmp_path / "my-net.toml")).name == "said"


def test_a_mark_at_the_beginning_is_read_over(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfseed = 7\n")
    assert load_recipe(tmp_path / "a.toml").seed == 7


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(RecipeError, match=r"net\.pt is no recipe: expected TOML in UTF-8, got other bytes"):
        load_recipe(tmp_path / "net.pt")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value):
    with pytest.raises(RecipeError, match=r"threat_model\.eps: input should be a finite number"):
        load_recipe("quickstart", overrides=[f"threat_model.eps={value}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("finetune.arms=adversarial", ("adversarial",)),
        ("evaluate.attacks=fgsm, pgd-20", ("fgsm", "pgd-20")),
        ("model.mean=0.5", (0.5,)),
        ("model.mean=[0.4, 0.5]", (0.4, 0.5)),
        ("deploy.runtimes=", ()),
    ],
)
def test_one_is_a_list(text, value):
    table, key = text.partition("=")[0].split(".")
    assert getattr(getattr(load_recipe("quickstart", overrides=[text]), table), key) == value


def test_ternary_weights_have_the_keys_of_before_and_others_do_not_care() -> None:
    """All weights of 2 bits were ternary once: what is in a store then is found by those who ask for it."""
    before = "50045cd7b60250797f174383ab59675bc1882720bc04669478680052ef215709"
    assert spec_hash(QuantizeSpec(weight_bits=2, activation_bits=4, ternary=True)) == before
    assert spec_hash(QuantizeSpec(weight_bits=2, activation_bits=4)) != before
    eight = "6049fb635891fceee6110f4132579343a0f7008a6f253bdc3e4b45507f75675e"
    assert spec_hash(QuantizeSpec()) == spec_hash(QuantizeSpec(ternary=True)) == eight
    one = [spec_hash(QuantizeSpec(weight_bits=1, edge_bits=2, ternary=ternary)) for ternary in (False, True)]
    assert one[0] != one[1], "the first and the last layer have 2 bits"
