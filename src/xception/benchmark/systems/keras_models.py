"""Keras on each backend that is installed, with the weights of our network in a `.keras` file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from xception.benchmark.case import Case, Loaded, System, Variant


def load(case: Case, folder: Path, images: NDArray[Any]) -> Loaded:
    from xception.benchmark.networks import KERAS

    keras: Any = import_module("keras")
    model = keras.models.load_model(folder / KERAS, compile=False, safe_mode=True)
    model.layers[-1].activation = keras.activations.linear  # logits instead of probabilities
    if case.precision != "fp32":
        model = _in_half(keras, model)
    batch = keras.ops.convert_to_tensor(images.transpose(0, 2, 3, 1).copy(), dtype=model.compute_dtype)
    call = _on_tensorflow(model, batch, case) if case.variant == "tensorflow" else _on_torch(model, batch, case)

    def logits(result: Any) -> NDArray[Any]:
        found: NDArray[Any] = keras.ops.convert_to_numpy(keras.ops.cast(result, "float32"))
        return found

    return Loaded(call=call, logits=logits, images=len(images))


def _in_half(keras: Any, model: Any) -> Any:
    """The same model with all weights and activations in bfloat16."""
    keras.config.set_dtype_policy("bfloat16")
    weights = model.get_weights()

    def described(config: Any) -> Any:
        if isinstance(config, dict):
            return {key: described(value) for key, value in config.items()}
        if isinstance(config, list):
            return [described(value) for value in config]
        return "bfloat16" if config == "float32" else config

    half = type(model).from_config(described(model.get_config()))
    half.set_weights(weights)
    return half


def _on_torch(model: Any, batch: Any, case: Case) -> Any:
    import torch

    torch.set_num_threads(case.threads)

    def call() -> Any:
        with torch.inference_mode():
            return model(batch, training=False)

    return call


def _on_tensorflow(model: Any, batch: Any, case: Case) -> Any:
    tensorflow: Any = import_module("tensorflow")
    tensorflow.config.threading.set_intra_op_parallelism_threads(case.threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    graph = tensorflow.function(lambda x: model(x, training=False))
    return lambda: graph(batch).numpy()


def environment(case: Case) -> dict[str, str]:
    return {"KERAS_BACKEND": case.variant, "TF_CPP_MIN_LOG_LEVEL": "3"}


SYSTEM = System(
    name="keras",
    needs=("keras",),
    files=("network.keras",),
    variants=tuple(
        Variant(name=backend, precision=precision, needs=(backend,))
        for precision in ("fp32", "bf16")
        for backend in ("torch", "tensorflow")
    ),
    load=load,
    environment=environment,
)
