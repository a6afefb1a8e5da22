"""Training: every system makes the same first steps on a narrow network, and who does not is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xception.benchmark import inference, training
from xception.benchmark.case import PARTS, TRAINING_BOUNDS, Case, Loaded, Unsupported
from xception.benchmark.inference import cases_of, missing
from xception.benchmark.scaling import points
from xception.benchmark.session import Process, Session, Visit
from xception.benchmark.systems import MACHINE, TRAINING_SYSTEMS
from xception.benchmark.worker import largest_error
from xception.errors import ConfigError

NARROW: dict[str, Any] = {
    "entry_widths": (24, 40, 56), "middle_modules": 1, "exit_widths": (64, 72, 80), "num_classes": 7,
}  # fmt: skip
SIZE, BATCH = 96, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrow networks, a batch, and what the first steps must give."""
    from xception.benchmark.networks import Work

    root = tmp_path_factory.mktemp("training")
    run = training.Run(settings=training.Settings(threads=1), tell=lambda line: None)
    for model, names in (("xception", ["xception", "timm"]), ("xception_tf", ["xception", "keras"])):
        files = {f for name in names if not missing([name], "training").get(name) for f in TRAINING_SYSTEMS[name].files}
        run.write(Work(model=model, batch=BATCH, size=SIZE, options=NARROW), root / model, files)
    return root


def case_of(system: str, variant: str, **changed: Any) -> Case:
    about: dict[str, Any] = {
        "precision": "fp32", "mode": "training", "model": "xception", "batch": BATCH, "size": SIZE, "threads": 1,
    }  # fmt: skip
    return Case(system=system, variant=variant, **{**about, **changed})


def load(case: Case, folder: Path) -> Loaded:
    system = TRAINING_SYSTEMS[case.system]
    for package in system.needs:
        pytest.importorskip(package)
    try:
        return system.load(case, folder, np.load(folder / "pixels.npy"))
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _backend_as_it_was() -> Any:
    from xception.ops import backend

    before = backend._process_choice
    yield
    backend.set_backend(before)


@pytest.mark.parametrize(
    ("system", "variant"),
    [("xception", "native"), ("xception", "reference"), ("timm", "eager"), ("timm", "channels-last")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_steps_agree_and_parts_make_the_whole(folder: Path, system: str, variant: str, precision: str) -> None:
    case = case_of(system, variant, precision=precision)
    loaded = load(case, folder / "xception")
    assert loaded.logits is not None
    expected = np.load(folder / "xception" / "steps.npy")
    assert largest_error(loaded.logits(loaded.call()), expected) < TRAINING_BOUNDS[case.precision]
    assert loaded.rate is not None
    assert loaded.shares is not None
    sums = []
    for _ in range(5):  # another process may come between two parts
        assert loaded.rate(0.01) > 0
        shares = loaded.shares()
        assert list(shares) == list(PARTS)
        assert all(share > 0 for share in shares.values())
        sums.append(sum(shares.values()))
        if sums[-1] > 0.9:
            break
    assert 0.9 < max(sums) <= 1


def test_the_second_loss_shows_whether_weights_were_changed(folder: Path) -> None:
    """Else a system that skips the update would pass, and look fast."""
    first, _, second = np.load(folder / "xception" / "steps.npy")
    assert abs(second - first) / first > 2 * TRAINING_BOUNDS["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_keras_in_its_process(folder: Path, precision: str) -> None:
    if missing(["keras"], "training").get("keras"):
        pytest.skip("keras is not installed")
    case = case_of("keras", "torch", precision=precision, model="xception_tf")
    session = Process(case, folder / "xception_tf", TRAINING_SYSTEMS["keras"].environment(case))
    try:
        assert session.logit_error is not None
        assert session.logit_error < TRAINING_BOUNDS[case.precision]
        visit = session.visit(0.01)
        assert visit.rate > 0
        assert set(visit.shares) == set(PARTS)
    finally:
        session.close()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["eager", "channels-last", "compiled"])
@pytest.mark.parametrize("system", ["timm", "torchvision"])
def test_inception_v3(tmp_path: Path, system: str, variant: str) -> None:
    """At a size at which its last maps are large enough for batch normalisation to be well conditioned."""
    from xception.benchmark.networks import Work

    pytest.importorskip("timm")
    run = training.Run(settings=training.Settings(threads=1), tell=lambda line: None)
    run.write(Work(model="inception_v3", batch=4, size=299), tmp_path, {"timm.safetensors"})
    case = case_of(system, variant, model="inception_v3", batch=4, size=299)
    session = Process(case, tmp_path, TRAINING_SYSTEMS[system].environment(case))
    try:
        assert session.logit_error is not None
        assert session.logit_error < TRAINING_BOUNDS["fp32"]
    finally:
        session.close()


def test_the_largest_of_several_errors() -> None:
    expected = np.array([2.0, 10.0, 4.0])
    assert largest_error(expected, expected) == 0
    assert largest_error(np.array([2.0, 10.0, 5.0]), expected) == pytest.approx(0.25)
    assert largest_error(np.array([2.0, np.nan, 4.0]), expected) == float("inf")
    assert largest_error(np.array([2.0, 10.0]), expected) == float("inf")


# ---------------------------------------------------------------------------------------------------- whole runs, faked


class Fake:
    """A session whose steps are divided as given."""

    def __init__(self, case: Case, folder: Path, environment: dict[str, str]) -> None:
        self.case = case
        self.logit_error = None if case.system == MACHINE else 0.5 if case.variant == "eager" else 1e-4

    def visit(self, seconds: float) -> Visit:
        shares = {} if self.case.system == "keras" else {"data": 0.1, "forward": 0.3, "backward": 0.5, "optimiser": 0.1}
        return Visit(rate=4.0 if self.case.system == "xception" else 2.0, peak_memory_mb=1.0, shares=shares)  # type: ignore[arg-type]

    def close(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> training.Run:
    from xception.benchmark.networks import Work

    def works(self: Any, cases: list[Case], root: Path) -> dict[str, Work]:
        return {case.model: Work(model=case.model, batch=case.batch, size=SIZE, options=NARROW) for case in cases}

    monkeypatch.setattr(inference.Run, "_write", works)
    monkeypatch.setattr(inference, "installed", lambda package: package != "torchvision")

    def start(case: Case, folder: Path, environment: dict[str, str]) -> Session:
        return Fake(case, folder, environment)

    settings = training.Settings(threads=1, rounds=2, batch=3, size=SIZE, precisions=("fp32",))
    return training.Run(settings=settings, tell=lambda line: None, start=start)


def test_lines_have_the_shares_and_the_ratio(run: training.Run) -> None:
    said: list[str] = []
    run.say = said.append
    lines = run()
    ours = [line for line in lines if line["system"] == "xception"]
    assert {(line["variant"], line["model"]) for line in ours} == {
        (variant, model) for variant in ("native", "reference") for model in ("xception", "xception_tf")
    }
    for line in ours:
        assert line["mode"] == "training"
        assert line["ratio_to_best_peer"] == 2.0
        assert line["latency_ms"] == 750.0  # of a step of three images
        assert [line[f"{part}_share"] for part in PARTS] == [0.1, 0.3, 0.5, 0.1]
        assert line["fraction_of_peak"] > 0
    keras = [line for line in lines if line["system"] == "keras"]
    assert {line["model"] for line in keras} == {"xception_tf"}
    assert all(line["forward_share"] is None for line in keras)
    assert "not installed: torchvision (it needs torchvision)" in said


def test_a_peer_whose_steps_differ_is_refused(run: training.Run) -> None:
    wrong = [line for line in run() if "error" in line]
    assert [(line["system"], line["variant"]) for line in wrong] == [("timm", "eager")]
    assert "its loss or gradient differ by 0.5 of theirs, at most 0.005" in wrong[0]["error"]
    assert run.failed == 1


def test_scaling_stays_with_training() -> None:
    settings = training.Settings(threads=2, batch=8)
    ours = {"system": "xception", "variant": "native", "precision": "bf16", "model": "xception"}
    found = list(points(settings, [{**ours, "best_peer": "timm compiled, bf16"}]))
    assert {axis for axis, _, _ in found} == {"batch", "size", "threads"}
    for _, changed, chosen in found:
        assert replace(settings, **changed).modes == ("training",)
        assert chosen == {("xception", "native", "bf16"), ("timm", "compiled", "bf16")}


def test_table_3_is_measured_in_torchvision_and_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "installed", lambda package: True)
    settings = training.Settings(threads=1, models=("inception_v3",))
    assert {case.system for case in cases_of(settings, ["fp32"], "training")} == {"timm", "torchvision", MACHINE}
    settings = training.Settings(threads=1)
    cases = cases_of(settings, ["bf16"], "training")
    assert {case.system for case in cases} == {"xception", "timm", "keras", MACHINE}
    assert {case.batch for case in cases if case.system != MACHINE} == {16}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"modes": ("throughput",)}, "unknown mode"),
        ({"precisions": ("int8",)}, "unknown precision"),
        ({"systems": ("openvino",)}, "unknown system"),
        ({"batch": 0}, "batch must be from 1"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        training.Settings(**{"threads": 1, **wrong})
