"""Whatever a file holds: one clear line that names it, quickly, and no memory beyond the file's own size."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import hostile_bundles as hostile
import pytest

from xception.errors import WeightsError
from xception.weights.bundle import load_bundle, read_bundle_info
from xception.weights.load import create_model


def _refused(path: Path, what: str, expected: str = "") -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError) as error:
        load_bundle(path)
    message = str(error.value)
    assert message.startswith(f"cannot load {path}: "), (what, message)
    assert expected in message, (what, message)
    assert message.isprintable(), (what, message)
    assert len(message) < 1000, (what, message)
    assert time.perf_counter() - start < 5, what


def test_the_original_and_a_resealed_copy_load(bundle: Path) -> None:
    """Else the tests below would prove nothing."""
    load_bundle(bundle)
    fields, body = hostile.split(bundle.read_bytes())
    bundle.write_bytes(hostile.sealed(fields, body))
    load_bundle(bundle)


def test_truncated(bundle: Path, tmp_path: Path) -> None:
    for what, data in hostile.truncations(bundle.read_bytes(), 80):
        (tmp_path / "bad").write_bytes(data)
        _refused(tmp_path / "bad", what)


def test_flipped_bits(bundle: Path, tmp_path: Path) -> None:
    for what, data in hostile.bit_flips(bundle.read_bytes(), 240):
        (tmp_path / "bad").write_bytes(data)
        _refused(tmp_path / "bad", what)


def test_flipped_bits_in_the_header_are_found_without_reading_the_weights(bundle: Path, tmp_path: Path) -> None:
    original = read_bundle_info(bundle)
    data = bundle.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for what, damaged in hostile.bit_flips(data, 200):
        (tmp_path / "bad").write_bytes(damaged)
        if damaged[:end] != data[:end]:
            with pytest.raises(WeightsError):
                read_bundle_info(tmp_path / "bad")
        else:
            assert read_bundle_info(tmp_path / "bad") == original, what


@pytest.mark.parametrize("kind", ["headers", "descriptions"])
def test_hostile(bundle: Path, tmp_path: Path, kind: str) -> None:
    make = hostile.hostile_headers if kind == "headers" else hostile.hostile_descriptions
    for what, data, expected in make(bundle.read_bytes()):
        (tmp_path / "bad").write_bytes(data)
        _refused(tmp_path / "bad", what, expected)
        with pytest.raises(WeightsError):
            create_model("xception", weights=tmp_path / "bad", num_classes=7)


def test_foreign_files(tmp_path: Path) -> None:
    for what, data, expected in hostile.foreign_files():
        (tmp_path / "bad").write_bytes(data)
        _refused(tmp_path / "bad", what, expected)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        Path("bad").write_bytes(pickle.dumps(_Payload(), protocol))
        _refused(Path("bad"), f"pickle protocol {protocol}")
    assert not Path("executed").exists()


def test_places_that_hold_no_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run" / "model.safetensors").mkdir(parents=True)
    for name in ("missing", "folder", "run", "pipe", "loop", "a\0b", "x" * 300):
        with pytest.raises(WeightsError, match=r"cannot (read|load)") as error:
            load_bundle(f"{tmp_path}/{name}")
        assert str(error.value).isprintable()


_CHILD = """
import resource, sys
import torchvision  # which a file that names one of its networks has loaded
from pathlib import Path
import hostile_bundles as hostile
from xception.errors import WeightsError
from xception.weights.bundle import load_bundle

original = Path(sys.argv[1])
load_bundle(original)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
data, bad = original.read_bytes(), original.with_name("bad")
count = 0
for make in (hostile.hostile_headers, hostile.hostile_descriptions):
    for what, damaged, _ in make(data):
        bad.write_bytes(damaged)
        try:
            load_bundle(bad)
        except WeightsError:
            count += 1
        except BaseException as error:
            sys.exit(f"{what}: {error!r}")
print(count)
"""


def test_hostile_files_take_no_memory(bundle: Path) -> None:
    """Under a limit on the address space of 300 MB more than the program itself: a greedy allocation fails."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", _CHILD, str(bundle)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 150
