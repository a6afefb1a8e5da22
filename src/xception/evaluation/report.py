"""The report: one HTML page that shows how a training went and what the network can do.

The page is whole in itself: no script, no request to anywhere (a content security policy in it says so),
plots and images inline, colours for light and dark. It can be mailed, printed and opened in ten years.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xception.data.labels import printable
from xception.data.split import Split
from xception.errors import ImageError
from xception.evaluation import plots
from xception.evaluation.figures import ClassFigures, Evaluation
from xception.evaluation.markup import escape, folded, name, percent, section, share_bar, table
from xception.weights.files import atomic_write

_STYLE = Path(__file__).with_name("report.css")
_MAX_TABLE_CLASSES = 24
_MAX_ROWS = 30
_MAX_LISTED = 2000  # classes; a page with more is slow to open
_THUMBNAIL = 168


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image to show with what the network said: `image` uint8 H W C (C = 1 or 3), `score` 0..1."""

    image: NDArray[np.uint8]
    target: str
    predicted: str
    score: float
    key: str = ""


def mistake_examples(evaluation: Evaluation, split: Split, *, limit: int = 24) -> list[Example]:
    """The evaluation's most confident mistakes with their images from the split it was made on, at most `limit`.

    An image that cannot be read any more is passed over.
    """
    examples = []
    for mistake in evaluation.mistakes[:limit]:
        with contextlib.suppress(ImageError):
            example = Example(
                image=split.image(mistake.index),
                target=evaluation.class_names[mistake.target],
                predicted=evaluation.class_names[mistake.predicted],
                score=mistake.confidence,
                key=split.keys[mistake.index],
            )
            examples.append(example)
    return examples


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    evaluation: Evaluation | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    class_names: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    examples: Sequence[Example] = (),
) -> None:
    """Write the page to `path` in one step.

    `history` holds the records of ``metrics.jsonl`` (of those with an ``epoch``: train_loss, val_loss, val_top1,
    val_map_at_100, learning_rate, images_per_second, data_wait_share, each optional); `class_names` are shown where
    there is no evaluation; `notes` are sentences under the title; `examples` are shown as mistakes. Every text may be
    hostile.
    Raises `WeightsError` where the file cannot be written.
    """
    page = render_report(
        title=title,
        evaluation=evaluation,
        history=history,
        class_names=class_names,
        provenance=provenance or {},
        notes=notes,
        examples=examples,
    )

    def write(stream: BinaryIO) -> None:
        stream.write(page.encode("utf-8"))

    atomic_write(path, write)


def render_report(
    *,
    title: str,
    evaluation: Evaluation | None,
    history: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    provenance: Mapping[str, Any],
    notes: Sequence[str],
    examples: Sequence[Example],
) -> str:
    """The page as text; the arguments are those of `write_report`."""
    parts = [_header(title, evaluation, class_names, notes)]
    if evaluation is not None:
        parts.append(_key_figures(evaluation))
    parts.append(section("Training", _training(history)))
    if evaluation is not None:
        parts.append(section("Classes", _class_table(evaluation)))
        parts.append(section("Confusion", _confusion(evaluation)))
        parts.append(section("Calibration", _calibration(evaluation)))
    parts.append(section("Mistakes", _examples(examples)))
    if evaluation is not None:
        parts.append(section("Not evaluated", _errors(evaluation)))
    parts.append(section("Provenance", _provenance(provenance)))
    return whole_page(title, parts)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """A page of the report's looks from its parts, which are HTML already; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text('utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(title: str, evaluation: Evaluation | None, class_names: Sequence[str], notes: Sequence[str]) -> str:
    names = evaluation.class_names if evaluation is not None else tuple(class_names)
    facts = [f"{evaluation.count:,} images"] if evaluation is not None else []
    if names:
        facts.append(f"{len(names):,} classes")
    if evaluation is not None and evaluation.errors:
        facts.append(f"{len(evaluation.errors):,} not evaluated")
    lines = [f"<h1>{name(title)}</h1>", f'<p class="facts">{" · ".join(facts)}</p>']
    lines += [f"<p>{name(note)}</p>" for note in notes]
    if evaluation is None and names:
        lines.append(folded("Class names", "<p>" + ", ".join(map(name, names)) + "</p>"))
    return "<header>\n" + "\n".join(lines) + "\n</header>"


def _key_figures(e: Evaluation) -> str:
    labelled = "has a true label at the top" if e.multi_label else "the right class comes first"
    figures = []
    if e.map_at_100 is not None:
        figures.append(
            ("MAP@100", percent(e.map_at_100), "each image's 100 best guesses, classes weighted by the data")
        )
    if e.mean_average_precision is not None:
        figures.append(("mean AP", percent(e.mean_average_precision), "mean average precision over classes"))
    figures.append(("top-1", percent(e.top1), labelled))
    if len(e.class_names) > 5:
        figures.append(("top-5", percent(e.top5), "among the best five"))
    if e.auc is not None:
        figures.append(("AUC", f"{e.auc:.4f}", "area under the ROC curve"))
    if e.micro_f1 is not None:
        figures.append(("micro F1", percent(e.micro_f1), "all decisions together, at 0.5"))
    figures.append(("macro F1", percent(e.macro_f1), "every class counts alike"))
    figures.append(("loss", f"{e.loss:.4f}", "binary cross entropy" if e.multi_label else "cross entropy, nats"))
    figures.append(("calibration error", percent(e.calibration_error), "0 is honest confidence"))
    cards = "\n".join(
        f"<div><dt>{label}</dt><dd>{value}</dd><dd class=hint>{hint}</dd></div>" for label, value, hint in figures
    )
    return f'<dl class="figures">\n{cards}\n</dl>'


def _training(history: Sequence[Mapping[str, Any]]) -> str:
    # A run that was resumed may have written an epoch twice: the later record is the one that counts.
    records = {r["epoch"]: r for r in history if _number(r.get("epoch")) is not None}
    epochs = sorted(records)

    def series(**names: str) -> dict[str, list[float]]:
        found = {
            label: [value if (value := _number(records[e].get(key))) is not None else math.nan for e in epochs]
            for label, key in names.items()
        }
        return {label: values for label, values in found.items() if any(map(math.isfinite, values))}

    loss = series(training="train_loss", validation="val_loss")
    top1 = series(validation="val_top1")
    map_at_100 = series(validation="val_map_at_100")
    rate = series(rate="learning_rate")
    drawn = [
        plots.curves(epochs, loss, title="Loss") if loss else "",
        plots.curves(epochs, top1, title="Validation top-1", percent=True) if top1 else "",
        plots.curves(epochs, map_at_100, title="Validation MAP@100", percent=True) if map_at_100 else "",
        plots.curves(epochs, rate, title="Learning rate", logarithmic=_spans_decades(rate)) if rate else "",
    ]
    if not any(drawn):
        return ""
    speeds = [v for v in series(speed="images_per_second").get("speed", []) if math.isfinite(v)]
    text = [f"{len(epochs)} epoch{'s' * (len(epochs) > 1)}"]
    if "validation" in top1:
        best = max((v, -e) for v, e in zip(top1["validation"], epochs, strict=True) if math.isfinite(v))
        text.append(f"best validation top-1 {percent(best[0])} in epoch {-best[1]}")
    if speeds:
        text.append(f"{sorted(speeds)[len(speeds) // 2]:,.0f} images/s (median)")
    waits = [v for v in series(waits="data_wait_share").get("waits", []) if math.isfinite(v)]
    if waits:
        text.append(f"{100 * sorted(waits)[len(waits) // 2]:.1f} % of the time waiting for data (median)")
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    return f'<p class="facts">{" · ".join(text)}</p>\n<div class="plots">\n{figures}\n</div>'


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _spans_decades(series: Mapping[str, Sequence[float]]) -> bool:
    values = [v for line in series.values() for v in line if math.isfinite(v)]
    return min(values) > 0 and max(values) / min(values) > 20


def _class_table(e: Evaluation) -> str:
    head = ["class", "images", "precision %", "recall %", "F1 %"] + (["AP %"] if e.multi_label else [])
    weakest_first = sorted(e.per_class, key=lambda c: (c.f1, -c.support))

    def row(c: ClassFigures) -> list[str]:
        cells = [name(c.name), f"{c.support:,}", share_bar(c.precision), share_bar(c.recall), share_bar(c.f1)]
        if e.multi_label:
            cells.append("&mdash;" if c.average_precision is None else share_bar(c.average_precision))
        return cells

    if len(weakest_first) <= _MAX_ROWS:
        return table(head, map(row, e.per_class), kind="classes")
    shown = table(head, map(row, weakest_first[:_MAX_ROWS]), kind="classes", caption="The weakest, by F1")
    if len(e.per_class) > _MAX_LISTED:
        return shown
    return shown + folded(f"All {len(e.per_class):,} classes", table(head, map(row, e.per_class), kind="classes"))


def _confusion(e: Evaluation) -> str:
    if e.confusion is None or len(e.class_names) < 2:
        return ""
    counts = np.asarray(e.confusion, np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    if len(counts) <= _MAX_TABLE_CLASSES:
        whole = _confusion_table(e.class_names, counts, shares)
        return f'<div class="beside">{whole}{_confused_pairs(e.class_names, counts, shares, 10)}</div>'
    picture = (
        f'<figure class="heat"><img src="{plots.heat_map(shares)}" alt="confusion matrix as a heat map">'
        "<figcaption>Rows are true classes, columns predictions, both in the order of the classes. "
        "The diagonal is right (blue); stronger colour is a larger share of the row.</figcaption></figure>"
    )
    return f'<div class="plots">{picture}{_confused_pairs(e.class_names, counts, shares, 20)}</div>'


def _confusion_table(names: Sequence[str], counts: NDArray[np.int64], shares: NDArray[np.float64]) -> str:
    def cell(row: int, column: int) -> str:
        count = int(counts[row, column])
        kind = "right" if row == column else "wrong"
        share = shares[row, column]
        return f'<span class="cell {kind}" style="--v:{share:.4f}">{f"{count:,}" if count else "·"}</span>'

    head = ["true \\ predicted"] + [f'<span class="across" title="{escape(n)}">{name(n)}</span>' for n in names]
    rows = [
        [f'<span title="{escape(n)}">{name(n)}</span>'] + [cell(k, j) for j in range(len(names))]
        for k, n in enumerate(names)
    ]
    return table(head, rows, kind="confusion", caption="Images; colour is the share of the row")


def _confused_pairs(names: Sequence[str], counts: NDArray[np.int64], shares: NDArray[np.float64], limit: int) -> str:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(k), int(j)) for k, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[k, j]]
    if not pairs:
        return "<p>Nothing was confused.</p>"
    rows = [
        [name(names[k]), name(names[j]), f"{int(counts[k, j]):,}", share_bar(float(shares[k, j]))] for k, j in pairs
    ]
    head = ["true", "taken for", "images", "% of its images"]
    return table(head, rows, kind="pairs", caption="Most often confused")


def _calibration(e: Evaluation) -> str:
    text = (
        "Each bar is the share that is right among predictions of that confidence; the larger a dot, the more "
        "images stand behind it. On the dashed line confidence tells the truth; below it the network is too sure."
    )
    return f'<div class="beside"><figure>{plots.reliability(e.calibration)}</figure><p>{text}</p></div>'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = []
    for example in examples:
        image = Image.fromarray(example.image.squeeze(-1) if example.image.shape[-1] == 1 else example.image)
        # Small images are enlarged by the browser, pixel by pixel: that is what the network saw.
        kind = "tiny" if max(image.size) < _THUMBNAIL // 2 else "photo"
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        figures.append(
            f'<figure><img class="{kind}" src="{plots.data_uri(image)}" alt="" title="{escape(example.key)}">'
            f"<figcaption><b>{name(example.predicted)}</b> {percent(example.score)}"
            f"<br>is {name(example.target)}</figcaption></figure>"
        )
    return '<div class="examples">\n' + "\n".join(figures) + "\n</div>"


def _errors(e: Evaluation) -> str:
    if not e.errors:
        return ""
    rows = [[name(printable(error.key)), escape(error.reason)] for error in e.errors[:_MAX_ROWS]]
    more = len(e.errors) - len(rows)
    return table(["image", "reason"], rows) + (f"<p>and {more:,} more</p>" if more else "")


def _provenance(provenance: Mapping[str, Any]) -> str:
    if not provenance:
        return ""
    rows = []
    for key, value in provenance.items():
        if isinstance(value, (dict, list, tuple)):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
            rows.append([name(key), folded("show", f"<pre>{escape(text)}</pre>")])
        else:
            rows.append([name(key), name(value)])
    return table(["", ""], rows, kind="provenance")
