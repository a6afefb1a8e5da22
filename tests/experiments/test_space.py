"""What a search may look at, as people write it."""

from __future__ import annotations

import pytest

from xception.errors import ConfigError
from xception.experiments.space import default_space, own_point, parse_space
from xception.training.recipe import NAMED, override

SMALL = NAMED["small"]


def test_ranges_and_choices() -> None:
    rate, batch, smoothing, warmup = parse_space(
        ["learning-rate=0.01..0.5,log", "batch_size=64|128", "label_smoothing=0..0.2", "accumulate=1..4"], SMALL
    )
    assert (rate.name, rate.low, rate.high, rate.log, rate.whole) == ("learning_rate", 0.01, 0.5, True, False)
    assert batch.choices == (64, 128)
    assert (smoothing.low, smoothing.high, smoothing.log) == (0.0, 0.2, False)
    assert warmup.whole
    assert own_point(SMALL, [rate, batch, smoothing]) == {
        "learning_rate": 0.3,
        "batch_size": 128,
        "label_smoothing": 0.1,
    }
    assert own_point(override(SMALL, batch_size=32), [rate, batch]) is None


@pytest.mark.parametrize("name", ["small", "imagenet", "jft"])
def test_the_default_space_holds_the_recipe_itself(name: str) -> None:
    space = default_space(NAMED[name])
    assert own_point(NAMED[name], space) is not None
    for dimension in space:
        for end in (dimension.low, dimension.high):
            override(NAMED[name], **{dimension.name: end})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("learning_rate", "--search must be NAME=LOW..HIGH"),
        ("learning_rate=", "--search must be NAME=LOW..HIGH"),
        ("learning_rat=0..1", "unknown recipe field 'learning_rat': did you mean learning_rate"),
        ("learning_rate=1..0.1", "the lower first; got '1..0.1'"),
        ("learning_rate=a..b", "with numbers, the lower first; got 'a..b'"),
        ("learning_rate=0.1..inf", "with numbers, the lower first"),
        ("learning_rate=0.1..1,exp", "LOW..HIGH,log"),
        ("learning_rate=0..1,log", "a logarithm needs numbers above 0"),
        ("label_smoothing=0..2", r"label_smoothing must be in \[0, 1\); got 2.0"),
        ("batch_size=1.5..3", "batch_size must be between whole numbers"),
        ("batch_size=64", "two or more different values"),
        ("batch_size=64|64", "two or more different values"),
        ("optimizer=sgd|sgdd", "optimizer must be one of"),
        ("random_resized_crop=[0.1,1]|[0.5,1]", "a list cannot be searched"),
        ("epochs=1..5", "epochs is not for search"),
        ("seed=1..5", "seed is not for search"),
    ],
)
def test_what_is_none_is_refused_in_one_line(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as refused:
        parse_space([text], SMALL)
    assert "\n" not in str(refused.value)


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum is given twice"):
        parse_space(["momentum=0.8..0.9", "momentum=0.9|0.95"], SMALL)
