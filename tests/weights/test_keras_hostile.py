"""Hostile Keras files: each one clear error, quickly; no code is run, no other file opened, no memory taken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_hdf5
import hostile_keras
import pytest
import torch
from hostile_keras import Case
from keras_networks import NARROW, info_of, our_network

from xception.errors import WeightsError
from xception.weights.foreign import import_tensors
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras
from xception.weights.keras_write import write_keras


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine narrow network as `model.keras`, without our own notes in it, and as `model.h5`."""
    folder = tmp_path_factory.mktemp("hostile")
    model = our_network(**NARROW)
    for name, kind in (("model.keras", "keras"), ("model.h5", "keras-h5")):
        write_keras(folder / name, model, info_of(model), kind)
    members = hostile_keras.unzipped((folder / "model.keras").read_bytes())
    (folder / "model.keras").write_bytes(hostile_keras.zipped(list({**members, "metadata.json": b"{}"}.items())))
    return folder


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Everything that happens to a file: opened, understood, and read."""
    file = read_keras_file(path)
    found = recognise_keras(file)
    assert found is not None
    return import_tensors(file, found)[0].state_dict()


def hdf5_cases(data: bytes, secret: Path) -> Iterator[Case]:
    yield from hostile_hdf5.hostile_links(data)
    yield from hostile_hdf5.hostile_storage(data, secret)
    yield from hostile_hdf5.hostile_types(data)
    yield from hostile_hdf5.hostile_attributes(data)
    yield from hostile_hdf5.hostile_structure(data)
    yield from hostile_hdf5.truncations(data, 30)


def hdf5_in_archives(data: bytes, secret: Path) -> Iterator[Case]:
    """Some of the hostile HDF5 files where Keras would not look twice: inside an archive."""
    members = hostile_keras.unzipped(data)

    def packed(weights: bytes) -> bytes:
        return hostile_keras.zipped(list({**members, "model.weights.h5": weights}.items()))

    for what, bad, expected in hostile_hdf5.hostile_links(hostile_keras.hdf5_like_the_other(members)):
        if "link" in what or "cycle" in what:
            yield f"{what}, in an archive", packed(bad), expected
    yield "an archive in an archive", packed(data), "no HDF5 file"


MAKERS: dict[str, tuple[str, Callable[[bytes, Path], Iterator[Case]]]] = {
    "archives": ("model.keras", lambda data, secret: hostile_keras.hostile_archives(data)),
    "descriptions": ("model.keras", lambda data, secret: hostile_keras.hostile_descriptions(data)),
    "hdf5": ("model.h5", hdf5_cases),
    "hdf5 in archives": ("model.keras", hdf5_in_archives),
}


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, list[Case]]:
    return {kind: list(make((folder / name).read_bytes(), folder / "secret")) for kind, (name, make) in MAKERS.items()}


def test_the_originals_are_read(folder: Path) -> None:
    """Else the tests below would prove nothing."""
    expected = our_network(**NARROW).state_dict()
    for name in ("model.keras", "model.h5"):
        found = read_all(folder / name)
        assert all(torch.equal(found[key], value) for key, value in expected.items() if "batches" not in key)


@pytest.mark.parametrize("kind", MAKERS)
def test_hostile(cases: dict[str, list[Case]], tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad"
    for what, data, expected in cases[kind]:
        bad.write_bytes(data)
        start = time.perf_counter()
        with pytest.raises(WeightsError) as error:
            read_all(bad)
        message = str(error.value)
        # What `import_tensors` finds is given the file's name by its callers.
        assert message.startswith((f"cannot load {bad}: ", "keras: tensor", "keras-h5: tensor")), (what, message)
        assert expected in message, (what, message)
        assert message.isprintable(), (what, message)
        assert len(message) < 1000, (what, message)
        assert time.perf_counter() - start < 5, what
    assert len(cases[kind]) > 4


def test_a_flipped_bit_of_an_archive_is_found_or_means_nothing(folder: Path, tmp_path: Path) -> None:
    expected = our_network(**NARROW).state_dict()
    bad, found = tmp_path / "bad", 0
    for what, data in hostile_keras.flips((folder / "model.keras").read_bytes(), 60):
        bad.write_bytes(data)
        try:
            state = read_all(bad)
        except WeightsError:
            found += 1
            continue
        assert all(torch.equal(state[key], value) for key, value in expected.items() if "batches" not in key), what
    assert found > 150


def test_changed_bytes_of_an_hdf5_model(folder: Path, tmp_path: Path) -> None:
    """No checksums there: an error, or a network."""
    bad, failures = tmp_path / "bad", 0
    for data in hostile_hdf5.mutations((folder / "model.h5").read_bytes(), 50, seed=5):
        bad.write_bytes(data)
        try:
            read_all(bad)
        except WeightsError:
            failures += 1
    assert failures > 5


def test_trunk_only_takes_the_trunk_past_a_hostile_head(cases: dict[str, list[Case]], tmp_path: Path) -> None:
    """Whatever stands behind the trunk or before it: it is not looked at, and still not run."""
    expected = our_network(**NARROW).state_dict()
    trunk = {key: value for key, value in expected.items() if "classifier" not in key and "batches" not in key}
    bad, taken = tmp_path / "bad", 0
    for what, data, message in cases["descriptions"]:
        if "cannot be represented" not in message and "Lambda" not in what and "class of" not in what:
            continue
        bad.write_bytes(data)
        file = read_keras_file(bad)
        try:
            found = recognise_keras(file, trunk_only=True)
        except WeightsError:
            continue  # in the trunk itself, or in the description as a whole
        assert found is not None
        assert found.fresh == ("classifier.linear.weight", "classifier.linear.bias"), what
        if taken % 10 == 0:
            state = import_tensors(file, found)[0].state_dict()
            assert all(torch.equal(state[key], value) for key, value in trunk.items()), what
        taken += 1
    assert taken > 20


_CHILD = """
import os, resource, sys
from pathlib import Path
from xception.errors import WeightsError
from xception.models.registry import get_config
from xception.weights.foreign import import_tensors
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras

def read_all(path):
    file = read_keras_file(path)
    found = recognise_keras(file)
    import_tensors(file, found)

folder = Path(sys.argv[1])
current, wrong, own = "", [], set()
QUIET = ("object.", "builtins.id", "sys._getframe", "os.listdir", "os.scandir", "tempfile.", "cpython.", "gc.")

def watch(event, arguments):
    if event in ("compile", "exec"):  # what dataclasses and type hints of our own do, known from the genuine files
        code = arguments[0]
        key = (code.co_code, code.co_names, code.co_consts) if event == "exec" else code
        if not current:
            own.add(key)
        elif key not in own:
            wrong.append((current, event, str(key)[:200]))
    elif not current or (event == "open" and isinstance(arguments[0], int)):  # a file that is open already
        return
    elif event == "open":
        unnamed = hasattr(os, "O_TMPFILE") and (arguments[2] or 0) & os.O_TMPFILE == os.O_TMPFILE
        if not unnamed and os.fsdecode(arguments[0]) != current:
            wrong.append((current, event, str(arguments[0])))
    elif not event.startswith(QUIET):
        wrong.append((current, event, str(arguments)[:200]))

sys.addaudithook(watch)
for genuine in ("model.keras", "model.h5"):
    read_all(folder / genuine)  # imports what there is to import
get_config("inception_v3")
files = sorted((folder / "bad").iterdir())
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for path in files:
    current = str(path)
    try:
        read_all(current)
    except WeightsError:
        continue
    except BaseException as error:
        wrong.append((current, "error", repr(error)))
    else:
        wrong.append((current, "read", "without an error"))
current = ""
sys.stderr.write("\\n".join(map(str, wrong[:20])))
print(len(files))
os._exit(bool(wrong))
"""


def test_hostile_files_run_no_code_open_no_file_and_take_no_memory(
    cases: dict[str, list[Case]], folder: Path, tmp_path: Path
) -> None:
    """In a process with 300 MB to spare that watches every file opened, module imported and program started."""
    (folder / "secret").write_bytes(bytes(100))
    (folder / "bad").mkdir()
    count = 0
    for kind, made in cases.items():
        for number, (_, data, _) in enumerate(made):
            (folder / "bad" / f"{kind} {number:03}").write_bytes(data)
        count += len(made)
    assert count > 250
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", _CHILD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) == count
    assert os.listdir(tmp_path) == []
