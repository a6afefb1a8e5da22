"""Whatever stops a run, and whenever: what is on the disk can be gone on from, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xception.training.checkpoint import checkpoints, load_latest, read_checkpoint
from xception.training.record import TIMINGS

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

RUN = [
    sys.executable, "-m", "xception", "train", "digits", "--recipe", "small", "--epochs", "2", "--batch-size", "64",
    "--image-size", "8", "--seed", "7", "--model-option=stem_widths=[4,8]", "--model-option=entry_widths=[8,12]",
    "--model-option=middle_modules=1", "--model-option=exit_widths=[16]", "--resume", "--out",
]  # fmt: skip

# Saves two checkpoints of a small network, and says when the first one is done and the second begins.
SAVE = """
import copy, os, sys
from pathlib import Path
import torch
from torch import nn
from xception.errors import XceptionError
from xception.training.checkpoint import Progress, save_checkpoint
from xception.training.optimizers import PolyakAverage, build_optimizer
from xception.training.recipe import OptimizerConfig

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 2))
state = dict(
    model=model,
    average=PolyakAverage(model, copy.deepcopy(model), 0.9),
    optimizer=build_optimizer(model, OptimizerConfig()),
    scaler=torch.amp.GradScaler("cpu", enabled=False),
)

def save(folder, step):
    return save_checkpoint(folder, **state, progress=Progress(step=step), run={}, metrics=b'{"epoch": 1}')
"""


def strace(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Python code under strace; the real interpreter, since a launcher's own calls would be counted too."""
    interpreter = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable
    command = ["strace", "-qq", "-e", "signal=none", *options, interpreter, "-c", SAVE + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_strace
def test_write_sync_rename_sync_in_every_save(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "run"
    folder.mkdir()
    calls = "trace=write,fsync,rename,renameat,renameat2,unlink,unlinkat"
    code = f"for step in range(1, 5): save(Path({str(folder)!r}), step)"
    assert strace(code, "-f", "--seccomp-bpf", "-y", "-o", str(trace), "-e", calls).returncode == 0
    said = [line for line in trace.read_text().splitlines() if str(folder) in line]
    kinds = []
    for line in said:
        call = re.sub(r"^\d+ +", "", line)[:6].rstrip("(")
        kinds.append("fsync folder" if call == "fsync" and ".tmp>" not in line else call)
    one = r"(write )+fsync rename fsync folder( unlink)?"
    assert re.fullmatch(rf"({one} ){{4}}", " ".join(kinds) + " "), kinds


@needs_strace
def test_a_kill_at_each_system_call_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    """strace counts each process's calls on the folder: child number i has made i when it begins to save.

    The parent, which imports everything once, leaves the folder to ``cp`` and ``mv``, lest it be killed itself.
    """
    limit, folder, ends = 40, tmp_path / "run", tmp_path / "ends"
    ends.mkdir()
    code = f"""
import subprocess
import xception.weights.files as files
files.secrets.token_hex = lambda n: "known"
folder, seed, ends = Path({str(folder)!r}), Path({str(tmp_path / "seed")!r}), Path({str(ends)!r})
seed.mkdir()
for step in (1, 2):
    save(seed, step)
for i in range({limit}):
    subprocess.run(["cp", "-r", seed, folder], check=True)
    if os.fork() == 0:
        for _ in range(i):
            os.stat(folder)
        save(folder, 3)
        (ends / f"{{i}} was not killed").touch()
        os._exit(0)
    os.wait()
    subprocess.run(["mv", folder, ends / str(i)], check=True)
"""
    paths = [folder, folder / ".xception-known.tmp", *(folder / f"step-00000000{i}.safetensors" for i in (1, 2, 3))]
    watched = [word for path in paths for word in ("-P", str(path))]
    result = strace(code, "-f", "-o", "/dev/null", *watched, "-e", f"inject=all:signal=KILL:when={limit}")
    assert result.returncode == 0, result.stderr
    steps = []
    for i in range(limit):
        found, notices = load_latest(ends / str(i))
        assert notices == []
        assert found is not None
        assert found.metrics == b'{"epoch": 1}'
        if not (ends / f"{i} was not killed").exists():
            steps.append(found.progress.step)
    assert len(steps) >= 5
    assert set(steps) == {2, 3}
    assert steps == sorted(steps, reverse=True), "the later the kill, the newer the checkpoint; i counts backwards"


@needs_strace
@pytest.mark.parametrize(
    ("call", "number"),
    [("openat", errno.EMFILE), ("write", errno.ENOSPC), ("fsync", errno.EIO), ("/rename", errno.EROFS)],
)
def test_a_write_that_fails_is_one_line_and_the_old_checkpoint_stays(tmp_path: Path, call: str, number: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    # The second temporary file gets a name that strace can be told.
    code = f"""
here = Path({str(folder)!r})
save(here, 1)
import xception.weights.files as files
files.secrets.token_hex = lambda n: "known"
try:
    save(here, 2)
except XceptionError as error:
    print(error)
"""
    inject = f"inject={call}:error={errno.errorcode[number]}"
    options = ["-f", "--seccomp-bpf", "-o", "/dev/null", "-P", str(folder / ".xception-known.tmp")]
    result = strace(code, *options, "-e", f"trace={call}", "-e", inject)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1, result.stdout
    assert os.strerror(number) in result.stdout
    assert os.listdir(folder) == ["step-000000001.safetensors"]
    assert read_checkpoint(checkpoints(folder)[-1]).progress.step == 1


def kill_at_random(out: Path, kills: int, *options: str, rng: random.Random) -> None:
    """Start the same command line until it ends by itself; the first `kills` times it is killed on the way."""
    for _ in range(kills):
        process = subprocess.Popen([*RUN, str(out), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began, seen = time.monotonic(), len(list(out.rglob("*")))
        while process.poll() is None and time.monotonic() - began < 60 and len(list(out.rglob("*"))) == seen:
            time.sleep(0.01)  # until it is past its imports and writes
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = subprocess.run([*RUN, str(out), *options], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()


def without_speed(path: Path) -> list[dict[str, object]]:
    return [{**json.loads(line), **dict.fromkeys(TIMINGS, 0)} for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("workers", "head_epochs"), [(0, 0), (2, 0), (0, 1)])
def test_fifteen_kills_at_random_moments_change_nothing(tmp_path: Path, workers: int, head_epochs: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    options = ["--checkpoint-minutes", "1e-9", "--workers", str(workers), "--head-epochs", str(head_epochs)]
    subprocess.run([*RUN, str(straight), *options], check=True, capture_output=True)
    kill_at_random(killed, 15, *options, rng=random.Random(workers))
    assert without_speed(straight / "metrics.jsonl") == without_speed(killed / "metrics.jsonl")
    ends = [read_checkpoint(checkpoints(out / "checkpoints")[-1]) for out in (straight, killed)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert all(ends[1].tensors[name].equal(tensor) for name, tensor in ends[0].tensors.items())
    for name in ("split.json", "recipe.json", "best.safetensors", "model.safetensors"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name
    assert not [p for p in killed.rglob("*") if p.name.startswith(".xception-")]
