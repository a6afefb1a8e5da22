"""The page: whole in itself, safe with hostile texts, the same every time, and complete."""

from __future__ import annotations

import html.parser
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xception.data.loader import BadImage
from xception.errors import WeightsError
from xception.evaluation.accumulate import MultiLabel, SingleLabel
from xception.evaluation.figures import Evaluation
from xception.evaluation.markup import escape
from xception.evaluation.report import Example, mistake_examples, write_report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; --x: url(http://evil.example/)",
    "</style></title><iframe src=//evil.example>",
    "고양이 犬 птица زرافة",
    "\u202egnp.exe",
    "lone \udcff surrogate \ud83d",
    "zero \x00 and escape \x1b[31m",
    "line\nbreak",
    "$x_1^{2}$ \\frac",
]
HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2.0 / epoch,
        "val_loss": 2.2 / epoch,
        "val_top1": 1 - 1 / epoch,
        "learning_rate": 0.1 * 0.5**epoch,
        "images_per_second": 100.0 + epoch,
        "data_wait_share": 0.01 * epoch,
    }
    for epoch in range(1, 13)
]


def _evaluation(names: list[str], *, skill: float = 3.0, count: int = 400) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(len(names), (count,), generator=generator)
    scores = torch.randn(count, len(names), generator=generator)
    scores[torch.arange(count), targets] += skill
    figures = SingleLabel(names, max_mistakes=24)
    figures.update(scores, targets, torch.arange(count))
    figures.errors.append(BadImage("<b>broken</b>.jpg", "an empty file"))
    return figures.result()


class _Page(html.parser.HTMLParser):
    """Collects tags with attributes, and text; refuses tags that close in the wrong order."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _page(path: Path, **options: Any) -> tuple[_Page, str]:
    write_report(path, **{"title": "a title", **options})
    text = path.read_text("utf-8")
    return _Page(text), text


def _examples() -> list[Example]:
    grey, colour = np.zeros((8, 8, 1), np.uint8), np.full((300, 200, 3), 90, np.uint8)
    return [
        Example(image=image, target=HOSTILE[0], predicted=HOSTILE[1], score=0.9, key=HOSTILE[2])
        for image in (grey, colour)
    ]


def test_whole_page_is_safe_and_whole_in_itself(tmp_path: Path) -> None:
    page, text = _page(
        tmp_path / "report.html",
        title=HOSTILE[0],
        evaluation=_evaluation(HOSTILE),
        history=HISTORY,
        class_names=HOSTILE,
        provenance={HOSTILE[1]: HOSTILE[2], "recipe": {HOSTILE[3]: HOSTILE}, "seed": 7, "none": None},
        notes=HOSTILE,
        examples=_examples(),
    )
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "").replace("url(#", ""), tag
    (policy,) = [a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "\x00" not in text
    assert "\x1b" not in text
    whole = "".join(page.text)
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[4], HOSTILE[9], "<b>broken</b>.jpg"):
        assert name in whole
    for heading in ("Training", "Classes", "Confusion", "Calibration", "Mistakes", "Not evaluated", "Provenance"):
        assert heading in page.text


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page, text = _page(tmp_path / "r.html", evaluation=_evaluation(["a", "b", "c"]), history=HISTORY)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [a["xlink:href"] for _, a in page.tags if "xlink:href" in a]
    assert references
    assert {f"#{name}" for name in ids} >= set(references)
    assert text.count("<svg") == 4


def test_same_input_same_bytes_in_another_process(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", title="t", evaluation=_evaluation(["a", "b"]), history=HISTORY)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_report import _evaluation, HISTORY, write_report\n"
        "write_report(sys.argv[2], title='t', evaluation=_evaluation(['a', 'b']), history=HISTORY)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "b.html")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_plots_take_no_fixed_colour_or_size(tmp_path: Path) -> None:
    """Colours are the page's variables, so that a dark page has light lines."""
    page, text = _page(tmp_path / "r.html", evaluation=_evaluation(["a", "b"]), history=HISTORY)
    for svg in text.split("<svg")[1:]:
        drawing = svg[: svg.index("</svg>")]
        assert "#0102" not in drawing
        assert "#000000" not in drawing
        assert "var(--accent)" in drawing
    for tag, attributes in page.tags:
        if tag == "svg":
            assert "viewbox" in attributes
            assert "width" not in attributes
            assert attributes["aria-label"]


def test_many_classes(tmp_path: Path) -> None:
    names = [f"class {k}" for k in range(300)]
    page, text = _page(tmp_path / "r.html", evaluation=_evaluation(names, count=2000))
    assert "All 300 classes" in page.text
    assert "Most often confused" in page.text
    assert 'class="confusion"' not in text
    assert any((a.get("alt") or "").startswith("confusion matrix") for _, a in page.tags)
    assert len(text) < 400_000


def test_perfect_network_has_confused_nothing(tmp_path: Path) -> None:
    page, _ = _page(tmp_path / "r.html", evaluation=_evaluation(["a", "b"], skill=100.0))
    assert "Nothing was confused." in page.text


def test_multi_label(tmp_path: Path) -> None:
    figures = MultiLabel(("a", "b", "c"))
    figures.update(torch.randn(20, 3), torch.tensor([[1.0, 0.0, 0.0]] * 20), torch.arange(20))
    page, _ = _page(tmp_path / "r.html", evaluation=figures.result())
    assert {"mean AP", "micro F1", "AP %"} <= set(page.text)
    assert "Confusion" not in page.text


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"epoch": 1}],
        [{"event": "start"}, {"epoch": None, "train_loss": 1.0}],
        [{"epoch": 1, "train_loss": math.nan, "val_loss": None, "val_top1": "high"}],
        [{"epoch": 1, "train_loss": 1.0, "learning_rate": 0.0}, {"epoch": 2, "learning_rate": 0.1}],
        [{"epoch": 1, "train_loss": 1.0}],
    ],
)
def test_incomplete_history(tmp_path: Path, history: list[dict[str, Any]]) -> None:
    page, _ = _page(tmp_path / "r.html", history=history, class_names=["a", "b"], notes=["half done"])
    assert "half done" in page.text
    assert ("Training" in page.text) == any(r.get("train_loss") == 1.0 and r.get("epoch") for r in history)


def test_resumed_epochs_count_once(tmp_path: Path) -> None:
    page, _ = _page(tmp_path / "r.html", history=[*HISTORY, HISTORY[-1]])
    assert any("12 epochs" in text and "in epoch 12" in text for text in page.text)


class _Split:
    keys = ("x.png", "y.png", "z.png")
    targets = (0, 0, 0)

    def __len__(self) -> int:
        return 3

    def image(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from xception.errors import ImageError

        if index == 1:
            raise ImageError("gone")
        return np.full((4, 4, 3), index, np.uint8)


def test_mistakes_get_their_images() -> None:
    figures = SingleLabel(("a", "b"), max_mistakes=5)
    figures.update(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]), torch.tensor([0, 0, 0]), torch.arange(3))
    evaluation = figures.result()
    examples = mistake_examples(evaluation, _Split())
    assert [example.key for example in examples] == ["z.png", "x.png"]
    assert [int(example.image[0, 0, 0]) for example in examples] == [2, 0]
    assert (examples[0].target, examples[0].predicted) == ("a", "b")
    assert [example.key for example in mistake_examples(evaluation, _Split(), limit=1)] == ["z.png"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot write .*No such file or directory"):
        write_report(tmp_path / "missing" / "r.html", title="t")


def test_escape() -> None:
    assert escape('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert escape("\ud83d\ude00") == "😀"
    for text in HOSTILE:
        escape(text).encode("utf-8")
