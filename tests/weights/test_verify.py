"""The comparison with the source's own framework: it agrees where it should, and finds what was changed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from keras_models import L, images, keras, narrow_trunk, normalised, randomised, save_bare_hdf5, save_quietly, tempered
from test_names_torch_modules import CadeneXception, detector, googlenet
from torch import nn
from torch_networks import foreign, randomise, saved

import xception
from xception.errors import ConfigError, WeightsError
from xception.weights.bundle import load_bundle, save_bundle
from xception.weights.convert import convert
from xception.weights.verify import TOLERANCE, check_verifiable, is_close, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras"),  # its own, of numpy
    pytest.mark.filterwarnings("ignore::DeprecationWarning:timm"),
]
SIZE = 48
KERAS = f"keras {keras.__version__}"


def verified(source: Path, *, trunk_only: bool = False, target: str = "m.safetensors") -> dict[str, Any]:
    """`source` converted and verified."""
    path = source.parent / target
    convert(source, path, trunk_only=trunk_only)
    found = verify(source, path)
    assert is_close(found), found
    assert found["compared"] == ("pooled features" if trunk_only else "logits")
    assert json.loads(json.dumps(found)) == found
    return found


# --------------------------------------------------------------------------------------------------------------- Keras


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return narrow_trunk(tmp_path_factory.mktemp("trunk"), entry_widths=(8,), middle_modules=1, exit_widths=(14, 18))


def adapted() -> Any:
    layer = L.Normalization()
    layer.adapt(images(8, (20, 20), seed=9).permute(0, 2, 3, 1).numpy())
    return layer


def average() -> Any:
    return L.GlobalAveragePooling2D()


Layers = Callable[[], list[Any]]
MODELS: dict[str, tuple[Layers, Layers]] = {  # before the trunk, and behind it
    "softmax": (list, lambda: [average(), L.Dense(4, activation="softmax")]),
    "sigmoid": (list, lambda: [L.GlobalMaxPooling2D(), L.Dense(1, activation="sigmoid")]),
    "numbers": (list, lambda: [average(), L.Dense(4)]),
    "hidden": (list, lambda: [average(), L.Dense(9, activation="elu"), L.Dropout(0.4), L.Dense(4), L.Softmax()]),
    "norm at the end": (list, lambda: [average(), L.Dense(4), L.BatchNormalization(), L.Activation("sigmoid")]),
    "idle at the end": (list, lambda: [average(), L.Dense(4, activation="softmax"), L.Dropout(0.1), L.Flatten()]),
    "rescaling": (
        lambda: [L.RandomFlip(), L.Rescaling(1 / 100, offset=-1.2)],
        lambda: [average(), L.Dense(4, activation="softmax")],
    ),
    "normalisation": (lambda: [adapted()], lambda: [average(), L.Dense(4, activation="softmax")]),
    "resizing": (
        lambda: [L.Resizing(40, 56), L.Rescaling(1 / 127.5, offset=-1)],
        lambda: [average(), L.Dense(4, activation="softmax")],
    ),
}


def model_of(trunk: Any, name: str, *, nested: bool) -> Any:
    front, head = (make() for make in MODELS[name])
    inputs = keras.Input((SIZE, SIZE, 3))
    if not nested:
        model = keras.Sequential([inputs, *front, trunk, *head])
    else:
        x = inputs
        for layer in (keras.Sequential(front, name="front") if front else None, trunk, *head):
            x = x if layer is None else layer(x)
        model = keras.Model(inputs, x)
    x = images(3, (SIZE, SIZE))
    return tempered(randomised(model, seed=1), x.float() if front else normalised(x))


@pytest.mark.parametrize("name", MODELS)
def test_whole_keras_models(trunk: Any, name: str, tmp_path: Path) -> None:
    for nested, ending in ((True, ".keras"), (False, ".h5")):
        save_quietly(model_of(trunk, name, nested=nested), tmp_path / f"m{ending}")
        found = verified((tmp_path / f"m{ending}").rename(tmp_path / "without an ending"))
        size = [40, 56] if name == "resizing" else [SIZE, SIZE]
        assert found["inputs"] == [2, 3, *size]
        assert found["framework"] == KERAS
        assert 0 < found["max_relative_difference"] < 1e-5


def test_a_keras_trunk_alone(trunk: Any, tmp_path: Path) -> None:
    """Whatever stands around it, as long as Keras itself has it."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = trunk(L.Rescaling(1 / 50)(inputs))
    save_quietly(keras.Model(inputs, L.Dense(3)(L.Conv1D(2, 2)(L.Reshape((2, -1))(x)))), tmp_path / "m.keras")
    found = verified(tmp_path / "m.keras", trunk_only=True)
    assert (found["inputs"], found["outputs"]) == ([2, 3, SIZE, SIZE], [2, 18])


def test_what_is_written_for_keras(trunk: Any, tmp_path: Path) -> None:
    """The target may be any file that can be read here, so also the way back."""
    save_quietly(model_of(trunk, "hidden", nested=True), tmp_path / "a.keras")
    for target in ("b.h5", "c.keras"):
        verified(tmp_path / "a.keras", target=target)
        verified(tmp_path / target)


def test_mixed_precision_is_compared_in_fp32(trunk: Any, tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((SIZE, SIZE, 3))
        x = L.Dense(6, activation="relu")(average()(trunk(inputs)))
        model = keras.Model(inputs, L.Dense(4, activation="softmax", dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    save_quietly(randomised(model, seed=2), tmp_path / "m.keras")
    assert verified(tmp_path / "m.keras")["max_relative_difference"] < 1e-5


def test_code_in_a_keras_file_is_not_run(trunk: Any, tmp_path: Path) -> None:
    """A trunk can be taken from beside a Lambda, but not verified: Keras runs one of an .h5 without asking."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = L.Lambda(lambda y: 2 * y)(average()(trunk(inputs)))
    for ending in ("keras", "h5"):
        save_quietly(keras.Model(inputs, L.Dense(3)(x)), tmp_path / f"m.{ending}")
        convert(tmp_path / f"m.{ending}", tmp_path / "m.safetensors", trunk_only=True)
        with pytest.raises(ConfigError, match=r"would have to run layer 'lambda\S*' of class Lambda, which is code"):
            verify(tmp_path / f"m.{ending}", tmp_path / "m.safetensors")


SLOW = pytest.mark.slow
BARE = [
    ("Xception", "flat", "m.weights.h5"),
    *(
        pytest.param(network, style, file, marks=SLOW)
        for network in ("Xception", "InceptionV3")
        for style in ("flat", "nested", "no top")
        for file in ("m.weights.h5", "m.h5")
        if (network, style, file) != ("Xception", "flat", "m.weights.h5")
    ),
]


@pytest.mark.parametrize(("network", "style", "file"), BARE)
def test_weights_alone_of_keras(
    network: str, style: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say nothing of the images' size; 96 pixels are quicker than 299."""
    if style != "nested":
        monkeypatch.setattr("xception.weights.keras_model.DEFAULT_SIZE", 96)
    keras.utils.clear_session(free_memory=False)
    options = {"classes": 7} if style == "flat" else {"include_top": False}
    make = getattr(keras.applications, network)
    model = randomised(make(weights=None, input_tensor=keras.Input((None, None, 3)), **options))
    if style == "nested":
        inputs = keras.Input((96, 96, 3))
        model = keras.Model(inputs, randomised(L.Dense(7))(average()(model(inputs))))
    if file == "m.weights.h5":
        model.save_weights(tmp_path / file)
    else:
        save_bare_hdf5(model, tmp_path / file)
    convert(tmp_path / file, tmp_path / "m.safetensors")
    found = verify(tmp_path / file, tmp_path / "m.safetensors")
    assert is_close(found)
    assert (found["inputs"][2], found["framework"]) == (299 if style == "nested" else 96, KERAS)
    assert (found["compared"], found["outputs"]) == (
        ("pooled features", [2, 2048]) if style == "no top" else ("logits", [2, 7])
    )
    if style == "flat" and file == "m.h5":
        verified(tmp_path / file, trunk_only=True)


def test_what_keras_cannot_run_is_one_line(trunk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_quietly(model_of(trunk, "numbers", nested=True), tmp_path / "m.keras")
    convert(tmp_path / "m.keras", tmp_path / "m.safetensors")

    def fail(*_: object, **__: object) -> None:
        raise TypeError("\n\nno such layer\nand more of it")

    monkeypatch.setattr(keras.models, "load_model", fail)
    with pytest.raises(ConfigError, match=rf"^keras \S+ cannot run {tmp_path}/m.keras: no such layer$"):
        verify(tmp_path / "m.keras", tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------------------------------- PyTorch


def small_googlenet(head: nn.Module | None = None) -> nn.Module:
    return googlenet(head)


def test_torchvision(tmp_path: Path) -> None:
    theirs = small_googlenet()
    found = verified(saved(tmp_path / "w", {"state_dict": nn.DataParallel(theirs).state_dict()}))
    assert found["framework"].startswith("torchvision 0.")
    assert (found["inputs"], found["outputs"]) == ([2, 3, 224, 224], [2, 4])
    headless = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    safetensors.torch.save_file(headless, tmp_path / "w")
    assert verified(tmp_path / "w", trunk_only=True)["outputs"] == [2, 1024]


def test_a_whole_modules_classifier(tmp_path: Path) -> None:
    """Its activations and what decides of them, in torch's own layers."""
    head = nn.Sequential(
        nn.ReLU(), nn.Linear(1024, 9), nn.Dropout(0.3), nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(9, 8)),
        nn.GELU(), nn.Flatten(), nn.Linear(8, 3), nn.Softmax(1),
    )  # fmt: skip
    assert verified(saved(tmp_path / "w", small_googlenet(head)))["outputs"] == [2, 3]


def test_faceforensics(tmp_path: Path) -> None:
    path = saved(tmp_path / "full_c23.p", detector(dropout=0.5), _use_new_zipfile_serialization=False)
    found = verified(path)
    assert (found["framework"], found["outputs"]) == (f"timm {timm.__version__}", [2, 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["timm xception41", "timm xception65p", "timm xception71", "timm inception_v3", "torchvision inception_v3"],
)
def test_other_families(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "w", foreign(name).state_dict())
    assert verified(path)["framework"].startswith(name.split()[0])
    verified(path, trunk_only=True)


@pytest.mark.slow
def test_variants_of_xception(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = randomise(CadeneXception(5), 64).state_dict()
    matrices = {name: t[:, :, 0, 0] if "pointwise" in name else t for name, t in state.items() if "batches" not in name}
    verified(saved(tmp_path / "w", matrices))
    pooled = timm.create_model("legacy_xception", num_classes=3, global_pool="max")
    verified(saved(tmp_path / "w", randomise(pooled, 64)))
    grey = timm.create_model("legacy_xception", num_classes=3, in_chans=1)
    assert verified(saved(tmp_path / "w", grey.eval().state_dict()))["inputs"] == [2, 1, 299, 299]
    padded: Any = foreign("timm legacy_xception")
    padded.conv1.padding = padded.conv2.padding = (1, 1)
    verified(saved(tmp_path / "w", padded))


# --------------------------------------------------------------------------------------------- what it is there to find


@pytest.fixture(scope="module")
def pair(trunk: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    save_quietly(model_of(trunk, "softmax", nested=True), folder / "m.keras")
    convert(folder / "m.keras", folder / "m.safetensors")
    return folder / "m.keras", folder / "m.safetensors"


def test_a_wrong_number_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = pair
    for name, change in (
        ("trunk", lambda t: t.add_(0.05)),
        ("bias", lambda t: t.mul_(1.01)),
        ("nan", lambda t: t.fill_(float("nan"))),
    ):
        model, info = load_bundle(target)
        tensors = dict(model.named_parameters())
        changed = next(iter(tensors)) if name == "trunk" else "classifier.linear.weight"
        with torch.no_grad():
            change(tensors[changed])
        save_bundle(tmp_path / "m.safetensors", model, info)
        found = verify(source, tmp_path / "m.safetensors")
        assert not is_close(found), name
        assert found["max_relative_difference"] > TOLERANCE
        json.dumps(found, allow_nan=False)


def test_another_network_is_an_error(pair: tuple[Path, Path], trunk: Any, tmp_path: Path) -> None:
    save_quietly(model_of(trunk, "sigmoid", nested=True), tmp_path / "other.keras")
    convert(tmp_path / "other.keras", tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"gives numbers of shape \(2, 4\), not \(2, 1\)"):
        verify(pair[0], tmp_path / "other.safetensors")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    state = {**small_googlenet().state_dict(), "fc.bias": torch.full((4,), float("nan"))}
    convert(saved(tmp_path / "w", state), tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"torchvision \S+ itself gives numbers that are not finite"):
        verify(tmp_path / "w", tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------------------------ before all else


def test_a_bundle_has_nothing_to_be_compared_with(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="is a bundle already: there is no other framework"):
        check_verifiable(pair[1], pair[0])


def test_the_source_must_still_be_there_afterwards(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "symbolic.keras").symlink_to(pair[0])
    os.link(pair[0], tmp_path / "hard.keras")
    for target in (pair[0], tmp_path / "symbolic.keras", tmp_path / "hard.keras"):
        with pytest.raises(ConfigError, match="give the target another name"):
            check_verifiable(pair[0], target)


@pytest.mark.parametrize("name", ["keras", "timm"])
def test_the_framework_must_be_there(pair: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pair[0] if name == "keras" else saved(pair[0].with_name("w.pth"), {"a": torch.ones(3)})
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None if asked == name else find(asked))
    with pytest.raises(ConfigError, match=rf"^--verify needs {name} \(pip install {name}\)$"):
        check_verifiable(source, "none.safetensors")
    with pytest.raises(ConfigError, match=f"--verify needs {name}"):
        verify(source, "none.safetensors")


def test_a_framework_that_does_not_import(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"cannot import {name}: another NumPy is needed")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ConfigError, match=r"^--verify cannot use what is installed: cannot import keras"):
        verify(*pair)


def test_keras_of_before_its_third_version(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old = type(sys)("keras")
    old.__version__ = "2.15.0"  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.import_module", lambda name: old)
    with pytest.raises(ConfigError, match=r"--verify needs Keras 3, found 2\.15\.0 \(pip install -U keras\)"):
        verify(*pair)


# ------------------------------------------------------------------------------------- no other framework but for this


def test_other_frameworks_are_imported_only_for_comparison() -> None:
    """By name in an import, or as text."""
    package = Path(xception.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            else:
                continue
            if {str(name).partition(".")[0] for name in names} & {"keras", "tensorflow", "tf_keras"}:
                found.add(path.relative_to(package).as_posix())
    systems = {"benchmark/systems/keras_models.py", "benchmark/systems/keras_training.py"}
    assert found == {"weights/verify_keras.py", *systems}


def in_a_process(code: str, *arguments: Path) -> str:
    """What it prints; it is without KERAS_BACKEND."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    command = [sys.executable, "-c", "import sys; " + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_they_are_imported_only_when_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert_it = "from xception.weights.convert import convert; convert(*sys.argv[1:]); "
    found = in_a_process(
        convert_it + "print({'keras', 'tensorflow', 'timm'} & set(sys.modules))", pair[0], tmp_path / "m.h5"
    )
    assert found == "set()\n"


@pytest.mark.slow
def test_keras_runs_on_what_is_installed(pair: tuple[Path, Path]) -> None:
    code = (
        "from xception.weights.verify import is_close, verify; print(is_close(verify(*sys.argv[1:])));"
        "import keras; print(keras.backend.backend())"
    )
    expected = "torch" if importlib.util.find_spec("tensorflow") is None else "tensorflow"
    assert in_a_process(code, *pair) == f"True\n{expected}\n"
