"""The recipes: what the paper states stands as it states it, and every field can be set."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from runs import TINY

from xception.cli.main import main
from xception.errors import ConfigError
from xception.training import prepare as prepare_module
from xception.training.recipe import (
    NAMED,
    flat_values,
    named_recipe,
    override,
    recipe_fields,
    recipe_to_dict,
)
from xception.training.step import step_config


def test_imagenet_is_as_published() -> None:
    """Section 4.3 and 4.4: SGD, momentum 0.9, 0.045, x0.94 every 2 epochs, decay 1e-5, dropout 0.5."""
    values = flat_values(named_recipe("imagenet"))
    expected = {
        "optimizer": "sgd", "momentum": 0.9, "nesterov": False, "learning_rate": 0.045, "schedule": "exponential",
        "decay_factor": 0.94, "decay_epochs": 2.0, "decay_samples": 0, "weight_decay": 1e-5, "dropout": 0.5,
        "loss": "softmax",
    }  # fmt: skip
    assert {k: values[k] for k in expected} == expected
    assert values["polyak_decay"] > 0


def test_jft_is_as_published() -> None:
    """Section 4.3 and 4.4: RMSprop, momentum 0.9, 0.001, x0.9 every 3,000,000 samples, no dropout, multi-label."""
    values = flat_values(named_recipe("jft"))
    expected = {
        "optimizer": "rmsprop", "momentum": 0.9, "learning_rate": 0.001, "schedule": "exponential",
        "decay_factor": 0.9, "decay_samples": 3_000_000, "weight_decay": 1e-5, "dropout": 0.0, "loss": "sigmoid",
    }  # fmt: skip
    assert {k: values[k] for k in expected} == expected


@pytest.mark.parametrize("recipe", ["imagenet", "jft"])
def test_inception_has_its_own_weight_decay(recipe: str) -> None:
    assert named_recipe(recipe, model="inception_v3").optimizer.weight_decay == 4e-5
    assert named_recipe(recipe, model="xception").optimizer.weight_decay == 1e-5


@pytest.mark.parametrize("name", NAMED)
def test_stated_fields_exist(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    assert set(recipe.stated) <= set(recipe_fields())
    assert bool(recipe.stated) == (name in ("imagenet", "jft"))


def test_every_field_can_be_overridden() -> None:
    recipe = named_recipe("small")
    for name, value in flat_values(recipe).items():
        assert override(recipe, **{name: value}) == recipe, name
    changed = override(recipe, epochs=3, learning_rate=1, mixup=0.2, image_size=64, random_resized_crop=[0.5, 1.0])
    values = flat_values(changed)
    assert (values["epochs"], values["learning_rate"], values["mixup"]) == (3, 1.0, 0.2)
    assert values["image_size"] == 64
    assert values["random_resized_crop"] == (0.5, 1.0)
    assert recipe == named_recipe("small"), "the original is frozen"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("epochs", True), ("batch_size", 0), ("accumulate", -1), ("seed", -1),
        ("dropout", 1.0), ("polyak_decay", 1.0), ("polyak_decay", float("nan")), ("learning_rate", 0.0),
        ("learning_rate", float("nan")), ("learning_rate", "fast"), ("momentum", 1.0), ("weight_decay", -1e-5),
        ("clip_norm", float("inf")), ("decay_factor", 0.0), ("decay_epochs", 0.0), ("label_smoothing", 1.0),
        ("val_fraction", 1.0), ("max_bad_share", 1.1), ("workers", -1), ("optimizer", "adam"), ("precision", "fp8"),
        ("image_size", 0), ("crop_fraction", 0.0), ("head_epochs", -1), ("norm_momentum", 0.0),
        ("head_epochs", 1.5), ("cache_features", 1),
        ("rho", -0.1), ("warmup_epochs", -1.0),
        ("trunk_factor", 2.0), ("checkpoint_minutes", 0.0), ("schedule", "linear"), ("class_weights", [1.0, 2.0]),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        override(named_recipe("small"), **{field: value})
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        override(named_recipe("small"), learning_rat=0.1)
    with pytest.raises(ConfigError, match="imagenet"):
        named_recipe("imagenets")


@pytest.mark.parametrize("name", NAMED)
def test_recipes_are_frozen_and_json_safe(name: str) -> None:
    recipe = named_recipe(name)
    json.dumps(recipe_to_dict(recipe), allow_nan=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 1  # type: ignore[misc]


def test_the_head_alone_is_trained_in_all_epochs_that_there_are() -> None:
    finetune, head = named_recipe("finetune"), named_recipe("head")
    assert 0 < finetune.head_only_epochs < finetune.epochs
    assert override(finetune, epochs=2).head_only_epochs == 2
    assert [override(head, epochs=n).head_only_epochs for n in (1, 30, 90)] == [1, 30, 90]
    assert named_recipe("small").head_only_epochs == 0
    assert not head.augment.changes_samples, "features of augmented images cannot be kept"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--random-resized-crop", "0.5"], "--random-resized-crop must be None or FLOAT FLOAT; got '0.5'"),
        (["--random-resized-crop", "0.5", "--epochs", "2"], "--random-resized-crop must be None or FLOAT FLOAT"),
        (["--head-epochs", "few"], "--head-epochs must be None or INT; got 'few'"),
    ],
)
def test_a_value_of_another_kind_on_the_command_line_is_one_plain_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["train", "digits", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert says in said
        assert len(said) < 120
        assert "[bold]" not in said


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, xception.training.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("fast", ["bf16", "fp32"])
def test_precision_auto_is_the_processors(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe stays as it was written, so that a run goes on where another processor resumes it."""
    monkeypatch.setattr(prepare_module, "fast_precision", lambda: fast)
    recipe = override(named_recipe("small"), precision="auto", epochs=1, image_size=8)
    plan = prepare_module.prepare("digits", recipe, model_options=TINY)
    assert plan.precision == fast
    assert plan.recipe.precision == "auto"
    assert step_config(plan).precision == fast
    for given in ("fp32", "bf16", "fp16"):
        assert dataclasses.replace(plan, recipe=override(recipe, precision=given)).precision == given
