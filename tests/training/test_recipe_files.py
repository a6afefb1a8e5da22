"""Recipes in JSON files: what a run folder or a search left can be trained with again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xception.cli.main import main
from xception.errors import ConfigError
from xception.training.recipe import NAMED, find_recipe, override, read_recipe, recipe_from_dict, recipe_to_dict


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_recipe_survives_a_file(name: str, wrapped: bool, tmp_path: Path) -> None:
    recipe = override(NAMED[name], learning_rate=0.0123, epochs=7, random_resized_crop=(0.5, 0.9))
    values: dict[str, Any] = recipe_to_dict(recipe)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"recipe": values, "run": {}} if wrapped else values))
    assert read_recipe(str(path)) == recipe
    assert find_recipe(str(path), model="xception41").model == "xception41"
    assert find_recipe(name) == NAMED[name]


def test_missing_fields_keep_the_named_recipes_values() -> None:
    recipe = recipe_from_dict({"name": "imagenet", "optimizer": {"learning_rate": 0.1}})
    assert recipe == override(NAMED["imagenet"], learning_rate=0.1)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "expected a recipe as JSON"),
        ("[1]", "expected a recipe as JSON"),
        ("{}", "expected a recipe as JSON"),
        ("[" * 100_000, "expected a recipe as JSON"),
        ('{"name": "small", "epoch": 3}', "unknown recipe field 'epoch'"),
        ('{"name": "small", "epochs": "3"}', "epochs must be int; got '3'"),
        ('{"name": "small", "optimizer": 3}', "optimizer must hold fields; got 3"),
        ('{"name": "small", "optimizer": {"learning_rate": -1}}', "learning_rate must be a finite number above 0"),
        ('{"name": "small", "optimizer": {"rate": 1}}', "unknown recipe field 'rate'"),
    ],
)
def test_other_files_are_refused_in_one_line(content: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=match) as refused:
        read_recipe(str(path))
    assert "\n" not in str(refused.value)


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipe_to_dict(override(NAMED["small"], epochs=3, batch_size=32))))
    assert main(["train", "digits", "--recipe", str(path), "--epochs", "4", "--image-size", "8", "--dry-run", "--json",
                 "--model-option", "middle_modules=1"]) == 0  # fmt: skip
    fields = json.loads(capsys.readouterr().out)["fields"]
    assert (fields["epochs"]["value"], fields["batch_size"]["value"]) == (4, 32)
    assert main(["train", "digits", "--recipe", str(tmp_path / "none.json"), "--dry-run"]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
