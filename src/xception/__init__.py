"""Xception and its Inception family: train, evaluate and use image classifiers.

    import xception
    xception.train("photos", out="run")                     # a folder of class folders
    xception.load("run").predict("cat.jpg")                 # labels and scores
    xception.create_model("xception", num_classes=10)       # a plain torch module

The names below are the public interface; each is imported when it is first used, so that ``import xception``
is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xception._version import __version__

if TYPE_CHECKING:
    from xception.data.decode import decode_image as decode_image
    from xception.data.preprocess import Preprocess as Preprocess
    from xception.data.sources import open_source as open_source
    from xception.errors import XceptionError as XceptionError
    from xception.evaluation.evaluate import evaluate as evaluate
    from xception.inference.compiled import CompiledModel as CompiledModel
    from xception.inference.compiled import compile_model as compile  # noqa: F401 - in _HOMES
    from xception.inference.predictor import Predictor as Predictor
    from xception.models.registry import describe as describe
    from xception.models.registry import list_models as list_models
    from xception.training.recipe import Recipe as Recipe
    from xception.training.recipe import named_recipe as named_recipe
    from xception.training.train import train as train
    from xception.weights.bundle import load_bundle as load_bundle
    from xception.weights.bundle import save_bundle as save_bundle
    from xception.weights.convert import convert as convert
    from xception.weights.load import create_model as create_model

_HOMES = {
    "CompiledModel": "xception.inference.compiled",
    "Predictor": "xception.inference.predictor",
    "Preprocess": "xception.data.preprocess",
    "Recipe": "xception.training.recipe",
    "XceptionError": "xception.errors",
    "compile": "xception.inference.compiled",
    "convert": "xception.weights.convert",
    "create_model": "xception.weights.load",
    "decode_image": "xception.data.decode",
    "describe": "xception.models.registry",
    "evaluate": "xception.evaluation.evaluate",
    "list_models": "xception.models.registry",
    "load_bundle": "xception.weights.bundle",
    "named_recipe": "xception.training.recipe",
    "open_source": "xception.data.sources",
    "save_bundle": "xception.weights.bundle",
    "train": "xception.training.train",
}

_NAMES_THERE = {"compile": "compile_model"}  # `compile` is a word of Python's own

__all__ = ["__version__", "load", *sorted(_HOMES)]


def load(source: Any, *, device: str | None = None, **options: Any) -> Predictor:
    """The trained model of a run folder, bundle, public checkpoint file or published name, ready to `predict`.

    `options` are those of `Predictor.load`: precision, num_threads, backend, fast_decode. Raises `WeightsError` where
    `source` is none of these.
    """
    from xception.inference.predictor import Predictor

    return Predictor.load(source, device=device, **options)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), _NAMES_THERE.get(name, name))
    raise AttributeError(f"module 'xception' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
