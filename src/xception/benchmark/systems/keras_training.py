"""Training in Keras on each backend that is installed; bf16 is its mixed precision, with weights in fp32."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Variant
from xception.benchmark.memory import kept
from xception.benchmark.systems import keras_models

if TYPE_CHECKING:
    from xception.benchmark.steps import Done, Step


def load(case: Case, folder: Path, pixels: NDArray[Any]) -> Loaded:
    import numpy as np

    from xception.benchmark.networks import KERAS
    from xception.benchmark.steps import LABELS, LEARNING_RATE, MOMENTUM, loaded

    keras: Any = import_module("keras")
    if case.variant == "tensorflow":
        tensorflow: Any = import_module("tensorflow")
        tensorflow.config.threading.set_intra_op_parallelism_threads(case.threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    model = keras.models.load_model(folder / KERAS, compile=False, safe_mode=True)
    model.layers[-1].activation = keras.activations.linear  # logits instead of probabilities
    if case.precision == "bf16":
        model = _mixed(model)
    labels = np.load(folder / LABELS)[: case.batch].astype(np.int32)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    optimizer.build(model.trainable_variables)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_of(images: Any) -> Any:
        return entropy(labels, keras.ops.cast(model(images, training=True), "float32"))

    make = _step_of_tensorflow if case.variant == "tensorflow" else _step_of_torch
    return loaded(make(case, model, optimizer, loss_of, pixels), len(pixels))


def _mixed(model: Any) -> Any:
    """The same model computing in bfloat16, its weights as they are."""

    def described(config: Any) -> Any:
        if isinstance(config, list):
            return [described(value) for value in config]
        if not isinstance(config, dict):
            return config
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {"name": "mixed_bfloat16"}}
        return {key: described(value) for key, value in config.items()}

    half = type(model).from_config(described(model.get_config()))
    half.set_weights(model.get_weights())
    return half


def _step_of_torch(case: Case, model: Any, optimizer: Any, loss_of: Any, pixels: NDArray[Any]) -> Step:
    import torch

    torch.set_num_threads(case.threads)
    learning = model.trainable_variables

    def step(done: Done, norm: bool) -> tuple[float, float]:
        images = torch.from_numpy(pixels).to(torch.float32).div_(127.5).sub_(1)
        done("data")
        model.zero_grad()
        loss = loss_of(images)
        done("forward")
        loss.backward()
        done("backward")
        gradients = [variable.value.grad for variable in learning]
        found = float(torch.nn.utils.get_total_norm(gradients)) if norm else float("nan")
        with torch.no_grad():
            optimizer.apply(gradients, learning)
        done("optimiser")
        return float(loss.detach()), found

    return step


def _step_of_tensorflow(case: Case, model: Any, optimizer: Any, loss_of: Any, pixels: NDArray[Any]) -> Step:
    """Forward, backward and update are one graph, so that their shares cannot be told."""
    tensorflow: Any = import_module("tensorflow")
    learning = model.trainable_variables

    def update(images: Any, norm: bool) -> tuple[Any, Any]:
        with tensorflow.GradientTape() as tape:
            loss = loss_of(images)
        gradients = tape.gradient(loss, [variable.value for variable in learning])
        found = tensorflow.linalg.global_norm(gradients) if norm else loss
        optimizer.apply(gradients, learning)
        return loss, found

    graph = tensorflow.function(update)

    def step(done: Done, norm: bool) -> tuple[float, float]:
        images = tensorflow.cast(tensorflow.constant(pixels), tensorflow.float32) / 127.5 - 1
        done("data")
        loss, found = graph(images, norm)
        return float(loss), float(found)

    return step


def environment(case: Case) -> dict[str, str]:
    return {**keras_models.environment(case), **kept()}


SYSTEM = System(
    name="keras",
    needs=("keras",),
    files=("network.keras",),
    variants=tuple(
        Variant(name=backend, precision=precision, modes=("training",), needs=(backend,))
        for precision in ("fp32", "bf16")
        for backend in ("torch", "tensorflow")
    ),
    load=load,
    environment=environment,
)
