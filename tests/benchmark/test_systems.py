"""Each system on a narrow network of 64 pixels: it loads our weights, gives our logits, and who does not is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xception.benchmark import inference
from xception.benchmark.case import ERROR_BOUNDS, Case, Loaded, Precision, System, Unsupported, Variant
from xception.benchmark.inference import Run, Settings, cases_of, missing
from xception.benchmark.session import Failed, LeftOut, Process, Session, Visit
from xception.benchmark.systems import ALL_SYSTEMS, MACHINE, SYSTEMS
from xception.benchmark.worker import relative_error, run
from xception.errors import ConfigError
from xception.inference.signal_stack import kept_signal_stack
from xception.ops.backend import native_available

NARROW: dict[str, Any] = {
    "entry_widths": (24, 40, 56), "middle_modules": 1, "exit_widths": (64, 72, 80), "num_classes": 7,
}  # fmt: skip
SIZE = 64


def case_of(system: str, variant: str, **changed: Any) -> Case:
    about: dict[str, Any] = {
        "precision": "fp32", "mode": "throughput", "model": "xception", "batch": 2, "size": SIZE, "threads": 1,
    }  # fmt: skip
    return Case(system=system, variant=variant, **{**about, **changed})


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Here systems run in the tests' own process, which goes on to other tests."""
    with kept_signal_stack():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrow networks in the files of every system that is installed."""
    from xception.benchmark.networks import Work, write_work

    root = tmp_path_factory.mktemp("networks")
    for model, names in (("xception", ["xception", "timm", "onnxruntime"]), ("xception_tf", ["xception", "keras"])):
        there = [SYSTEMS[name] for name in names if name not in missing([name])]
        files = {file for system in there for part in (system, *system.variants) for file in part.files}
        write_work(Work(model=model, batch=2, size=SIZE, options=NARROW), root / model, files)
    return root


def error_of(case: Case, folder: Path) -> float:
    system = ALL_SYSTEMS[case.system]
    for package in (*system.needs, *system.exports):
        pytest.importorskip(package)
    images = np.load(folder / case.model / "images.npy")[: case.batch]
    try:
        loaded = system.load(case, folder / case.model, images)
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert loaded.logits is not None
    assert run(loaded, seconds=0.01, typical=False) > 0
    return relative_error(loaded.logits(loaded.call()), np.load(folder / case.model / "expected.npy")[: case.batch])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["throughput", "latency"])
@pytest.mark.native
def test_ours(folder: Path, precision: str, mode: str) -> None:
    pytest.importorskip("xception._native")
    case = case_of("xception", "compiled", precision=precision, mode=mode)
    assert error_of(case, folder) < ERROR_BOUNDS[case.precision] / 4


@pytest.mark.parametrize("variant", ["eager", "channels-last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_timm(folder: Path, variant: str, precision: str) -> None:
    case = case_of("timm", variant, precision=precision)
    assert error_of(case, folder) < ERROR_BOUNDS[case.precision] / 2


def test_timm_with_all_its_weights(tmp_path: Path) -> None:
    from xception.benchmark.networks import TIMM, Work, write_work

    pytest.importorskip("timm")
    write_work(Work(model="xception", batch=1, size=71), tmp_path / "xception", {TIMM})
    assert error_of(case_of("timm", "eager", batch=1, size=71), tmp_path) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_runtime(folder: Path, precision: str) -> None:
    case = case_of("onnxruntime", "cpu", precision=precision)
    assert error_of(case, folder) < ERROR_BOUNDS[case.precision] / 2


@pytest.mark.parametrize("variant", ["async", "async-batch", "sync"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_openvino(folder: Path, variant: str, precision: str) -> None:
    pytest.importorskip("onnxruntime")  # for whose tests the files were written
    case = case_of("openvino", variant, precision=precision)
    assert error_of(case, folder) < ERROR_BOUNDS[case.precision] / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_keras(folder: Path, precision: str) -> None:
    """In a process of its own, since Keras has one backend a process."""
    if missing(["keras"]).get("keras"):
        pytest.skip("keras is not installed")
    case = case_of("keras", "torch", precision=precision, model="xception_tf")
    session = Process(case, folder / case.model, SYSTEMS["keras"].environment(case))
    try:
        assert session.logit_error is not None
        assert session.logit_error < ERROR_BOUNDS[case.precision] / 2
        visit = session.visit(0.01)
        assert visit.rate > 0
        assert visit.peak_memory_mb > 0 or sys.platform != "linux"
    finally:
        session.close()
        session.close()


@pytest.mark.slow
@pytest.mark.parametrize(("system", "precision"), [("timm", "fp32"), ("timm", "bf16"), ("torchao", "int8")])
def test_compiled_by_inductor(folder: Path, system: str, precision: str) -> None:
    case = case_of(system, "compiled", precision=precision)
    for package in SYSTEMS[system].needs:
        pytest.importorskip(package)
    session = Process(case, folder / case.model, SYSTEMS[system].environment(case))
    try:
        assert session.logit_error is not None
        assert session.logit_error < ERROR_BOUNDS[case.precision]
    finally:
        session.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_peak_is_that_of_a_matrix_product(precision: Precision) -> None:
    case = case_of(MACHINE, "matrix product", precision=precision)
    if precision == "int8" and not native_available():
        with pytest.raises(Unsupported, match="without the compiled extension"):
            ALL_SYSTEMS[MACHINE].load(case, Path(), np.zeros(1))
        return
    assert run(ALL_SYSTEMS[MACHINE].load(case, Path(), np.zeros(1)), seconds=0.01, typical=True) > 0


# ---------------------------------------------------------------------------------------------- agreement and failure


def test_errors_of_logits() -> None:
    expected = np.array([[3.0, 4.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(np.array([[3.0, 4.5]]), expected) == pytest.approx(0.1)
    assert relative_error(np.array([[3.0, np.nan]]), expected) == float("inf")
    assert relative_error(np.array([3.0, 4.0]), expected) == float("inf")


class Fake:
    """A session of a system that answers `error` and takes a tenth of a second."""

    timed: list[Case]

    def __init__(self, case: Case, error: float | None, fails: bool = False) -> None:
        self.case, self.logit_error, self.fails, self.closed = case, error, fails, False

    def visit(self, seconds: float) -> Visit:
        if self.fails:
            raise Failed("its process stopped by SIGILL")
        Fake.timed.append(self.case)
        return Visit(rate=20.0 if self.case.system == "xception" else 10.0, peak_memory_mb=1.0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run_of_fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose systems answer as given, {system: error, or an exception}; returns it with what it said and told."""
    from xception.benchmark.networks import Work

    monkeypatch.setattr(inference, "installed", lambda package: package != "tensorflow")
    monkeypatch.setattr(Run, "_write", lambda self, cases, root: {
        case.model: Work(model=case.model, batch=2, size=SIZE, options=NARROW) for case in cases
    })  # fmt: skip
    Fake.timed = []

    def make(answers: dict[str, Any]) -> tuple[Run, list[dict[str, Any]], list[str]]:
        def start(case: Case, folder: Path, environment: dict[str, str]) -> Session:
            answer = answers.get(case.system, 0.0)
            if isinstance(answer, Exception):
                raise answer
            return Fake(case, None if case.system == MACHINE else answer, fails=answer == -1)

        told: list[dict[str, Any]] = []
        said: list[str] = []
        settings = Settings(
            threads=1, rounds=3, batch=2, size=SIZE, systems=("xception", "timm", "onnxruntime"), precisions=("fp32",),
            modes=("throughput",),
        )  # fmt: skip
        return Run(settings=settings, tell=told.append, say=said.append, start=start), told, said

    return make


def test_a_peer_that_disagrees_is_refused_and_not_timed(run_of_fakes: Any) -> None:
    run, told, said = run_of_fakes({"onnxruntime": 0.5})
    lines = run()
    assert lines == told
    assert run.failed == 1
    (wrong,) = [line for line in lines if line["system"] == "onnxruntime"]
    assert "its logits differ by 0.5" in wrong["error"]
    assert any(message.startswith("error: onnxruntime cpu, fp32") for message in said)
    assert {case.system for case in Fake.timed} == {"xception", "timm", MACHINE}
    (ours,) = [line for line in lines if line["system"] == "xception"]
    assert ours["ratio_to_best_peer"] == 2.0
    assert ours["best_peer"].startswith("timm ")
    assert ours["rounds"] == 3


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_peer_of_no_numbers_is_refused(run_of_fakes: Any, error: float) -> None:
    run, _, _ = run_of_fakes({"onnxruntime": error})
    assert [line["system"] for line in run() if "error" in line] == ["onnxruntime"]


def test_a_peer_that_does_not_load_or_crashes_ends_nothing(run_of_fakes: Any) -> None:
    run, _, _ = run_of_fakes({"onnxruntime": Failed("no such file"), "timm": -1})
    lines = run()
    assert {line["system"]: line["error"] for line in lines if "error" in line} == {
        "onnxruntime": "no such file",
        "timm": "its process stopped by SIGILL",
    }
    (ours,) = [line for line in lines if line["system"] == "xception"]
    assert ours["ratio_to_best_peer"] is None


def test_a_variant_that_cannot_run_here_is_named_and_no_failure(run_of_fakes: Any) -> None:
    run, told, said = run_of_fakes({"timm": LeftOut("no such processor")})
    run()
    assert run.failed == 0
    assert not [line for line in told if line["system"] == "timm"]
    assert "left out: timm eager, fp32, throughput, xception: no such processor" in said


def test_what_is_not_installed_is_named(run_of_fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "installed", lambda package: package not in ("onnxruntime", "timm", "tensorflow"))
    run, told, said = run_of_fakes({})
    run()
    assert "not installed: onnxruntime (it needs onnxruntime)" in said
    assert "not installed: timm (it needs timm)" in said
    assert {line["system"] for line in told} == {"xception"}
    assert missing(["keras"]) == {f"keras tensorflow, {kind}": "tensorflow" for kind in ("fp32", "bf16")}


def test_a_process_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images.npy").write_bytes(b"no array")
    with pytest.raises(Failed, match=r"Error|allow_pickle"):
        Process(case_of("xception", "compiled"), tmp_path, {})
    with pytest.raises(Failed, match="ended with status"):
        Process(case_of("xception", "compiled"), tmp_path, {"PYTHONHOME": "/nowhere"})


# ----------------------------------------------------------------------------------------------------- what is measured


def test_keras_and_tensorflow_padding_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "installed", lambda package: True)
    cases = cases_of(Settings(threads=1), ["fp32"], "throughput")
    assert {case.system for case in cases if case.model == "xception_tf"} == {"xception", "keras"}
    assert {case.system for case in cases if case.model == "xception"} >= {"xception", "timm", "openvino"}
    latency = cases_of(Settings(threads=1, models=("inception_v3",)), ["bf16"], "latency")
    assert {case.system for case in latency} == {"timm", "openvino", MACHINE}
    assert {case.batch for case in latency} == {1}


def test_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "installed", lambda package: False)
    assert cases_of(Settings(threads=1), ["fp32"], "throughput") == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"models": ("xcepton",)}, "did you mean xception"),
        ({"models": ()}, "at least one model"),
        ({"systems": ("openvin",)}, "did you mean openvino"),
        ({"precisions": ("fp8",)}, "unknown precision"),
        ({"modes": ("both",)}, "unknown mode"),
        ({"batch": 0}, "batch must be from 1"),
        ({"rounds": 1.5}, "rounds must be from 1"),
        ({"threads": 0}, "threads must be from 1"),
        ({"seconds": 0}, "seconds must be more than 0"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings(**{"threads": 1, **wrong})


def test_systems_and_variants_have_names_of_their_own() -> None:
    for name, system in ALL_SYSTEMS.items():
        assert isinstance(system, System)
        assert system.name == name
        known = [(variant.name, variant.precision) for variant in system.variants]
        assert len(set(known)) == len(known)
        assert all(isinstance(variant, Variant) and variant.modes for variant in system.variants)
    assert Loaded(call=lambda: None, logits=None, images=1).images == 1
