"""Labels: what each sample is called, how samples are dealt to parts, and how often each class occurs.

Pure functions of their arguments. A target is the index of a class, or for multi-label data the sorted indices of all
classes that apply (none is allowed).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from xception.errors import ConfigError, DataError

Target: TypeAlias = int | tuple[int, ...]
Targets: TypeAlias = Sequence[int] | Sequence[tuple[int, ...]]


def printable(text: str) -> str:
    """`text` fit for one line of output anywhere: what cannot be shown is written as an escape.

    File names on POSIX are bytes; those that are not UTF-8 arrive as strings with lone surrogates, which no stream
    accepts, and any name may hold line breaks or terminal controls.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not read
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def name_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted by code point: their positions are the class indices."""
    return tuple(sorted(set(labels)))


def display_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names fit for every output and file; `DataError` should two become the same."""
    shown = tuple(printable(name) for name in names)
    if len(set(shown)) < len(shown):
        double = next(name for name in shown if shown.count(name) > 1)
        raise DataError(f"two classes are both shown as {double!r}: rename one")
    return shown


def count_classes(targets: Targets, num_classes: int) -> list[int]:
    """How many samples each class has; a multi-label sample counts for each of its classes."""
    counts = [0] * num_classes
    for target in targets:
        for index in (target,) if isinstance(target, int) else target:
            counts[index] += 1
    return counts


def fingerprint(parts: Mapping[str, tuple[Sequence[str], Targets]], class_names: Sequence[str]) -> str:
    """SHA-256 over class names and every sample's part, key and labels, whatever order they come in."""
    digest = hashlib.sha256("\0".join(class_names).encode("utf-8", "surrogatepass"))
    lines = []
    for part, (keys, targets) in parts.items():
        each: Sequence[Target] = targets
        for key, target in zip(keys, each, strict=True):
            labels = (target,) if isinstance(target, int) else target
            lines.append(f"\n{part}\0{key}\0{','.join(map(str, labels))}".encode("utf-8", "surrogatepass"))
    for line in sorted(lines):
        digest.update(line)
    return digest.hexdigest()


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise `ConfigError` unless each is at least 0 and something is left for training."""
    for name, fraction in fractions.items():
        if not (isinstance(fraction, int | float) and 0 <= fraction < 1):
            raise ConfigError(f"{name}_fraction: expected at least 0 and below 1, got {fraction!r}")
    if sum(fractions.values()) >= 1:
        raise ConfigError(f"the fractions {dict(fractions)} leave nothing for training")


def stratified_split(
    keys: Sequence[str], targets: Targets, *, fractions: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Deal samples to 'train' and the parts named in `fractions`, each class in proportion.

    Each sample's place is decided by a hash of (seed, key), so the result does not depend on the order of the samples
    or of the file system, and a few files more or fewer move few others. Every part asked for gets round(n * fraction)
    samples, at least one, shared among the classes by largest remainder; but a class gives none that would leave it
    without a training sample, so parts of small data sets may be smaller, even empty. Multi-label samples are dealt by
    their rarest label.

    Returns:
        Indices into `keys` for each part, ascending; together each index once.
    """
    check_fractions(fractions)
    rank = _ranks(keys, seed)
    strata: dict[int, list[int]] = {}
    for index, stratum in enumerate(_strata(targets)):
        strata.setdefault(stratum, []).append(index)
    for members in strata.values():
        members.sort(key=rank)

    parts: dict[str, list[int]] = {"train": [], **{name: [] for name in fractions}}
    dealt = dict.fromkeys(strata, 0)
    for name, fraction in fractions.items():
        quotas = _quotas({s: len(m) for s, m in strata.items()}, dealt, fraction, seed)
        for stratum, quota in quotas.items():
            start = dealt[stratum]
            parts[name] += strata[stratum][start : start + quota]
            dealt[stratum] = start + quota
    for stratum, members in strata.items():
        parts["train"] += members[dealt[stratum] :]
    _keep_every_label_in_training(parts, targets, rank)
    return {name: sorted(indices) for name, indices in parts.items()}


def _ranks(keys: Sequence[str], seed: int) -> Callable[[int], tuple[bytes, str]]:
    prefix = f"{seed}\0".encode()

    def rank(index: int) -> tuple[bytes, str]:
        key = keys[index]
        return hashlib.blake2b(prefix + key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), key

    return rank


def _strata(targets: Targets) -> list[int]:
    """The class a sample is dealt by: its own, or the rarest of its labels (-1 where it has none)."""
    counts: dict[int, int] = {}
    for target in targets:
        for label in (target,) if isinstance(target, int) else target:
            counts[label] = counts.get(label, 0) + 1
    return [
        target if isinstance(target, int) else min(target, key=lambda label: (counts[label], label), default=-1)
        for target in targets
    ]


def _quotas(sizes: dict[int, int], dealt: dict[int, int], fraction: float, seed: int) -> dict[int, int]:
    """How many samples of each stratum one part takes: largest remainder, each stratum keeping one for training."""
    if fraction == 0:
        return {}
    wanted = max(1, math.floor(sum(sizes.values()) * fraction + 0.5))
    room = {stratum: max(0, size - dealt[stratum] - 1) for stratum, size in sizes.items()}
    quotas = {stratum: min(room[stratum], math.floor(size * fraction)) for stratum, size in sizes.items()}

    def claim(stratum: int) -> tuple[float, bytes]:
        share = sizes[stratum] * fraction
        tie = hashlib.blake2b(f"{seed}\0{fraction}\0{stratum}".encode(), digest_size=8).digest()
        return math.floor(share) - share, tie

    left = wanted - sum(quotas.values())
    for stratum in sorted(sizes, key=claim):
        if left > 0 and quotas[stratum] < room[stratum]:
            quotas[stratum] += 1
            left -= 1
    return quotas


def _keep_every_label_in_training(
    parts: dict[str, list[int]], targets: Targets, rank: Callable[[int], tuple[bytes, str]]
) -> None:
    """A label that only ever comes with rarer ones may have been dealt away entirely: bring one sample back."""
    if not targets or isinstance(targets[0], int):
        return

    def labels(indices: Iterable[int]) -> set[int]:
        return {label for index in indices for label in targets[index]}  # type: ignore[union-attr]

    every = labels(range(len(targets)))
    for missing in sorted(every - labels(parts["train"])):
        if missing in labels(parts["train"]):
            continue
        name, index = min(
            ((n, i) for n, part in parts.items() for i in part if missing in labels([i])),
            key=lambda place: rank(place[1]),
        )
        parts[name].remove(index)
        parts["train"].append(index)
