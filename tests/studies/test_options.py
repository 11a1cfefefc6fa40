"""Fields, values and splits as text of a command line."""

import argparse

import pytest

from vit_jax import Config
from vit_jax.errors import ConfigError
from vit_jax.studies import options


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2", ["1", "2"]),
        ("(0.3,1.0),(0.5,1.0)", ["(0.3,1.0)", "(0.5,1.0)"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("[(1,2),3]", ["[(1,2),3]"]),
        ("'(',2", ["'('", "2"]),
        ("", [""]),
        ("1,", ["1", ""]),
    ],
)
def test_separators_in_brackets_and_quotes_do_not_split(text, parts):
    assert options.split_outside(text, ",") == parts


@pytest.mark.parametrize("text", ["(1,2", "'a", "1)"])
def test_open_bracket_or_quote_is_an_error(text):
    with pytest.raises(ValueError, match="not closed"):
        options.split_outside(text, ",")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.batch_size=32", 32),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.learning_rate=1e-3", 0.001),
        ("augment.flip=false", False),
        ("augment.crop_area=(0.3,1.0)", (0.3, 1.0)),
        ("augment.crop=none", "none"),
        ("data.task='hub:a/b@image,label'", "hub:a/b@image,label"),
        ("run.mesh=data:4,fsdp:2", "data:4,fsdp:2"),
        ("data.train_split=''", ""),
    ],
)
def test_field_gets_a_value_of_its_type(text, value):
    config = Config()
    name = options.set_field(config, text)
    section, field = name.split(".")
    found = getattr(getattr(config, section), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.rate=1", "--config optimizer.rate=1: expected FIELD=VALUE with a field of a configuration"),
        ("optimizer.learning_rat=1", "the nearest is optimizer.learning_rate"),
        ("optimizer=1", "expected FIELD=VALUE"),
        ("seed", "expected FIELD=VALUE"),
        ("seed=", "expected FIELD=VALUE"),
        ("seed=one", "seed must be of type int, got 'one'"),
        ("augment.crop_area=(0.3,", "augment.crop_area must be of type tuple"),
        ("training.steps=3", "the study sets it"),
    ],
)
def test_wrong_field_or_value_is_named(text, message):
    with pytest.raises(ConfigError) as error:
        options.set_field(Config(), text, refused={"training.steps": "the study sets it"})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_steps_take_the_place_of_epochs():
    config = Config()
    config.training.epochs = 200.0
    assert options.set_field(config, "training.steps=3") == "training.steps"
    assert (config.training.steps, config.training.epochs) == (3, 0.0)


@pytest.mark.parametrize(
    ("held", "rest"),
    [
        ("train[90%:]", "train[:90%]"),
        ("train[:10%]", "train[10%:]"),
        ("train[900:]", "train[:900]"),
        ("train[-100:]", "train[:-100]"),
    ],
)
def test_held_out_images_and_the_rest_are_the_training_images(held, rest):
    from vit_jax.data.sources import shared_examples
    from vit_jax.data.splits import open_splits
    from vit_jax.data.tasks import task

    config = Config()
    config.data.task, config.data.validation_split = "cifar100_excerpt", "own"
    options.hold_out(config, held)
    assert (config.data.train_split, config.data.test_split, config.data.validation_split) == (rest, held, "")
    found = open_splits(task("cifar100_excerpt"), config.data)
    assert len(found.train) + len(found.test) == 1000 and not shared_examples(found.train, found.test)


@pytest.mark.parametrize(
    ("held", "trained", "message"),
    [
        ("test[90%:]", "", "the training split is 'train', and only a part of that can be held out"),
        ("train[90%:]", "train[:98%]", "needs a whole split as data.train_split, which is 'train[:98%]'"),
        ("train", "", "expected a part of the training images at their end or beginning"),
        ("train[10%:20%]", "", "expected a part"),
        ("train[:]", "", "expected a part"),
        ("train[0:]", "", "expected a part"),
        ("train[100%:]", "", "expected a part"),
        ("train[90%:]+test", "", "expected a part"),
    ],
)
def test_other_held_out_splits_are_refused(held, trained, message):
    config = Config()
    config.data.train_split = trained
    with pytest.raises(ConfigError) as error:
        options.hold_out(config, held)
    assert message in str(error.value) and held in str(error.value)


def test_numbers_are_above_0_with_commas_between_them():
    assert options.numbers(int)("500,2500") == (500, 2500) and options.numbers(float)("0.1") == (0.1,)
    for text, message in (("0.1,x", "expected numbers with commas"), ("0,1", "expected numbers above 0")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            options.numbers(float)(text)


def test_zero_is_a_number_only_if_it_is_allowed():
    assert options.numbers(float, zero=True)("0,0.1") == (0.0, 0.1)
    with pytest.raises(argparse.ArgumentTypeError, match="expected numbers above 0 or 0"):
        options.numbers(float, zero=True)("-1")


@pytest.mark.parametrize(
    ("text", "held"),
    [("", (900, 1000)), ("train[75%:]", (750, 1000)), ("train[:100]", (0, 100)), ("train[-100:]", (900, 1000))],
)
def test_held_out_positions_are_those_of_the_split(text, held):
    assert options.held_out_range(text, "train", 1000) == held
    with pytest.raises(ConfigError, match="some of the 1 training images must be held out"):
        options.held_out_range("", "train", 1)
