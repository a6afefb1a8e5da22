"""``xception train`` and ``xception demo``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from xception.cli.output import human_bytes, human_seconds, json_line, table
from xception.errors import ConfigError
from xception.training.allocator import keep_freed_memory
from xception.training.interrupt import StopRequest
from xception.training.recipe import NAMED, Recipe, default_recipe, find_recipe, override


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a network on DATA, a folder of images or a table or a named data set, and leave a run folder."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Folder, CSV file, tar or Parquet shards, digits, fashion-mnist, fashion-composites, or a torchvision data set."""
    model: str | None = None
    """Network (see xception models); by default the weights' or the recipe's own."""
    recipe: str = "small"
    """Recipe: imagenet, jft, finetune, head, small, or a .json file (a run folder's recipe.json); the settings below
    are its own values. With --weights the default is finetune."""
    weights: str | None = None
    """Start from these weights: a bundle, a run folder, any public checkpoint (.keras, .h5, .pth, ...), or imagenet."""
    trunk_only: FlagCreatePairsOff[bool] = False
    """Take the trunk of --weights whose head cannot be represented; its place is taken by a new one."""
    out: str | None = None
    """Run folder; by default runs/DATA-MODEL."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on where the run in --out stopped, bit for bit; begin where there is none."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Only print the resolved recipe, the model, and the memory and time to expect."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line with the final figures."""
    tensorboard: FlagCreatePairsOff[bool] = False
    """Also write TensorBoard events."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default cuda where there is one."""
    data_root: str | None = None
    """Where a named data set lies."""
    download: FlagCreatePairsOff[bool] = False
    """Let torchvision download a named data set."""
    model_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of the network's config, as in --model-option middle_modules=4; may be repeated."""
    settings: OmitArgPrefixes[Recipe] = field(default_factory=lambda: NAMED["small"])

    def run(self) -> int:
        with StopRequest():  # already while torch is imported
            keep_freed_memory()
            return self._run()

    def _run(self) -> int:
        from xception.training.train import train

        options = model_options(self.model_option)
        if self.dry_run:
            return self._dry_run(options)
        result = train(
            self.data,
            model=self.model,
            recipe=self.settings,
            weights=self.weights,
            trunk_only=self.trunk_only,
            out=self.out,
            resume=self.resume,
            model_options=options,
            data_root=self.data_root,
            download=self.download,
            device=self.device,
            tensorboard=self.tensorboard,
        )
        if self.json:
            json_line(result.to_dict())
        else:
            print(f"trained in {human_seconds(result.seconds)}: {result.bundle}")
            print(f"report: {result.out / 'report.html'}")
            print(f"next:   xception predict {result.out} IMAGE...")
        return 0

    def _dry_run(self, options: dict[str, Any]) -> int:
        from xception.training.dry_run import describe, expect
        from xception.training.prepare import prepare

        # Deciding costs no pass over the images: a dry run answers at once.
        recipe = override(self.settings, check_images=False)
        plan = prepare(
            self.data,
            recipe,
            model=self.model,
            weights=self.weights,
            trunk_only=self.trunk_only,
            model_options=options,
            data_root=self.data_root,
            download=self.download,
            device=self.device,
        )
        plan = dataclasses.replace(
            plan,
            recipe=override(plan.recipe, check_images=self.settings.input.check_images),
        )
        described = describe(plan, expect(plan))
        if self.json:
            json_line(described)
            return 0
        rows = [[name, _plain(f["value"]), f["source"]] for name, f in described["fields"].items()]
        print(table(["field", "value", "source"], rows))
        print()
        options_shown = ", ".join(f"{k}={_plain(v)}" for k, v in described["config"].items())
        images = ", ".join(f"{n:,} {part}" for part, n in described["images"].items())
        print(f"model:  {plan.model}, {described['parameters']:,} parameters ({options_shown})")
        print(f"data:   {plan.source.spec}: {described['classes']} classes; images: {images}")
        memory, activations = (human_bytes(described[k]) for k in ("memory_bytes", "activation_bytes"))
        print(f"memory: about {memory}, of it {activations} activations")
        print(f"time:   about {human_seconds(described['seconds'])}, at {described['images_per_second']:,} images/s")
        return 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The main job on the bundled digits: train, evaluate, predict, draw the report. About a minute, no network."""

    out: str | None = None
    """Run folder; by default runs/demo-digits."""
    seed: int = 0
    """Decides the split, the order and the initial weights."""
    json: FlagCreatePairsOff[bool] = False
    """Print a JSON line with test_top1, seconds and bundle at the end."""

    def run(self) -> int:
        with StopRequest():
            keep_freed_memory()
            from xception.cli.demo import demo

            return demo(self.out, seed=self.seed, as_json=self.json)


def train_defaults(arguments: Sequence[str]) -> Any:
    """The `Train` whose defaults are those of the recipe (and model) that `arguments` name, for help and parsing.

    Fields without a default are left missing, so that tyro asks for them.
    """
    given: dict[str, str | None] = {"recipe": None, "model": None, "weights": None}
    for option in given:
        for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
            if word == f"--{option}" and following:
                given[option] = following
            elif word.startswith(f"--{option}="):
                given[option] = word.partition("=")[2]
    name = given["recipe"] if given["recipe"] is not None else default_recipe(given["weights"])
    recipe = find_recipe(name, model=given["model"])
    return Train(data=tyro.MISSING, recipe=name, settings=recipe)


def model_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["middle_modules=4", "order=pointwise_depthwise"]`` as values: JSON where it is JSON, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--model-option must be NAME=VALUE; got {pair!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text, text)
        options[name.replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    return options


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
