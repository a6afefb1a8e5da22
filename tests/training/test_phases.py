"""What learns when, and at which rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from runs import TINY

from xception.training import features as features_module
from xception.training import memory as memory_module
from xception.training.dry_run import passes
from xception.training.memory import machine_bytes
from xception.training.phases import Phase, learning_rate
from xception.training.prepare import Plan, prepare
from xception.training.recipe import Recipe, named_recipe, override


class TenBatches:
    """A phase with a loader of ten batches."""

    batch_size = 8
    loader = property(lambda self: self)

    def __len__(self) -> int:
        return 10


def rates(recipe: Recipe) -> list[float]:
    phase = cast(Phase, TenBatches())
    return [learning_rate(recipe, phase, epoch=e, batches=b) for e in range(recipe.epochs) for b in range(10)]


def test_the_schedule_begins_after_the_heads_own_epochs() -> None:
    recipe = override(named_recipe("finetune"), epochs=6, head_epochs=2, warmup_epochs=0.5, learning_rate=0.5)
    found = rates(recipe)
    assert set(found[:20]) == {0.5}
    assert found[20] < 0.01, "warm-up"
    assert found[20:] == rates(override(recipe, epochs=4, head_epochs=0))


@pytest.mark.parametrize("head_epochs", [None, 6, 9])
def test_where_nothing_comes_after_them_it_is_theirs(head_epochs: int | None) -> None:
    recipe = override(named_recipe("head"), epochs=6, head_epochs=head_epochs)
    found = rates(recipe)
    assert found[0] == 1e-3
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-5
    assert found == rates(override(recipe, head_epochs=0))


def plan(recipe: str, **fields: Any) -> Plan:
    options = {"batch_size": 64, "image_size": 8, "val_fraction": 0.1, **fields}
    return prepare("digits", override(named_recipe(recipe), **options), model_options=TINY)


def test_a_dry_run_counts_what_goes_through_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of what it measures: a forward pass where no other is made, else a whole step."""
    train, val = 1437 // 64 * 64, 180
    model = plan("small").build_model()

    def expected(**fields: Any) -> float:
        return passes(plan("small", **fields), model, 64)

    assert expected(epochs=4) == pytest.approx(4 * (train + val / 3))
    assert expected(epochs=4, head_epochs=None) == train + val
    assert expected(epochs=4, head_epochs=None, cache_features=False) == 4 * (train + val)
    assert expected(epochs=4, head_epochs=3) == pytest.approx((train + val) / 3 + train + val / 3)
    monkeypatch.setattr(features_module, "MAX_BYTES", 0)
    assert expected(epochs=4, head_epochs=3) == pytest.approx(3 * (train + val) / 3 + train + val / 3)


def test_the_memory_that_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory_module, "_CONTAINER_LIMIT", limit)
    whole = machine_bytes()
    assert whole > 2**28
    for text, expected in (("max\n", whole), ("1000000\n", 1_000_000), (f"{2 * whole}\n", whole)):
        limit.write_text(text)
        assert machine_bytes() == expected
