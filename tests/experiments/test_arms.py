"""The experiments themselves: arms that differ in what they should and cost what they should."""

from __future__ import annotations

from typing import Any

import pytest

from xception.errors import ConfigError
from xception.experiments.budgets import TOLERANCE, cost_of, fit, widths
from xception.experiments.catalog import EXPERIMENTS, find_experiment
from xception.experiments.experiment import SCALES, Experiment, ScaleName, Task
from xception.experiments.table3 import PAPER, conventions
from xception.experiments.trial import cost_of_arm, recipe_of
from xception.models import registry

TRAINED = [experiment for experiment in EXPERIMENTS.values() if isinstance(experiment, Experiment)]
TASK = Task(num_classes=10, channels=1, multi_label=False, fingerprint="x")
COMPOSITES = Task(num_classes=325, channels=1, multi_label=True, fingerprint="x")
IMAGENET = Task(num_classes=1000, channels=3, multi_label=False, fingerprint="x")


def task_of(experiment: Experiment, scale: ScaleName) -> Task:
    if experiment.figure == "map_at_100":
        return COMPOSITES
    return IMAGENET if scale == "paper" else TASK


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
@pytest.mark.parametrize("experiment", TRAINED, ids=lambda e: e.name)
def test_arms_can_be_built_and_trained_by_their_recipes(experiment: Experiment, scale: ScaleName) -> None:
    task = task_of(experiment, scale)
    arms = experiment.arms(scale, task)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names) >= 2
    described = [(arm.model, repr(sorted(arm.options.items(), key=str))) for arm in arms]
    assert len(set(described)) == len(described), "two arms are the same network"
    for arm in arms:
        config = registry.get_config(arm.model, **arm.options)
        recipe = recipe_of(arm, experiment.scales[scale], seed=3, epochs=None)
        assert recipe.seed == 3
        assert (recipe.input.image_size or config.input_size) >= config.minimum_size
        assert config.input_size == recipe.input.image_size
    for contrast in experiment.contrasts(scale, names):
        assert set(contrast.weights) <= set(names)
        assert sum(contrast.weights.values()) == pytest.approx(0)
    assert any(contrast.decides for contrast in experiment.contrasts(scale, names))
    axis = experiment.axis(scale, task)
    if axis is not None:
        assert {"1", "per-channel"} <= {arm for line in axis.lines.values() for _, arm in line}


@pytest.mark.parametrize("name", ["figure9", "figure10", "table1", "table2"])
def test_paper_scale_is_the_papers_network_and_recipe(name: str) -> None:
    experiment = find_experiment(name)
    assert isinstance(experiment, Experiment)
    arms = experiment.arms("paper", IMAGENET)
    xception = next(arm for arm in arms if arm.name in ("residual", "none", "xception"))
    assert cost_of_arm(xception, IMAGENET)[0] == 22_855_952
    assert experiment.scales["paper"].recipe == ("jft" if name == "table2" else "imagenet")
    assert experiment.scales["paper"].data is None
    if name.startswith("table"):  # section 4.4: another weight decay for Inception V3
        inception = next(arm for arm in arms if arm.name == "inception_v3")
        recipe = recipe_of(inception, experiment.scales["paper"], seed=0, epochs=None)
        assert recipe.optimizer.weight_decay == 4e-5


def test_the_spectrums_arms_cost_the_same() -> None:
    experiment = find_experiment("spectrum")
    assert isinstance(experiment, Experiment)
    costs = {arm.name: cost_of_arm(arm, TASK) for arm in experiment.arms("laptop", TASK)}
    assert {"1", "4", "16", "per-channel", "depthwise-first", "1-relu", "per-channel-relu"} <= set(costs)
    parameters, multiply_adds = costs["per-channel"]
    for name, (found, adds) in costs.items():
        if not name.endswith("-multiply-adds"):
            assert abs(found / parameters - 1) <= TOLERANCE, name
        if name.isdigit() and f"{name}-multiply-adds" not in costs:
            assert abs(adds / multiply_adds - 1) <= TOLERANCE, name


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_the_tables_designs_have_equal_budgets(name: str) -> None:
    experiment = find_experiment(name)
    assert isinstance(experiment, Experiment)
    task = task_of(experiment, "laptop")
    found = {arm.name: cost_of_arm(arm, task)[0] for arm in experiment.arms("laptop", task)}
    for arm, parameters in found.items():
        if not arm.endswith("_fc"):
            assert abs(parameters / found["xception"] - 1) <= TOLERANCE, arm


def test_a_budget_that_no_width_meets_is_refused() -> None:
    def options(multiple: float) -> dict[str, Any]:
        return {"entry_widths": widths((48, 96), multiple), "exit_widths": widths((128,), multiple)}

    budget = cost_of("xception_small", options(0.8), "multiply_adds")
    fitted = fit("xception_small", options, cost="multiply_adds", budget=budget)
    assert cost_of("xception_small", fitted, "multiply_adds") == pytest.approx(budget, rel=TOLERANCE)
    with pytest.raises(ConfigError, match="no width of xception_small has about 10 parameters; the nearest has"):
        fit("xception_small", options, cost="parameters", budget=10)
    with pytest.raises(ConfigError, match="no width of xception_small has about"):
        fit("xception_small", lambda multiple: {"entry_widths": (0, 0)}, cost="parameters", budget=1000)


def test_table_3_counts_are_the_papers_under_every_convention() -> None:
    for name, (parameters, _) in PAPER.items():
        assert conventions(name)["trainable"] == parameters
    assert conventions("xception") == {
        "trainable": 22_855_952,
        "with_statistics": 22_910_480,
        "trainable_without_head": 20_806_952,
        "with_statistics_without_head": 20_861_480,
    }
    assert conventions("inception_v1", auxiliary=False)["trainable"] == 6_998_552


def test_every_experiment_says_what_a_reader_needs() -> None:
    assert list(EXPERIMENTS) == ["table1", "table2", "table3", "figure9", "figure10", "spectrum"]
    for name, experiment in EXPERIMENTS.items():
        module = __import__(f"xception.experiments.{name}", fromlist=["x"])
        for scale in SCALES:
            assert f"xception reproduce {name} --scale {scale}" in module.__doc__
        assert "docs/reproduction.md" in module.__doc__
        assert all(len(row) == len(experiment.paper_head) for row in experiment.paper)
    with pytest.raises(ConfigError, match="unknown experiment 'figure8': did you mean figure9"):
        find_experiment("figure8")
