"""An experiment's page and plots: the paper's figures beside ours, whether the claim held, and with what confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xception.evaluation.markup import escape, folded, name, section, table
from xception.evaluation.plots import standing_alone
from xception.evaluation.report import whole_page
from xception.experiments import draw
from xception.experiments.experiment import Arm, Experiment, Task
from xception.experiments.results import Line, Results
from xception.weights.files import atomic_write

if TYPE_CHECKING:
    from xception.experiments.outcome import Outcome
    from xception.experiments.table3 import Rates

FIGURES = {"top1": "top-1", "top5": "top-5", "map_at_100": "MAP@100"}
PLOTS = "plots"


def sentence(outcome: Outcome) -> str:
    """Whether the claim held, in words."""
    word = {True: "held", False: "did not hold", None: "is undecided"}[outcome.held]
    return f"At scale {outcome.scale} the claim {word}: {outcome.why}."


def write_page(experiment: Experiment, results: Results, arms: Sequence[Arm], outcome: Outcome) -> None:
    """report.html and the plots beside it, from results alone."""
    assert results.about is not None
    lines = {arm.name: results.of(arm.name) for arm in arms}
    word = FIGURES[experiment.figure]
    axis = experiment.axis(results.about["scale"], Task(**results.about["task"]))
    plots = {
        "learning": draw.learning_curves(arms, lines, experiment.figure, f"Validation {word}"),
        "final": draw.final_figures(arms, lines, experiment.figure, f"Final {word}"),
        "along": "" if axis is None else draw.along(axis, lines, experiment.figure, f"Final {word}"),
    }
    facts = [f"scale {outcome.scale}", f"data {results.about['data']}", f"{len(results.lines)} runs"]
    parts = [
        _header(experiment.title, experiment.claim, facts, outcome),
        section("Claim by claim", _contrasts(outcome)),
        section("Ours", _arms(outcome, experiment.figure), _figures(plots.values())),
        section("The paper's", _paper(experiment)),
        section("Settings", *(_setting(arm, lines[arm.name]) for arm in arms if lines[arm.name])),
        section("Runs", _runs(results.lines, experiment.figure)),
    ]
    _write(outcome, experiment.title, parts, plots)


def write_rates_page(experiment: Rates, results: Results, outcome: Outcome) -> None:
    """As `write_page`, of Table 3."""
    compiled = {f"{line['arm']} (compiled)": line["compiled"] for line in results.lines if line.get("compiled")}
    plots = {
        "training": draw.rates({line["arm"]: line["training"] for line in results.lines}, "Training, steps/s"),
        "inference": draw.rates(
            {**{line["arm"]: line["inference"] for line in results.lines}, **compiled}, "Inference, images/s"
        ),
    }
    first = results.lines[0]
    facts = [
        f"scale {outcome.scale}", f"{len(first['training'])} rounds", f"batch {first['batch']}",
        _processor(first["machine"]),
    ]  # fmt: skip
    parts = [
        _header(experiment.title, experiment.claim, facts, outcome),
        section("Ours", _rates(outcome), _figures(plots.values())),
        section("Parameters under each convention", _conventions(results.lines)),
        section("The paper's", _paper(experiment)),
        section("Machine", _machine(results.lines)),
    ]
    _write(outcome, experiment.title, parts, plots)


def _write(outcome: Outcome, title: str, parts: Sequence[str], plots: Mapping[str, str]) -> None:
    folder = outcome.folder / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for plot, svg in plots.items():
        if svg:
            _write_text(folder / f"{plot}.svg", standing_alone(svg) + "\n")
    _write_text(outcome.report, whole_page(title, parts))


def _write_text(path: Path, text: str) -> None:
    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("utf-8"))

    atomic_write(path, write)


def _header(title: str, claim: str, facts: Sequence[str], outcome: Outcome) -> str:
    shown = " · ".join(name(fact) for fact in facts)
    return (
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="facts">{shown}</p>\n'
        f"<p><b>Claim.</b> {escape(claim)}.</p>\n<p><b>{escape(sentence(outcome))}</b></p>\n"
        f"<p>{escape(outcome.remark)}</p>\n</header>"
    )


def _contrasts(outcome: Outcome) -> str:
    rows = []
    for judged in outcome.contrasts:
        values = ["&mdash;", "&mdash;"]
        if judged.value is not None and judged.low is not None and judged.high is not None:
            values = [f"{100 * judged.value:+.2f}", f"{100 * judged.low:+.2f} to {100 * judged.high:+.2f}"]
        says = escape(judged.says) + ("" if judged.decides else " <small>(beside the claim)</small>")
        rows.append([says, *values, f"{judged.verdict}: {escape(judged.why)}"])
    note = (
        "<p>Differences in percentage points. Intervals are the middle 95 % of 2,000 bootstrap replicates, which draw "
        "images and seeds again; those of whole learning curves draw seeds alone. With two or three seeds an "
        "interval knows little about other seeds.</p>"
    )
    return table(["contrast", "difference", "95 % interval", "verdict"], rows, kind="told") + note


def _arms(outcome: Outcome, figure: str) -> str:
    figures = [f for f in FIGURES if any(f"{f}_mean" in arm and arm[f"{f}_mean"] is not None for arm in outcome.arms)]
    head = ["arm", "parameters", "multiply-adds", "seeds", *(f"{FIGURES[f]} %" for f in figures)]
    rows = []
    for arm in outcome.arms:
        if not arm["seeds"]:
            rows.append([name(arm["name"]), *["not finished"], *["&mdash;"] * (len(head) - 2)])
            continue
        cells = [f"{escape(arm['name'])}: {escape(arm['label'])}", f"{arm['parameters']:,}"]
        cells += [f"{arm['multiply_adds'] / 1e6:,.1f} M", str(arm["seeds"])]
        for f in figures:
            spread = "" if arm[f"{f}_std"] is None else f" &#177; {100 * arm[f'{f}_std']:.2f}"
            mean = f"{100 * arm[f'{f}_mean']:.2f}{spread}"
            cells.append(f"<b>{mean}</b>" if f == figure else mean)
        rows.append(cells)
    return table(head, rows, caption="Mean and sample standard deviation over seeds")


def _paper(experiment: Any) -> str:
    rows = [[escape(cell) for cell in row] for row in experiment.paper]
    return table([escape(cell) for cell in experiment.paper_head], rows, caption=escape(experiment.source))


def _figures(drawn: Any) -> str:
    return '<div class="plots">' + "".join(f"<figure>{svg}</figure>" for svg in drawn if svg) + "</div>"


def _setting(arm: Arm, lines: Sequence[Line]) -> str:
    setting = lines[0]["setting"]
    rows = [[escape(key), escape(value)] for key, value in setting.items() if not isinstance(value, dict)]
    for part in ("options", "recipe"):
        rows += [[f"{part}: {escape(key)}", escape(value)] for key, value in setting.get(part, {}).items()]
    return folded(name(arm.name), table(["setting", "value"], rows))


def _runs(lines: Sequence[Line], figure: str) -> str:
    rows = [
        [
            f"{name(line['arm'])}, seed {line['seed']}",
            f"{100 * line['figures'][figure]:.2f}",
            f"{line['seconds']:,.0f} s" if "seconds" in line else "&mdash;",
            f"{line['images_per_second']:,.0f}" if line.get("images_per_second") else "&mdash;",
            escape(line["machine"]["commit"] or ""),
            escape(line["finished"]),
        ]
        for line in lines
    ]
    head = ["run", f"{FIGURES[figure]} %", "training took", "images/s", "commit", "finished"]
    return folded(f"{len(rows)} runs", table(head, rows)) + _machine(lines)


def _processor(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'' if threads == 1 else 's'}"


def _machine(lines: Sequence[Line]) -> str:
    told = dict.fromkeys(
        f"{_processor(line['machine'])}, torch {line['machine']['versions']['torch']}, "
        f"xception {line['machine']['versions']['xception']}"
        for line in lines
    )
    return "".join(f"<p>{escape(text)}</p>" for text in told)


def _rates(outcome: Outcome) -> str:
    rows = [
        [
            name(arm["name"]),
            f"{arm['size']}",
            f"{arm['training_steps_per_second']:.3g}",
            f"{arm['batch'] * arm['training_steps_per_second']:.3g}",
            f"{arm['inference_images_per_second']:.3g}",
            f"{arm['compiled_images_per_second']:.3g}" if "compiled_images_per_second" in arm else "&mdash;",
        ]
        for arm in outcome.arms
    ]
    head = ["network", "pixels", "training steps/s", "training images/s", "inference images/s", "compiled images/s"]
    return table(head, rows, caption="Medians over rounds")


def _conventions(lines: Sequence[Line]) -> str:
    keys = list(lines[0]["conventions"])
    rows = [[name(line["arm"]), *(f"{line['conventions'][key]:,}" for key in keys)] for line in lines]
    return table(["network", *(key.replace("_", " ") for key in keys)], rows, caption="Without auxiliary classifiers")
