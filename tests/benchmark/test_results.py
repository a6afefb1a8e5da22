"""Result files and the documents' tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xception.benchmark.result_files import FOLDER, KINDS, Kind, pattern, read_lines, write_lines
from xception.benchmark.results import main, marks, with_table
from xception.benchmark.tables import table
from xception.errors import ConfigError

ROOT = Path(__file__).parents[2]
BEGIN, END = marks("inference")
MACHINE: dict[str, Any] = {
    "system": "machine", "cpu": "A CPU", "features": ["avx2", "avx512"], "threads": 2, "date": "2026-11-22",
    "commit": "abc", "versions": {"xception": "0.1.0", "timm": None, "openvino": "2026.4.1"},
}  # fmt: skip


def line(system: str, **changed: Any) -> dict[str, Any]:
    about: dict[str, Any] = {
        "system": system, "variant": "sync", "precision": "bf16", "mode": "throughput", "model": "xception", "batch": 8,
        "size": 299, "threads": 2, "images_per_second": 40.0, "latency_ms": 200.0, "ratio_to_best_peer": None,
        "best_peer": None, "logit_error": 0.0123,
    }  # fmt: skip
    return {**about, **changed}


OURS = line(
    "xception", variant="compiled", images_per_second=81.24, ratio_to_best_peer=2.031, best_peer="openvino sync, bf16"
)
FP16 = line(
    "xception", precision="fp16", images_per_second=90.0, ratio_to_best_half_precision_peer=2.2,
    best_half_precision_peer="openvino sync, bf16", logit_error=0.002,
)  # fmt: skip
LATENCY = line("xception", mode="latency", batch=1, latency_ms=13.04)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / FOLDER
    place.mkdir(parents=True)
    scaled = {**OURS, "scaling": "batch", "batch": 16}
    failed = {"system": "xception", "error": "it crashed", "model": "xception"}
    lines = [MACHINE, OURS, FP16, LATENCY, line("openvino"), line("timm", images_per_second=9.0), scaled, failed]
    write_lines(place / "inference-a.jsonl", lines)
    return place


def test_lines_come_back(folder: Path) -> None:
    machine, cases = read_lines(folder / "inference-a.jsonl")
    assert machine == MACHINE
    assert cases[0] == OURS
    assert len(cases) == 7


def test_the_table_has_a_row_for_each_of_ours(folder: Path) -> None:
    rows = table(folder, "inference").splitlines()
    what, peer = "| `xception`, 299 pixels |", "40.0 images/s (openvino sync, bf16)"
    assert rows[2:5] == [
        f"{what} bf16 | throughput, batch 8 | 81.2 images/s | {peer} | 2.03 | 1.2e-02 |",
        f"{what} fp16 | throughput, batch 8 | 90.0 images/s | {peer} | 2.20 | 2.0e-03 |",
        f"{what} bf16 | latency, batch 1 | 13.0 ms | none |  | 1.2e-02 |",
    ]
    assert rows[6] == (
        "A CPU (avx2, avx512), 2 threads; xception 0.1.0, openvino 2026.4.1; 2026-11-22, "
        "`benchmarks/results/inference-a.jsonl`."
    )


def test_every_machine_has_its_part(folder: Path) -> None:
    (folder / "inference-b.jsonl").write_text("\n".join(map(json.dumps, [{**MACHINE, "cpu": "Another"}, OURS])))
    made = table(folder, "inference")
    assert made.index("A CPU") < made.index("Another")
    assert made.count("| network |") == 2


def test_the_table_goes_between_its_marks(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    main([str(readme)])
    text = readme.read_text()
    assert text.startswith(f"# x\n\n{BEGIN}\n| network |")
    assert text.endswith(f".jsonl`.\n{END}\n\nrest\n")
    assert "old" not in text
    main([str(readme)])
    assert readme.read_text() == text
    with pytest.raises(ConfigError, match="benchmark:inference"):
        with_table("no marks", "table", "inference")
    readme.write_text("no marks")
    with pytest.raises(ConfigError, match=r"README\.md: expected <!-- benchmark:inference"):
        main([str(readme)])


@pytest.mark.parametrize("content", ["", "no json", "[1]\n", '{"system": "xception"}\n'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "inference.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"inference\.jsonl: expected"):
        table(tmp_path, "inference")
    with pytest.raises(ConfigError, match="to make a table of"):
        table(tmp_path / "empty", "inference")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for kind in ("inference", "training") for name in ("README.md", "README.ko.md")]
    + [("docs/speed.md", "scaling")],
)
def test_the_document_is_current(name: str, kind: Kind) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    made = with_table(text, table(ROOT / FOLDER, kind), kind)
    assert made == text, f"run: python -m xception.benchmark.results {name}"


def test_all_results_are_of_a_kind() -> None:
    files = {path for kind in KINDS for path in (ROOT / FOLDER).glob(pattern(kind))}
    assert files == set((ROOT / FOLDER).iterdir())


def test_the_ratio_to_inception_is_a_column_where_it_was_measured(tmp_path: Path) -> None:
    about = {"mode": "training", "batch": 8, "peak_memory_mb": 1000.0}
    about |= {"data_share": 0.0, "forward_share": 0.3, "backward_share": 0.6, "optimiser_share": 0.1}
    ours = {**OURS, **about, "variant": "native", "ratio_to_inception_v3": 0.783}
    write_lines(tmp_path / "training-a.jsonl", [MACHINE, ours, {**ours, "variant": "x", "ratio_to_inception_v3": None}])
    rows = table(tmp_path, "training").splitlines()
    assert rows[0].endswith("| MB | to Inception V3 |")
    assert [row.count("|") for row in rows[:4]] == [10] * 4
    assert rows[2].endswith("| 1,000 | 0.78 |")
    assert rows[3].endswith("| 1,000 |  |")


def test_training_has_a_table_of_its_own(folder: Path, tmp_path: Path) -> None:
    shares = {"data_share": 0.0104, "forward_share": 0.3, "backward_share": 0.58, "optimiser_share": 0.11}
    about = {"mode": "training", "batch": 16, "peak_memory_mb": 4321.4, **shares}
    ours = {**OURS, **about, "variant": "native", "best_peer": "timm compiled, bf16"}
    peer = line("timm", **about, variant="compiled", images_per_second=5.25)
    write_lines(folder / "training-a.jsonl", [MACHINE, ours, peer])
    assert table(folder, "training").splitlines()[2] == (
        "| `xception`, 299 pixels, batch 16 | bf16 | native | 81.2 images/s | 5.2 images/s (timm compiled, bf16) "
        "| 2.03 | 1 %, 30 %, 58 %, 11 % | 4,321 |"
    )
    readme = tmp_path / "README.md"
    begin, end = marks("training")
    readme.write_text(f"{BEGIN}\n{END}\n{begin}\n{end}\n")
    main([str(readme)])
    text = readme.read_text()
    assert text.index("| logit error |") < text.index(END) < text.index(begin) < text.index("| MB |") < text.index(end)
    readme.write_text(f"{BEGIN}\n{END}\n")
    main([str(readme)])  # what is not asked for is left out
    assert "| MB |" not in readme.read_text()


def test_cost_by_batch_size_and_threads(folder: Path, tmp_path: Path) -> None:
    def at(axis: str, **changed: Any) -> dict[str, Any]:
        return {**OURS, "scaling": axis, **changed}

    fp32 = {"precision": "fp32", "ratio_to_best_peer": None}
    points = [
        at("batch", batch=1, images_per_second=50.0),
        at("batch", batch=1, images_per_second=25.0, **fp32),
        at("batch", batch=2, images_per_second=60.0, ratio_to_best_peer=1.5),
        at("threads", threads=1),
        at("threads", threads=1, mode="latency", latency_ms=12.5, ratio_to_best_peer=0.5),
    ]
    peer = {**line("openvino", images_per_second=1.0), "scaling": "batch", "batch": 1}
    failed = {"system": "xception", "error": "it crashed", "model": "xception", "scaling": "size"}
    write_lines(folder / "scaling-a.jsonl", [MACHINE, OURS, *points[:2], peer, failed, *points[2:]])
    rows = table(folder, "scaling").splitlines()
    assert rows[:4] == [
        "| images a call | bf16 compiled: images/s | fp32 compiled: images/s |",
        "| --- | --- | --- |",
        "| 1 | 50.0 (2.03) | 25.0 |",
        "| 2 | 60.0 (1.50) |  |",
    ]
    caption = "A CPU (avx2, avx512), 2 threads; xception 0.1.0, openvino 2026.4.1; 2026-11-22"
    assert rows[4:] == [
        "", "| threads | bf16 compiled: images/s |", "| --- | --- |", "| 1 | 81.2 (2.03) |",
        "", "| threads | bf16 compiled: one image, ms |", "| --- | --- |", "| 1 | 12.5 (0.50) |",
        "", f"{caption}, `benchmarks/results/scaling-a.jsonl`.",
    ]  # fmt: skip
    document = tmp_path / "docs" / "speed.md"
    document.parent.mkdir()
    begin, end = marks("scaling")
    document.write_text(f"{begin}\n{end}\n")
    main([str(document)])  # the results are beside the document's folder
    assert document.read_text() == f"{begin}\n{table(folder, 'scaling')}{end}\n"
