"""The head that every network of the family ends in: pool, hidden layers if any, dropout, logistic regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.fields import MAX_CLASSES, check_dropout, check_range, check_widths

HiddenActivation = Literal[
    "none", "relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "leaky_relu", "selu"
]  # fmt: skip
Pooling = Literal["avg", "max"]

# `leaky_relu` is Keras's: slope 0.2 below zero.
_ACTIVATIONS: dict[HiddenActivation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "selu": F.selu,
}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What comes after the features; the paper's ImageNet head by default (section 3, Fig. 5).

    pooling: over the whole map, the average or the maximum.
    fully_connected: widths of hidden layers before the logistic regression; (4096, 4096) for the JFT rows.
    hidden_activations: one a hidden layer, or () for ReLU after each.
    dropout: rate before the logistic regression, while training.
    """

    num_classes: int = 1000
    pooling: Pooling = "avg"
    fully_connected: tuple[int, ...] = ()
    hidden_activations: tuple[HiddenActivation, ...] = ()
    dropout: float = 0.0

    def check_head(self) -> None:
        """Raise `ConfigError` for a value out of its range (for `__post_init__`, after `check_fields`)."""
        check_range("num_classes", self.num_classes, 1, MAX_CLASSES)
        check_widths("fully_connected", self.fully_connected)
        check_dropout(self.dropout)
        if self.hidden_activations and len(self.hidden_activations) != len(self.fully_connected):
            raise ConfigError(
                f"hidden_activations must be one for each of {len(self.fully_connected)} fully_connected layers, or "
                f"none; got {len(self.hidden_activations)}"
            )

    def classifier(self, in_features: int) -> Classifier:
        """The head itself, for features of `in_features` channels."""
        return Classifier(
            in_features,
            self.num_classes,
            dropout=self.dropout,
            fully_connected=self.fully_connected,
            hidden_activations=self.hidden_activations,
            pooling=self.pooling,
        )


class Classifier(nn.Module):
    """Global pool, fully connected layers if any, dropout, logistic regression (section 3).

    N C H W -> N `num_classes`, or N C' with ``pre_logits=True``: what the logistic regression reads.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        fully_connected: tuple[int, ...] = (),
        hidden_activations: tuple[HiddenActivation, ...] = (),
        pooling: Pooling = "avg",
    ) -> None:
        super().__init__()
        if unknown := set(hidden_activations) - set(get_args(HiddenActivation)):
            raise ConfigError(f"hidden_activations must be of {', '.join(_ACTIVATIONS)}; got {sorted(unknown)[0]!r}")
        widths = (in_features, *fully_connected)
        self.pooling = pooling
        self.hidden_activations: tuple[HiddenActivation, ...] = hidden_activations or _relu(len(fully_connected))
        self.fully_connected = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(widths[-1], num_classes)

    def pool(self, features: Tensor) -> Tensor:
        """The average, or the maximum, over the whole map: N C H W -> N C."""
        return features.mean(dim=(2, 3)) if self.pooling == "avg" else features.amax(dim=(2, 3))

    def forward(self, features: Tensor, *, pre_logits: bool = False) -> Tensor:
        x = self.pool(features)
        for layer, name in zip(self.fully_connected, self.hidden_activations, strict=True):
            x = _ACTIVATIONS[name](layer(x))
        if pre_logits:
            return x
        logits: Tensor = self.linear(self.dropout(x))
        return logits

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}, hidden_activations={self.hidden_activations}"


def _relu(count: int) -> tuple[HiddenActivation, ...]:
    relu: HiddenActivation = "relu"
    return (relu,) * count
