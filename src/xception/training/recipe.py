"""Recipes: everything that decides how a network is trained, as frozen data.

Five are named. `imagenet` and `jft` are the paper's (section 4.3 and 4.4 of arXiv 1610.02357v3); the paper leaves
much unsaid (batch size, epochs, augmentation, averaging decay, RMSprop's rho and epsilon, ...), and what it does
not state is our choice: `Recipe.stated` names the fields that the paper does state, and ``--dry-run`` prints which
is which. `finetune` adapts a trained network to new classes, `head` trains no more than a new head on it, `small`
trains small images from scratch.

Its parts are in `recipe_parts`. Neither imports torch, nor any room above it but `data`: the command line reads them
before anything heavy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tyro.conf import Suppress

from xception.data.augment import Augment
from xception.data.labels import printable
from xception.errors import ConfigError
from xception.training.recipe_parts import InputConfig as InputConfig
from xception.training.recipe_parts import LossConfig as LossConfig
from xception.training.recipe_parts import OptimizerConfig as OptimizerConfig
from xception.training.recipe_parts import ScheduleConfig as ScheduleConfig
from xception.training.recipe_parts import is_finite, require


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a network is trained; the same recipe and data give the same weights."""

    name: Suppress[str] = "small"
    model: Suppress[str] = "xception_small"
    """The network, unless another is named."""
    epochs: int = 10
    """Passes over the training images (the head's own included)."""
    batch_size: int = 128
    """Images that go through the network at once."""
    accumulate: int = 1
    """Batches whose gradients are added up before each update."""
    seed: int = 0
    """Decides the split, the order, the augmentation, the initial weights and dropout."""
    dropout: float | None = None
    """Before the classifier; by default the model's own."""
    polyak_decay: float = 0.999
    """Decay of the running average of the weights that is evaluated and kept; 0 keeps the weights themselves."""
    head_epochs: int | None = 0
    """Epochs at the start in which only the new head learns; None, or more than there are: all of them."""
    cache_features: bool = True
    """In the head's own epochs compute the trunk's features of each image once, without augmentation."""
    norm_statistics: Literal["update", "frozen"] = "update"
    """Whether batch norm statistics of the trunk are updated or kept as they came with the weights."""
    norm_momentum: float = 0.1
    """Share of each batch in the running statistics of batch norm (1 - TensorFlow's momentum)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights and sums stay fp32. auto: bf16 where the processor multiplies it."""
    channels_last: bool = True
    """N H W C in memory, which CPUs like."""
    backend: Literal["auto", "native", "reference"] = "auto"
    """What computes separable units on a CPU: the compiled extension (auto: where it is there) or PyTorch alone."""
    compile: bool = False
    """Use torch.compile."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints; each epoch also ends with one (on cached features only the last of them)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    input: InputConfig = field(default_factory=InputConfig)
    augment: Augment = field(default_factory=Augment)
    stated: Suppress[tuple[str, ...]] = ()
    """The fields whose values the paper gives."""

    def __post_init__(self) -> None:
        require(1 <= self.epochs <= 100_000, "epochs", "in 1..100000", self.epochs)
        require(1 <= self.batch_size <= 65_536, "batch_size", "in 1..65536", self.batch_size)
        require(0 < self.norm_momentum <= 1, "norm_momentum", "in (0, 1]", self.norm_momentum)
        require(1 <= self.accumulate <= 65_536, "accumulate", "in 1..65536", self.accumulate)
        require(0 <= self.seed < 2**63, "seed", "in 0..2^63-1", self.seed)
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        require(0 <= self.polyak_decay < 1, "polyak_decay", "in [0, 1)", self.polyak_decay)
        require(
            self.head_epochs is None or 0 <= self.head_epochs <= 100_000,
            "head_epochs",
            "None or in 0..100000",
            self.head_epochs,
        )
        require(
            is_finite(self.checkpoint_minutes) and self.checkpoint_minutes > 0,
            "checkpoint_minutes",
            "above 0",
            self.checkpoint_minutes,
        )

    @property
    def head_only_epochs(self) -> int:
        """Epochs at the start in which only the head learns: `head_epochs`, of those that there are."""
        return self.epochs if self.head_epochs is None else min(self.head_epochs, self.epochs)


PARTS = ("optimizer", "schedule", "loss", "input", "augment")
# Fields that change nothing in the result: a run may be resumed with other values of these.
FREE_FIELDS = frozenset({"workers", "checkpoint_minutes"})

_STATED_IMAGENET = (
    "optimizer", "learning_rate", "momentum", "nesterov", "schedule", "decay_factor", "decay_epochs",
    "weight_decay", "dropout", "loss",
)  # fmt: skip

_PHOTOGRAPHS = InputConfig(crop_fraction=299 / 333, interpolation="bicubic", workers=2)

NAMED: dict[str, Recipe] = {
    # Section 4.3: SGD, momentum 0.9, 0.045, x0.94 every 2 epochs; section 4.4: weight decay 1e-5, dropout 0.5,
    # no auxiliary tower; section 4.2: Polyak averaging at inference (its decay is not stated).
    "imagenet": Recipe(
        name="imagenet",
        model="xception",
        epochs=120,
        batch_size=32,
        dropout=0.5,
        polyak_decay=0.9999,
        optimizer=OptimizerConfig(optimizer="sgd", learning_rate=0.045, momentum=0.9, weight_decay=1e-5),
        schedule=ScheduleConfig(schedule="exponential", decay_factor=0.94, decay_epochs=2.0),
        loss=LossConfig(loss="softmax"),
        input=_PHOTOGRAPHS,
        augment=Augment(random_resized_crop=(0.08, 1.0), horizontal_flip=0.5),
        stated=_STATED_IMAGENET,
    ),
    # Section 4.3: RMSprop, momentum 0.9, 0.001, x0.9 every 3,000,000 samples; section 4.4: no dropout.
    # Epsilon is TensorFlow's default: with the 1.0 of Inception's scripts, whose rates are 50 times as high, a loss
    # that is a mean over many classes hardly moves the weights (docs/log.md).
    "jft": Recipe(
        name="jft",
        model="xception",
        epochs=5,
        batch_size=32,
        dropout=0.0,
        polyak_decay=0.9999,
        optimizer=OptimizerConfig(
            optimizer="rmsprop", learning_rate=0.001, momentum=0.9, rho=0.9, epsilon=1e-10, weight_decay=1e-5
        ),
        schedule=ScheduleConfig(schedule="exponential", decay_factor=0.9, decay_samples=3_000_000),
        loss=LossConfig(loss="sigmoid"),
        input=_PHOTOGRAPHS,
        augment=Augment(random_resized_crop=(0.08, 1.0), horizontal_flip=0.5),
        stated=(
            "optimizer",
            "learning_rate",
            "momentum",
            "schedule",
            "decay_factor",
            "decay_samples",
            "weight_decay",
            "dropout",
            "loss",
        ),
    ),
    # A new head first, on a trunk that is left alone; then everything, the trunk ten times slower, with the
    # batch norm statistics that the trunk was trained with: small data would only blur them.
    "finetune": Recipe(
        name="finetune",
        model="xception",
        epochs=12,
        batch_size=32,
        dropout=0.3,
        polyak_decay=0.99,
        head_epochs=3,
        norm_statistics="frozen",
        optimizer=OptimizerConfig(
            optimizer="adamw",
            learning_rate=1e-3,
            momentum=0.9,
            weight_decay=0.01,
            clip_norm=1.0,
            trunk_factor=0.1,
        ),
        schedule=ScheduleConfig(schedule="cosine", warmup_epochs=0.5),
        loss=LossConfig(label_smoothing=0.1),
        input=_PHOTOGRAPHS,
        augment=Augment(random_resized_crop=(0.35, 1.0), horizontal_flip=0.5),
    ),
    # A new head on a trunk that stays as it is. Its features of an image are always the same, so that they are
    # computed once, and an epoch costs next to nothing; images are therefore seen as evaluation sees them.
    "head": Recipe(
        name="head",
        model="xception",
        epochs=30,
        batch_size=32,
        dropout=0.3,
        polyak_decay=0.99,
        head_epochs=None,
        norm_statistics="frozen",
        optimizer=OptimizerConfig(
            optimizer="adamw", learning_rate=1e-3, momentum=0.9, weight_decay=0.01, clip_norm=1.0
        ),
        schedule=ScheduleConfig(schedule="cosine"),
        loss=LossConfig(label_smoothing=0.1),
        input=_PHOTOGRAPHS,
    ),
    # Images of 28 to 64 pixels from scratch, on a CPU, in minutes.
    "small": Recipe(
        name="small",
        model="xception_small",
        epochs=14,
        batch_size=128,
        dropout=0.1,
        polyak_decay=0.998,
        precision="auto",
        optimizer=OptimizerConfig(optimizer="sgd", learning_rate=0.3, momentum=0.9, weight_decay=2e-4),
        schedule=ScheduleConfig(schedule="cosine", warmup_epochs=1.0),
        loss=LossConfig(label_smoothing=0.1),
        input=InputConfig(val_fraction=0.05),
        augment=Augment(translate_pixels=2, horizontal_flip=0.5, random_erasing=0.25),
    ),
}

_MAX_RECIPE_BYTES = 1 << 20

# Section 4.4: the weight decay that the paper found for Inception V3, whichever the data.
_INCEPTION_WEIGHT_DECAY = 4e-5


def default_recipe(weights: object) -> str:
    """The recipe where none is named: trained weights are fine-tuned, random ones are trained as small images are."""
    return "small" if weights is None else "finetune"


def named_recipe(name: str, *, model: str | None = None) -> Recipe:
    """The recipe called `name`, for `model` (default: the recipe's own).

    The paper's two recipes give Inception networks a weight decay of 4e-5 and all others 1e-5 (section 4.4).
    """
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"unknown recipe {name!r}{hint}; expected one of {', '.join(NAMED)}")
    recipe = NAMED[name]
    if model is None:
        return recipe
    if name in ("imagenet", "jft") and model.startswith("inception"):
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, weight_decay=_INCEPTION_WEIGHT_DECAY))
    return replace(recipe, model=model)


def find_recipe(name: str, *, model: str | None = None) -> Recipe:
    """The recipe called `name`, or the one in the file of that path where it ends in .json, for `model`."""
    if not name.endswith(".json"):
        return named_recipe(name, model=model)
    recipe = read_recipe(name)
    return recipe if model is None else replace(recipe, model=model)


def read_recipe(path: str) -> Recipe:
    """The recipe in a JSON file: what `recipe_to_dict` gives, by itself or under "recipe" as in a run folder.

    Fields that are missing keep the values of the recipe that the file names. Raises `ConfigError` with one line.
    """
    where = printable(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_RECIPE_BYTES + 1)
        values = json.loads(data) if len(data) <= _MAX_RECIPE_BYTES else None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{where}: expected a recipe as JSON, such as a run folder's recipe.json")
    try:
        return recipe_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `recipe_to_dict` gave; `ConfigError` for unknown fields and values that do not fit."""
    recipe = NAMED.get(values.get("name", ""), NAMED["small"])
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in PARTS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} must hold fields; got {value!r:.60}")
            part = getattr(recipe, name)
            _require_fields(part, value)
            changes[name] = _checked_replace(part, dict(value))
        else:
            changes[name] = value
    _require_fields(recipe, changes)
    return typing.cast(Recipe, _checked_replace(recipe, changes))


def _require_fields(config: Any, values: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(config)}
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown recipe field {name!r:.60}; expected one of {', '.join(sorted(known))}")


def recipe_fields() -> dict[str, str]:
    """Every field that can be set, by its flat name -> the part that holds it ('' for the recipe itself).

    Flat names are unique, so that ``learning_rate=...`` needs no prefix; `optimizer`, `schedule` and `loss` name
    the choice inside the part of the same name.
    """
    flat: dict[str, str] = {}
    for f in fields(Recipe):
        if f.name not in PARTS and f.name not in ("name", "stated"):
            flat[f.name] = ""
    for part in PARTS:
        part_type = type(getattr(NAMED["small"], part))
        for f in fields(part_type):
            assert f.name not in flat, f"two recipe fields are called {f.name}"
            flat[f.name] = part
    return flat


def override(recipe: Recipe, **values: Any) -> Recipe:
    """`recipe` with some fields, by their flat names, set to other values; `ConfigError` for unknown ones."""
    home = recipe_fields()
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in home:
            near = difflib.get_close_matches(name, home, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"unknown recipe field {name!r}{hint}; expected one of {', '.join(sorted(home))}")
        changes.setdefault(home[name], {})[name] = value
    for part in PARTS:
        if part in changes:
            changed = _checked_replace(getattr(recipe, part), changes.pop(part))
            changes.setdefault("", {})[part] = changed
    return _checked_replace(recipe, changes.get("", {})) if changes else recipe


def _checked_replace(config: Any, changes: dict[str, Any]) -> Any:
    """`dataclasses.replace` after holding each value against the field's annotation."""
    hints = typing.get_type_hints(type(config))
    fitted = {name: _fit(name, value, hints[name]) for name, value in changes.items()}
    return replace(config, **fitted)


def _fit(name: str, value: Any, expected: Any) -> Any:
    """`value` as the annotation `expected` has it (an int serves as a float, a list as a tuple), else `ConfigError`."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{name} must be one of {', '.join(map(str, args))}; got {value!r}")
    if args and type(None) in args:
        if value is None:
            return None
        return _fit(name, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if isinstance(value, (list, tuple)) and (args[-1] is Ellipsis or len(value) == len(args)):
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
            return tuple(_fit(name, v, k) for v, k in zip(value, kinds, strict=True))
    elif dataclasses.is_dataclass(expected):
        if isinstance(value, typing.cast(type, expected)):
            return value
    elif expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is expected:
        return value
    raise ConfigError(f"{name} must be {getattr(expected, '__name__', expected)}; got {value!r}")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """JSON-safe nested dictionary of all fields."""
    as_dict = dataclasses.asdict(recipe)
    as_dict["stated"] = list(recipe.stated)
    if recipe.augment.random_resized_crop is not None:
        as_dict["augment"]["random_resized_crop"] = list(recipe.augment.random_resized_crop)
    return as_dict


def flat_values(recipe: Recipe) -> dict[str, Any]:
    """Every settable field by its flat name."""
    return {name: getattr(getattr(recipe, part) if part else recipe, name) for name, part in recipe_fields().items()}
