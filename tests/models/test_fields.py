"""Type checks of configs, which may come from files that someone else wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from xception.errors import ConfigError
from xception.models.fields import check_fields, check_range, checked_values, to_lists, unknown_name


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    kind: Literal["x", "y", 3] = "x"
    widths: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    maybe: Literal[1, 2] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"count": -3, "rate": 2, "name": "", "flag": True},
        {"kind": 3, "widths": [1, 2], "pair": [1, 2], "maybe": 2},
        {"widths": (), "maybe": None, "rate": float("inf")},
    ],
)
def test_values_that_fit_are_taken_and_lists_become_tuples(values: dict[str, Any]) -> None:
    sample = Sample(**checked_values(Sample, values))
    for name, value in values.items():
        assert to_lists(getattr(sample, name)) == to_lists(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1.0),
        ("count", True),
        ("count", "1"),
        ("count", None),
        ("rate", "0.5"),
        ("rate", True),
        ("name", 1),
        ("flag", 1),
        ("kind", "z"),
        ("kind", 3.0),
        ("widths", 5),
        ("widths", [1, 2.5]),
        ("widths", [[1]]),
        ("widths", {"a": 1}),
        ("pair", [1]),
        ("pair", [1, 2, 3]),
        ("maybe", 3),
        ("maybe", True),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got .*$"):
        checked_values(Sample, {name: value})
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        Sample(**{name: value})


def test_a_list_is_no_tuple_for_the_class_itself() -> None:
    with pytest.raises(ConfigError, match="widths"):
        Sample(widths=[1])  # type: ignore[arg-type]


def test_an_unknown_field_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'width': did you mean widths\?"):
        checked_values(Sample, {"width": 1})


def test_an_unknown_name_lists_few_names_and_counts_many() -> None:
    assert str(unknown_name("thing", "zzz", ["a", "b"])) == "unknown thing 'zzz': choose from a, b"
    assert "\n" not in str(unknown_name("thing", "zzz", [f"name{i}" for i in range(1000)]))
    assert len(str(unknown_name("thing", "zzz", [f"name{i}" for i in range(1000)]))) < 100


def test_ranges_refuse_not_a_number() -> None:
    check_range("x", 1, 0, 1)
    check_range("x", 10**9, 0)
    for value in (float("nan"), -1, 2):
        with pytest.raises(ConfigError, match="x must be from 0 to 1"):
            check_range("x", value, 0, 1)
    with pytest.raises(ConfigError, match="x must be at least 0"):
        check_range("x", float("nan"), 0)
