"""What timm or torchvision computes with a PyTorch file's tensors; nothing in the file is run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError
from xception.weights.foreign import ForeignFile, Recognised
from xception.weights.names_torch import ALIGNED, COUNTER, SCHEMES, recognise_torch
from xception.weights.torch_file import read_torch_file

_IMAGES = 2
# Layers of torch.nn that a classifier may have between its linear ones, and the arguments that decide what they do.
_BETWEEN = ("ReLU", "ELU", "GELU", "SiLU", "Tanh", "Sigmoid", "Softplus", "LeakyReLU", "SELU")
_ARGUMENTS = ("alpha", "approximate", "beta", "negative_slope", "threshold")
_TIMM_NAMES = {"xception": "legacy_xception", "inception_v3_torchvision": "inception_v3"}


@dataclass(frozen=True, kw_only=True)
class TheirNumbers:
    """What `framework`, a name and a version, computes of the network's `inputs` (N C H W): logits, or features."""

    framework: str
    inputs: Tensor
    outputs: Tensor


def pictures(size: tuple[int, int], channels: int) -> Tensor:
    """Always the same images, N C H W with whole numbers from 0 to 255: clouds with some noise, one of them darker."""
    generator = torch.Generator().manual_seed(0)
    clouds = torch.rand((_IMAGES, channels, 7, 7), generator=generator)
    clouds = nn.functional.interpolate(clouds, size=size, mode="bilinear")
    noise = torch.rand((_IMAGES, channels, *size), generator=generator)
    brightness = torch.linspace(1, 0.4, _IMAGES)[:, None, None, None]
    return ((0.8 * clouds + 0.2 * noise) * brightness * 255).round()


def run_torch(path: str, preprocess: Preprocess, *, trunk_only: bool) -> TheirNumbers:
    """The file's tensors in the network of the library that has it, at the size of `preprocess`.

    With `trunk_only` the outputs are pooled features. Raises `ConfigError` where the library's network is another.
    """
    file = read_torch_file(path)
    found = recognise_torch(file, trunk_only=trunk_only)
    assert found is not None  # else there would be no target
    scheme, prefix = next(
        (scheme, name.removesuffix(scheme.anchor))
        for scheme in SCHEMES
        for name in file.tensors
        if name == scheme.anchor or name.endswith("." + scheme.anchor)
    )
    framework, network = _their_network(found, trunk_only=trunk_only)
    beside = tuple(f"{name}." for name in (*scheme.auxiliary, *scheme.heads))
    state = {
        name[len(prefix) :]: tensor.read()
        for name, tensor in file.tensors.items()
        if name not in found.ignored and not name[len(prefix) :].startswith(beside)
    }
    if not trunk_only:
        classifier = _their_classifier(file, found)
        (network.head if scheme is ALIGNED else network).fc = classifier
        state |= {f"{scheme.heads[0]}.{name}": tensor for name, tensor in classifier.state_dict().items()}
    _load(network, state, framework)
    inputs = preprocess.normalize(pictures(preprocess.size, preprocess.channels))
    with torch.no_grad():
        return TheirNumbers(framework=framework, inputs=inputs, outputs=network.float().eval()(inputs))


def _their_network(found: Recognised, *, trunk_only: bool) -> tuple[str, Any]:
    """Framework with version, and its network with random weights, without a classifier."""
    if found.format.startswith("torchvision "):
        torchvision = importlib.import_module("torchvision")
        make = getattr(torchvision.models, found.format.partition(" ")[2])
        network = make(weights=None, aux_logits=False, init_weights=False, transform_input=False)
        network.fc = nn.Identity()
        return f"torchvision {torchvision.__version__}", network
    timm: Any = importlib.import_module("timm")
    network = timm.create_model(
        _TIMM_NAMES.get(found.model, found.model),
        num_classes=0,
        in_chans=found.config["in_channels"],
        global_pool="avg" if trunk_only else found.config["pooling"],
    )
    if found.config.get("stem") == "small":  # segmentation_models_pytorch pads where timm does not
        network.conv1.padding = network.conv2.padding = (1, 1)
    return f"timm {timm.__version__}", network


def _their_classifier(file: ForeignFile, found: Recognised) -> nn.Module:
    """The file's classifier in torch's own layers, with its weights; what follows its last linear layer is left out."""
    places = [p.theirs.removesuffix(".weight") for p in found.pairs if _is_linear(p.ours)]
    layers: list[nn.Module] = []
    for i, place in enumerate(places):
        weight, bias = (file.tensors[f"{place}.{leaf}"].read().float() for leaf in ("weight", "bias"))
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, *(_between(file, place, places[i + 1]) if i + 1 < len(places) else ())]
    return nn.Sequential(*layers)


def _is_linear(ours: str) -> bool:
    return ours.startswith("classifier.") and ours.endswith(".weight")


def _between(file: ForeignFile, place: str, following: str) -> Iterator[nn.Module]:
    """The activations that a whole pickled module has between two linear layers."""
    modules: Mapping[str, Mapping[str, Any]] = file.facts["modules"]
    paths = list(modules)
    for path in paths[paths.index(place) + 1 : paths.index(following)]:
        kind = str(modules[path].get("class")).rpartition(".")[2]
        if kind in _BETWEEN:
            yield getattr(nn, kind)(**{name: modules[path][name] for name in _ARGUMENTS if name in modules[path]})


def _load(network: nn.Module, state: dict[str, Tensor], framework: str) -> None:
    """All of `state` into all of `network`; only counters of batches may be missing."""
    own = network.state_dict()
    for name, tensor in state.items():
        if name in own and tensor.dim() == 2 and own[name].dim() == 4:  # Cadene's first file has matrices
            state[name] = tensor[:, :, None, None]
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise ConfigError(f"{framework} cannot load the file: {reason}") from None
    if wrong := [*(name for name in missing if not name.endswith(COUNTER)), *unexpected]:
        raise ConfigError(f"{framework} has another network: {', '.join(wrong[:3])}")
