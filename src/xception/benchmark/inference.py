"""The benchmark of inference: the same networks and images in every system, checked to agree, then timed in rounds.

Systems that are compared run in one heat: those of one kind of precision (fp32; bf16 and fp16; int8) and one mode,
each loaded in a process of its own, then visited in interleaved rounds with a matrix product among them, which tells
the machine's peak at that time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from xception.benchmark.case import ERROR_BOUNDS, MODES, PARTS, PRECISIONS, Case, Mode, Precision, System
from xception.benchmark.catalog import CATALOG
from xception.benchmark.rounds import against_best, interleave, median_ratio
from xception.benchmark.session import Failed, LeftOut, Process, Session, Visit
from xception.benchmark.systems import MACHINE, OURS, SYSTEMS, systems_for
from xception.benchmark.systems.matrix_peak import OPERATIONS, SIDE
from xception.errors import ConfigError
from xception.models.fields import unknown_name

if TYPE_CHECKING:
    from xception.benchmark.networks import Work

HEATS: tuple[tuple[Precision, ...], ...] = (("fp32",), ("bf16", "fp16"), ("int8",))
HALF = HEATS[1]
TABLE_3 = "inception_v3"  # the network that the paper compares speed with

Start = Callable[[Case, Path, dict[str, str]], Session]
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. `seconds` is the length of a visit; `options` are fields of the networks' configs.

    Raises `ConfigError` for unknown names and for numbers out of range.
    """

    models: tuple[str, ...] = ("xception",)
    size: int = 299
    batch: int = 8
    rounds: int = 7
    threads: int
    precisions: tuple[Precision, ...] = PRECISIONS
    modes: tuple[Mode, ...] = MODES
    systems: tuple[str, ...] = tuple(SYSTEMS)
    seconds: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)

    known_systems: ClassVar[Mapping[str, System]] = SYSTEMS
    known_precisions: ClassVar[tuple[Precision, ...]] = PRECISIONS
    known_modes: ClassVar[tuple[Mode, ...]] = MODES

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("model", self.models, list(CATALOG)),
            ("precision", self.precisions, list(self.known_precisions)),
            ("mode", self.modes, list(self.known_modes)),
            ("system", self.systems, list(self.known_systems)),
        ):
            if not names:
                raise ConfigError(f"expected at least one {kind} of {', '.join(known)}")
            for name in names:
                if name not in known:
                    raise unknown_name(kind, name, known)
        for what, value, most in (
            ("size", self.size, 1024),
            ("batch", self.batch, 1024),
            ("rounds", self.rounds, 1000),
            ("threads", self.threads, 1024),
        ):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{what} must be from 1 to {most}; got {value!r}")
        if not 0 < self.seconds <= 60:
            raise ConfigError(f"seconds must be more than 0, at most 60; got {self.seconds!r}")


def missing(systems: Iterable[str], mode: Mode = "throughput") -> dict[str, str]:
    """System or variant -> the package that it lacks here."""
    lacking = {}
    for name in systems:
        system = systems_for(mode)[name]
        if absent := [package for package in (*system.needs, *system.exports) if not installed(package)]:
            lacking[name] = absent[0]
            continue
        for variant in system.variants:
            if absent := [package for package in variant.needs if not installed(package)]:
                lacking[f"{name} {variant.name}, {variant.precision}"] = absent[0]
    return lacking


def installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    return find_spec(package) is not None


def models_of(settings: Settings) -> list[str]:
    """The networks to measure: `xception` brings `xception_tf` with it where Keras is to be measured."""
    models = list(dict.fromkeys(settings.models))
    if "xception" in models and "keras" in settings.systems and installed("keras") and "xception_tf" not in models:
        models.append("xception_tf")
    return models


def cases_of(settings: Settings, precisions: Sequence[Precision], mode: Mode) -> list[Case]:
    """All cases of one heat, those whose packages are missing left out."""
    known = systems_for(mode)
    absent = missing([*settings.systems, MACHINE], mode)
    cases = []
    for model in models_of(settings):
        for name in settings.systems:
            if name in absent or not _takes(known[name], model):
                continue
            cases += [
                Case(
                    system=name,
                    variant=variant.name,
                    precision=variant.precision,
                    mode=mode,
                    model=model,
                    batch=1 if mode == "latency" else settings.batch,
                    size=settings.size,
                    threads=settings.threads,
                )
                for variant in known[name].variants
                if variant.precision in precisions
                and mode in variant.modes
                and f"{name} {variant.name}, {variant.precision}" not in absent
            ]
    if not cases:
        return []
    peaks = [
        Case(
            system=MACHINE, variant=variant.name, precision=variant.precision, mode=mode, model="matrix product",
            batch=1, size=SIDE, threads=settings.threads,
        )
        for variant in known[MACHINE].variants
        if variant.precision in precisions
    ]  # fmt: skip
    return cases + peaks


def _takes(system: System, model: str) -> bool:
    """Keras has `xception_tf` alone, which the others but ours do not have; ours has no Inception."""
    if CATALOG[model].keras:
        return system.name in ("keras", OURS)
    if system.name == "torchvision":
        return model == TABLE_3
    return system.name != "keras" and not (system.name == OURS and model == TABLE_3)


@dataclass(kw_only=True)
class Run:
    """A benchmark in progress: `tell` is given each line of the result, `say` what people are told meanwhile."""

    settings: Settings
    tell: Callable[[Line], None]
    say: Callable[[str], None] = lambda message: None
    start: Start | None = None  # None: in a process of its own
    only: frozenset[tuple[str, str, str]] | None = None  # system, variant, precision; None: all
    scaling: str | None = None  # the axis of `scaling.points` that this is a point of
    failed: int = 0

    bounds: ClassVar[Mapping[Precision, float]] = ERROR_BOUNDS
    compared: ClassVar[str] = "logits"

    def __call__(self) -> list[Line]:
        """Measure everything; returns the lines that were told. `failed` counts systems that did not run or agree."""
        for name, package in missing(self.settings.systems, self.settings.modes[0]).items():
            self.say(f"not installed: {name} (it needs {package})")
        lines: list[Line] = []
        precisions = [p for p in PRECISIONS if p in self.settings.precisions]
        with tempfile.TemporaryDirectory(prefix="xception-benchmark-") as folder:
            for mode in self.settings.modes:
                for heat in HEATS:
                    cases = cases_of(self.settings, [p for p in heat if p in precisions], mode)
                    if self.only is not None:
                        ours = (*self.only, *((MACHINE, "matrix product", p) for p in heat))
                        cases = [case for case in cases if (case.system, case.variant, case.precision) in ours]
                    if any(case.system != MACHINE for case in cases):
                        lines += self._heat(cases, Path(folder))
        return lines

    def _heat(self, cases: list[Case], root: Path) -> list[Line]:
        works = self._write(cases, root)
        with ExitStack() as stack:
            sessions: dict[Case, Session] = {}
            lines: list[Line] = []
            for number, case in enumerate(cases, start=1):
                self.say(f"loading {number} of {len(cases)}: {case}")
                try:
                    session = (self.start or Process)(
                        case, root / case.model, systems_for(case.mode)[case.system].environment(case)
                    )
                except LeftOut as reason:
                    self.say(f"left out: {case}: {reason}")
                except Failed as error:
                    lines.append(self._failure(case, str(error)))
                else:
                    stack.callback(session.close)
                    bound, error_here = self.bounds[case.precision], session.logit_error
                    if error_here is not None and not error_here <= bound:
                        session.close()
                        message = (
                            f"its {self.compared} differ by {error_here:.2g} of theirs, at most {bound:g} is allowed"
                        )
                        lines.append(self._failure(case, message))
                    else:
                        sessions[case] = session
            visits: dict[Case, list[Visit]] = {case: [] for case in sessions}

            def visit(case: Case) -> float | None:
                try:
                    visits[case].append(sessions[case].visit(self.settings.seconds))
                except Failed as error:
                    sessions[case].close()
                    lines.append(self._failure(case, str(error)))
                    return None
                return visits[case][-1].rate

            rates = interleave(
                {case: lambda case=case: visit(case) for case in sessions},  # type: ignore[misc]
                self.settings.rounds,
                after=lambda turn: self.say(f"round {turn + 1} of {self.settings.rounds}"),
            )
        for case in rates:
            if case.system != MACHINE:
                operations = self.operations(works[case.model])
                line = _line(case, rates, operations, visits[case], sessions[case].logit_error)
                if self.scaling is not None:
                    line["scaling"] = self.scaling
                self.tell(line)
                lines.append(line)
        return lines

    def _write(self, cases: Sequence[Case], root: Path) -> dict[str, Work]:
        """The networks of these cases, in the files that their systems read."""
        from xception.benchmark.networks import Work

        mode, known = self.settings.modes[0], self.settings.known_systems
        works: dict[str, Work] = {}
        for model in dict.fromkeys(case.model for case in cases if case.system != MACHINE):
            systems = {name for name in self.settings.systems if not missing([name], mode).get(name)}
            files: set[str] = set()
            for system in (known[name] for name in systems if _takes(known[name], model)):
                files.update(system.files)
                for variant in system.variants:
                    lacks = f"{system.name} {variant.name}, {variant.precision}" in missing([system.name], mode)
                    if variant.precision in self.settings.precisions and not lacks:
                        files.update(variant.files)
            works[model] = Work(
                model=model, batch=self.settings.batch, size=self.settings.size, options=self.settings.options
            )
            if not (root / model).exists():
                self.say(f"preparing {model}")
                self.write(works[model], root / model, files)
        return works

    def write(self, work: Work, folder: Path, files: set[str]) -> None:
        """Write the network of `work`, what it is given, and what it must answer, into `folder`."""
        from xception.benchmark.networks import write_work

        write_work(work, folder, files)

    def operations(self, work: Work) -> float:
        """Multiplications and additions for one image."""
        return 2 * work.multiply_adds

    def _failure(self, case: Case, message: str) -> Line:
        self.failed += 1
        self.say(f"error: {case}: {message}")
        line = {**case.to_dict(), "error": message}
        self.tell(line)
        return line


def _line(
    case: Case,
    rates: Mapping[Case, Sequence[float]],
    operations: float,
    visits: Sequence[Visit],
    logit_error: float | None,
) -> Line:
    """The result of one case, compared with the others of its heat; Inception V3 is the best of the whole heat."""

    def same(other: Case) -> bool:
        return other.system not in (OURS, MACHINE) and other.model == case.model and other != case

    best, ratio = against_best(case, [c for c in rates if same(c) and c.precision == case.precision], rates)
    line: Line = {
        **case.to_dict(),
        "images_per_second": _rounded(median(rates[case])),
        "latency_ms": _rounded(1000 * case.batch / median(rates[case])),
        "ratio_to_best_peer": _rounded(ratio),
        "best_peer": _name(best),
        "logit_error": _rounded(logit_error, 3),
        "peak_memory_mb": _rounded(max(visit.peak_memory_mb for visit in visits)),
        "fraction_of_peak": _rounded(_fraction(case, rates, operations)),
        "rounds": len(rates[case]),
    }
    if case.precision in HALF:
        best, ratio = against_best(case, [c for c in rates if same(c) and c.precision in HALF], rates)
        line["ratio_to_best_half_precision_peer"] = _rounded(ratio)
        line["best_half_precision_peer"] = _name(best)
    for part in PARTS if case.mode == "training" else ():
        told = [visit.shares[part] for visit in visits if part in visit.shares]
        line[f"{part}_share"] = _rounded(median(told), 3) if told else None
    table_3 = [c for c in rates if c.model == TABLE_3 and c.system != OURS]
    if table_3 and case.model != TABLE_3:
        line["ratio_to_inception_v3"] = _rounded(against_best(case, table_3, rates)[1])
    return line


def _name(case: Case | None) -> str | None:
    return None if case is None else f"{case.system} {case.variant}, {case.precision}"


def _fraction(case: Case, rates: Mapping[Case, Sequence[float]], operations: float) -> float | None:
    """Operations a second as a share of those of the matrix product in the same rounds."""
    peak = next((c for c in rates if c.system == MACHINE and c.precision == case.precision), None)
    if peak is None:
        return None
    return median_ratio(rates[case], rates[peak]) * operations / OPERATIONS


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
