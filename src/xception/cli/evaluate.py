"""``xception evaluate``: the figures of a trained model on a data set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xception.cli.output import json_line, percent, printable, table
from xception.errors import ConfigError

# What a person sees of a large confusion matrix or class table; --json and the report have all of it.
SHOWN_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Figures of MODEL on DATA: top-1, top-5, loss, each class, calibration, confusion; a report page with --report."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A bundle (.safetensors), a run folder, any public checkpoint (.keras, .h5, .pth, ...), or imagenet."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder, CSV file, tar or Parquet shards, digits, fashion-mnist, fashion-composites, or a torchvision data set."""
    part: Literal["auto", "train", "val", "test", "all"] = "auto"
    """auto: images that the model was not trained on, where that can be known."""
    report: str | None = None
    """Write a report page to this file."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line for every class and bad image, and one with all figures at the end."""
    batch_size: int = 64
    """Images that go through the network at once."""
    workers: int = 0
    """Processes that read images."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the activations between the layers; sums are float32 always."""
    backend: Literal["auto", "native", "openvino", "torch"] = "auto"
    """What runs the network: native is the compiled executor for CPUs; auto takes it where it covers the network, else
    OpenVINO where it is installed, else PyTorch."""
    device: str | None = None
    """cpu, cuda, ...; by default cuda where there is one."""
    data_root: str | None = None
    """Where a named data set lies."""
    download: FlagCreatePairsOff[bool] = False
    """Let torchvision download a named data set."""
    blacklist: str | None = None
    """Leave out the validation images of ImageNet that this file of the ILSVRC development kit lists."""

    def run(self) -> int:
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError(
                f"--batch-size must be 1 or more and --workers 0 or more; got {self.batch_size}, {self.workers}"
            )
        from xception.evaluation.evaluate import evaluate
        from xception.training.progress import Reporter
        from xception.weights.files import check_writable

        if self.report is not None:
            check_writable(self.report)

        with Reporter() as reporter:
            started = False

            def progress(done: int, total: int) -> None:
                nonlocal started
                if not started:
                    reporter.begin("evaluation", total)
                    started = True
                reporter.advance(self.batch_size)

            result = evaluate(
                self.model,
                self.data,
                part=self.part,
                batch_size=self.batch_size,
                workers=self.workers,
                precision=self.precision,
                backend=self.backend,
                device=self.device,
                data_root=self.data_root,
                download=self.download,
                blacklist=self.blacklist,
                progress=progress,
            )
        e = result.evaluation
        sys.stderr.write(f"xception: the network ran on {printable(result.engine)}\n")
        if result.note is not None:
            sys.stderr.write(f"xception: {printable(result.note)}\n")
        if self.blacklist is not None:
            sys.stderr.write(f"xception: {result.blacklisted:,} images are on the black list and left out\n")
        for bad in e.errors:
            sys.stderr.write(f"{printable(bad.key)}: error: {printable(bad.reason)}\n")
        if self.report is not None:
            from xception.evaluation.report import mistake_examples, write_report  # brings matplotlib

            write_report(
                self.report,
                title=f"{result.info.model} on {result.source.spec}: {result.part}",
                evaluation=e,
                examples=mistake_examples(e, result.split),
                history=[],
                class_names=result.info.class_names,
                provenance=result.info.provenance,
            )
        if self.json:
            for figures in e.per_class:
                json_line(
                    {
                        "class": figures.name,
                        "precision": figures.precision,
                        "recall": figures.recall,
                        "f1": figures.f1,
                        "support": figures.support,
                    }
                )
            for bad in e.errors:
                json_line({"path": bad.key, "error": bad.reason})
            counts = {"engine": result.engine, "part": result.part, "images": e.count, "bad_images": len(e.errors)}
            if self.blacklist is not None:
                counts["blacklisted_images"] = result.blacklisted
            json_line({**counts, **_figures(e.to_dict())})
        else:
            self._print(e, result.part)
        return 1 if e.errors else 0

    def _print(self, e: Any, part: str) -> None:
        rows = [
            ["images", f"{e.count:,} ({part})"],
            ["top-1", percent(e.top1)],
            ["top-5", percent(e.top5)],
            ["loss", f"{e.loss:.4f}"],
        ]
        rows.append(["calibration error", percent(e.calibration_error)])
        if e.auc is not None:
            rows.append(["AUC", f"{e.auc:.4f}"])
        if e.map_at_100 is not None:
            rows.append(["MAP@100", percent(e.map_at_100)])
        if e.mean_average_precision is not None:
            rows.append(["mean average precision", f"{e.mean_average_precision:.4f}"])
        if e.micro_f1 is not None:
            rows.append(["micro F1", f"{e.micro_f1:.4f}"])
        print(table(["figure", "value"], rows))
        classes = sorted(e.per_class, key=lambda c: c.f1)[:SHOWN_CLASSES]
        title = "class" if len(classes) == len(e.per_class) else f"class (the {SHOWN_CLASSES} with the lowest F1)"
        print()
        print(
            table(
                [title, "precision", "recall", "F1", "images"],
                [[c.name, percent(c.precision), percent(c.recall), percent(c.f1), str(c.support)] for c in classes],
            )
        )
        if e.confusion is not None and len(e.class_names) <= SHOWN_CLASSES:
            print("\nconfusion (rows: true class, columns: predicted)")
            header = ["", *(name[:12] for name in e.class_names)]
            print(
                table(
                    header,
                    [[name[:24], *map(str, row)] for name, row in zip(e.class_names, e.confusion, strict=True)],
                )
            )
        if self.report is not None:
            print(f"\nreport: {self.report}")


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What belongs on the last line: everything but the lists that have lines of their own."""
    left_out = ("per_class", "errors", "mistakes", "count", "class_names")
    return {"class_names": figures["class_names"], **{k: v for k, v in figures.items() if k not in left_out}}
