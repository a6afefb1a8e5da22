"""What runs a predictor's network: which engine and why, the same numbers from each, and what is said about speed."""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xception.cli.main import main
from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, MissingPackageError
from xception.inference.predictor import FailedImage, Prediction, Predictor, Timings
from xception.models.registry import config_to_dict, create_model, get_config
from xception.ops import backend as machine
from xception.ops.backend import use_backend
from xception.weights.bundle import BundleInfo, save_bundle

needs_native = pytest.mark.skipif(not machine.native_available(), reason="without the compiled extension")

OPTIONS: dict[str, Any] = {
    "num_classes": 5, "entry_widths": (24, 40, 56), "middle_modules": 1, "exit_widths": (70, 80, 90),
    "input_size": 75,
}  # fmt: skip


def _predictor(**options: Any) -> Predictor:
    return Predictor(*_network(), device="cpu", **options)


def _network(name: str = "xception", **changes: Any) -> tuple[nn.Module, BundleInfo]:
    torch.manual_seed(0)
    options = {**OPTIONS, **changes} if name == "xception" else changes
    model = create_model(name, **options).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    with torch.no_grad():  # logits far enough apart that scores are neither 0 nor 1, nor alike
        model.classifier.linear.weight.normal_()  # type: ignore[union-attr, operator]
        spread = model(torch.randn(8, 3, 75, 75)).std()
        model.classifier.linear.weight.div_(spread)  # type: ignore[union-attr, operator]
    info = BundleInfo(
        model=name,
        config=config_to_dict(get_config(name, **options)),
        class_names=tuple("abcde"[: options["num_classes"]]),
        multi_label=False,
        preprocess=Preprocess(size=(75, 75)),
    )
    return model, info


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for k in range(13):
        noise = np.random.default_rng(k).integers(0, 256, (5 + k, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80 + 7 * k, 90)).save(folder / f"{k:02}.png")
    return sorted(str(path) for path in folder.iterdir())


def _logits(predictor: Predictor, files: list[str], **options: Any) -> torch.Tensor:
    found = predictor.predict(files, logits=True, **options)
    return torch.tensor([prediction.logits for prediction in found], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- which, and why


@needs_native
def test_the_compiled_executor_where_it_covers_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = machine.describe()
    for precision in ("fp32", "bf16", "fp16"):
        engine = _predictor(precision=precision).engine
        kind, name, given = engine.split(", ")
        assert (kind, given) == ("native", precision)
        assert name == "scalar" or name in levels
    assert _predictor(backend="native").engine == _predictor().engine
    for level in machine.available_levels():
        if level in ("scalar", "avx2", "avx512"):
            monkeypatch.setenv(machine.CAP_VARIABLE, level)
            assert _predictor().engine == f"native, {level}, fp32"


@needs_native
def test_pytorch_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, reason = create_model("inception_v1", num_classes=5), "InceptionV1 is no Xception"
    _, info = _network()
    monkeypatch.setitem(sys.modules, "openvino", None)
    predictor = Predictor(model, info, device="cpu")
    assert predictor.engine == f"torch: {reason}; openvino is not installed"
    assert len(predictor.predict(np.zeros((9, 9, 3), np.uint8)).predictions) == 5
    with pytest.raises(ConfigError, match=reason):
        Predictor(model, info, backend="native")
    with pytest.raises(MissingPackageError) as error:
        Predictor(model, info, backend="openvino")
    assert str(error.value) == "the backend 'openvino' needs openvino: pip install 'xception[openvino]'"


def test_openvino_where_it_was_asked_for(files: list[str]) -> None:
    pytest.importorskip("openvino")
    predictor = _predictor(backend="openvino", num_threads=1)
    assert predictor.engine == "openvino, fp32: asked for"
    expected, found = (_logits(p, files) for p in (_predictor(backend="torch"), predictor))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_pytorch_where_it_was_asked_for(files: list[str]) -> None:
    model, info = _network()
    assert _predictor(backend="torch").engine == "torch: asked for"
    assert _predictor(backend="torch", precision="bf16").engine == "torch, bf16: asked for"
    with use_backend("reference"):
        chosen = Predictor(model, info, device="cpu")
        if machine.native_available():
            assert chosen.engine == "torch: the reference backend is chosen"
            assert Predictor(model, info, backend="native").engine.startswith("native, ")
    with torch.inference_mode():
        images = torch.stack([info.preprocess(np.asarray(Image.open(path))) for path in files])
        expected = model(images.to(memory_format=torch.channels_last)).double()
    assert torch.equal(_logits(chosen, files), expected)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_native", None)
    monkeypatch.setattr(machine, "_why_not_native", "the compiled extension is missing")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert _predictor().engine == "torch: the compiled extension is missing; openvino is not installed"
    with pytest.raises(ConfigError, match=r"compiled executor does not cover .*: the compiled extension is missing"):
        _predictor(backend="native")


def test_on_another_device() -> None:
    from xception.inference.runner import _why_torch

    model, info = _network()
    assert _why_torch(model, torch.device("cuda", 0), "auto") == "the device is cuda:0"
    if machine.native_available():
        assert Predictor(model, info, backend="native").device == torch.device("cpu")


def test_the_log_says_it_once(caplog: pytest.LogCaptureFixture, files: list[str]) -> None:
    with caplog.at_level(logging.INFO, logger="xception"):
        predictor = _predictor(backend="torch")
        predictor.predict(files[:2])
        predictor.predict(files[:2])
    assert [record.getMessage() for record in caplog.records] == ["xception: the network runs on torch: asked for"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_wrong_use(backend: str) -> None:
    for name, value, message in (
        ("precision", "int4", "precision must be one of fp32, bf16, fp16; got 'int4'"),
        ("backend", "gpu", "backend must be auto, native, openvino or torch; got 'gpu'"),
        ("num_threads", 0, "num_threads must be from 1 to 1024; got 0"),
        ("num_threads", 2.0, "num_threads must be from 1 to 1024; got 2.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            _predictor(**{"backend": backend, name: value})


# ------------------------------------------------------------------------------------------------- the numbers


@needs_native
def test_the_numbers_are_pytorchs(files: list[str]) -> None:
    expected = _logits(_predictor(backend="torch"), files)
    scale = float(expected.abs().max())
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 5e-2), ("fp16", 6e-3)):
        difference = (_logits(_predictor(precision=precision), files) - expected).abs().max()
        assert float(difference) < tolerance * scale
        in_torch = _logits(_predictor(precision=precision, backend="torch"), files)
        assert float((in_torch - expected).abs().max()) < 2 * tolerance * scale
    assert expected.softmax(1).std() > 0.05


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_numbers_depend_on_nothing_but_the_image(files: list[str], precision: Any) -> None:
    """To the last bit: batch size, neighbours, threads of the network and of decoding."""
    one = _predictor(precision=precision, num_threads=1)
    expected = {path: one.predict(path, top=5, logits=True) for path in files}
    assert len({prediction.logits for prediction in expected.values()}) == len(files)
    for threads in (1, 2, 3):
        predictor = _predictor(precision=precision, num_threads=threads)
        for batch_size in (1, 4, 32):
            shuffled = random.Random(batch_size).sample(files, len(files))
            listed = predictor.predict(shuffled, batch_size=batch_size, logits=True)
            streamed = predictor.predict_paths(shuffled, batch_size=batch_size, workers=threads, logits=True)
            assert listed == list(streamed) == [expected[path] for path in shuffled]


@needs_native
def test_other_threads_run_while_the_network_does() -> None:
    """Decoding goes on in Python meanwhile: the executor does not hold the interpreter's lock."""
    predictor = _predictor(num_threads=1)
    images = [torch.randint(0, 256, (3, 75, 75), dtype=torch.uint8)] * 8
    predictor._logits(images)
    begin = time.perf_counter()
    predictor._logits(images)
    images *= max(1, int(0.3 / (time.perf_counter() - begin)))
    moments: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            moments.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        predictor._logits(images)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    third = (end - begin) / 3
    assert sum(begin + third < moment < end - third for moment in moments) >= 3


def test_fast_decoding_is_off_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1000, 800), Image.Resampling.BICUBIC).save(path, quality=90)
    plain, fast = _predictor(), _predictor(fast_decode=True)
    assert (plain.fast_decode, fast.fast_decode) == (False, True)
    with Image.open(path) as image:
        decoded = np.asarray(image)
    expected = plain.predict(decoded, logits=True).logits
    assert plain.predict(path, logits=True).logits == expected
    assert fast.predict(decoded, logits=True).logits == expected
    found = [
        fast.predict(path, logits=True).logits,
        fast.predict(path.read_bytes(), logits=True).logits,
        next(p.logits for p in fast.predict_paths([path], logits=True) if isinstance(p, Prediction)),
    ]
    assert len(set(found)) == 1
    assert found[0] != expected
    assert np.abs(np.subtract(found[0], expected)).max() < 0.02 * np.abs(expected).max()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- time


def test_timings(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    paths = [*files, tmp_path / "bad.jpg", FailedImage("*.gif", "nothing matches this pattern")] * 10
    timings = Timings()
    begin = time.perf_counter()
    results = list(_predictor().predict_paths(paths, batch_size=4, workers=2, timings=timings))
    elapsed = time.perf_counter() - begin
    assert timings.images == len(results) == len(paths)
    assert timings.computed == sum(isinstance(result, Prediction) for result in results)
    assert timings.decoded == timings.computed + 10
    assert timings.workers == 2
    assert 0 < timings.network_seconds < timings.seconds <= elapsed
    assert 0 < timings.decoding_seconds < 2 * elapsed
    assert timings.decoding_rate == timings.decoded / timings.decoding_seconds
    assert timings.network_rate == timings.computed / timings.network_seconds


def test_which_is_the_slower() -> None:
    half = Timings(workers=2, decoded=10, decoding_seconds=1.0, computed=10, network_seconds=1.0)
    assert half.slower == "network"  # two threads decode 20 images/s
    half.network_seconds = 0.4
    assert half.slower == "decoding"
    nothing = Timings()
    assert (nothing.decoding_rate, nothing.network_rate, nothing.slower) == (None, None, None)


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    model, info = _network()
    save_bundle(path, model, info)
    return str(path)


def test_the_command_says_what_runs_and_how_fast(
    bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--json"], ["--csv"]):
        assert main(["predict", bundle, *files, "--device", "cpu", *options]) == 0
        out, err = capsys.readouterr()
        first, last = err.splitlines()
        assert first == f"xception: the network runs on {_predictor().engine}"
        assert last.startswith("xception: 13 images in ")
        assert " images/s a thread (" in last
        assert "network " in last
        assert last.endswith(("; the network is the slower", "; decoding is the slower"))
        lines = out.splitlines()
        if "--json" in options:
            assert [json.loads(line)["path"] for line in lines] == files
        else:
            assert len(lines) == (13 if not options else 1 + 13 * 5)


def test_the_command_with_one_image_or_none_good(
    bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", bundle, files[0], "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["predict", bundle, "missing.png", "gone.png", "--device", "cpu"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert "2 images in" in err[1]
    assert "network" not in err[1]
    assert err[2] == "xception: 2 of 2 images failed"


def test_the_command_takes_precision_threads_and_backend(
    bundle: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    openvino = [(["--backend", "openvino", "--threads", "1"], "openvino, fp32: asked for")]
    try:
        for options, engine in (
            *(openvino if find_spec("openvino") else ()),
            (["--backend", "torch", "--threads", "1"], "torch: asked for"),
            (["--precision", "bf16", "--threads", "2", "--fast-decode"], _predictor(precision="bf16").engine),
        ):
            assert main(["predict", bundle, *files[:2], "--json", "--device", "cpu", *options]) == 0
            out, err = capsys.readouterr()
            assert len(out.splitlines()) == 2
            assert f"the network runs on {engine}\n" in err
            assert torch.get_num_threads() == int(options[options.index("--threads") + 1])
    finally:
        torch.set_num_threads(threads)
    for options, message in (
        (["--threads", "0"], "--threads must be from 1 to 1024; got 0"),
        (["--precision", "int8"], "int8"),
        (["--backend", "gpu"], "gpu"),
    ):
        assert main(["predict", bundle, files[0], *options]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
