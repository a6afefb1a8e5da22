"""Whatever a PyTorch file holds: one clear line that names it, quickly; no code run, no file opened, little memory."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hostile_pickles as hostile
import pytest
import torch
from torch import Tensor

from xception.errors import WeightsError
from xception.weights.torch_file import read_torch_file

EXPECTED = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}


def read(path: Path, data: bytes) -> dict[str, Tensor]:
    path.write_bytes(data)
    return {name: tensor.read() for name, tensor in read_torch_file(path).tensors.items()}


def test_the_originals_load(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    for data in (hostile.zip_file(), hostile.legacy_file()):
        tensors = read(tmp_path / "good", data)
        assert tensors.keys() == EXPECTED.keys()
        assert torch.equal(tensors["weight"], EXPECTED["weight"])


# Every hostile file is read by a child whose memory is limited, and of which every file opened, every import and every
# program started is known. It prints a line for each.
_CHILD = """
import json, os, resource, sys, time
from pathlib import Path
import torch
import hostile_pickles as hostile
from xception.errors import WeightsError
from xception.weights.names_torch import recognise_torch
from xception.weights.torch_file import read_torch_file

bad = Path(sys.argv[1])

def read():
    file = read_torch_file(bad)
    recognise_torch(file)
    return [tensor.read() for tensor in file.tensors.values()]

for data in (hostile.zip_file(), hostile.legacy_file()):
    bad.write_bytes(data)
    read()
seen = []
watching = False
def watch(event, args):
    own = event == "open" and (isinstance(args[0], int) or str(args[0]) == str(bad))
    if watching and not own and event not in ("builtins.id", "object.__getattr__"):
        seen.append(f"{event} {str(args)[:100]}")
sys.addaudithook(watch)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
for what, data, expected in hostile.everything():
    bad.write_bytes(data)
    seen.clear()
    start, watching = time.process_time(), True
    try:
        read()
        outcome = "no error"
    except WeightsError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = f"another error: {error!r}"[:300]
    watching = False
    print(json.dumps([what, outcome, expected, time.process_time() - start, seen[:3]]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str, float, list[str]]]:
    folder = tmp_path_factory.mktemp("hostile")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder / "bad")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in folder.iterdir()) == ["bad"]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_hostile_files_get_one_line(outcomes: list[tuple[str, str, str, float, list[str]]]) -> None:
    assert len(outcomes) > 300
    for what, outcome, expected, _, _ in outcomes:
        assert re.fullmatch(r"cannot load \S+/bad: .*", outcome), (what, outcome)
        assert re.search(expected, outcome), (what, outcome, expected)
        assert outcome.isprintable(), what
        assert len(outcome) < 700, what
        assert outcome.count("cannot") == 1, (what, outcome)


def test_hostile_files_are_refused_quickly(outcomes: list[tuple[str, str, str, float, list[str]]]) -> None:
    slow = [(what, seconds) for what, _, _, seconds, _ in outcomes if seconds > 4]
    assert slow == []


def test_hostile_files_run_nothing_and_open_nothing(outcomes: list[tuple[str, str, str, float, list[str]]]) -> None:
    assert [(what, seen) for what, _, _, _, seen in outcomes if seen] == []


# ----------------------------------------------------------------------------------------------------------- damage


def genuine(tmp_path: Path, legacy: bool) -> tuple[bytes, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 2))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    return (tmp_path / "w").read_bytes(), dict(model.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(tmp_path: Path, legacy: bool) -> None:
    data, _ = genuine(tmp_path, legacy)
    for what, cut in hostile.truncations(data, 150):
        with pytest.raises(WeightsError, match=r"^cannot load \S+/bad: ") as error:
            read(tmp_path / "bad", cut)
        assert str(error.value).isprintable(), what


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    """Flipped bits, changed, removed, repeated and exchanged pieces."""
    yield from (changed for _, changed in hostile.bit_flips(data, count // 2))
    chosen = random.Random(3)
    for _ in range(count - count // 2):
        a, b = sorted(chosen.randrange(len(data)) for _ in range(2))
        b = min(b, a + chosen.choice((1, 2, 4, 8, 64)))
        kind = chosen.randrange(4)
        if kind == 0:
            yield data[:a] + data[b:]
        elif kind == 1:
            yield data[:b] + data[a:b] + data[b:]
        elif kind == 2:
            yield data[:a] + bytes(chosen.randrange(256) for _ in range(b - a)) + data[b:]
        else:
            place = chosen.randrange(len(data))
            yield data[:place] + data[a:b] + data[place + b - a :]


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated(tmp_path: Path, legacy: bool) -> None:
    """An archive has checksums: its tensors are the right ones, or there is an error. A stream has none."""
    data, expected = genuine(tmp_path, legacy)
    refused = 0
    for mutant in mutations(data, 1000):
        tensors, problem = outcome(tmp_path / "bad", mutant)
        if tensors is None:
            refused += 1
            assert problem.startswith(f"cannot load {tmp_path / 'bad'}: ")
            assert problem.isprintable()
        elif not legacy:
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert refused > 300


def outcome(path: Path, data: bytes) -> tuple[dict[str, Tensor] | None, str]:
    try:
        return read(path, data), ""
    except WeightsError as error:
        return None, str(error)
