"""What a caller may ask of a network: its logits, its features, or those pooled into one embedding an image."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from xception.models.head import Classifier

Output: TypeAlias = Literal["logits", "features", "pooled"]
OUTPUTS: tuple[Output, ...] = ("logits", "features", "pooled")


def pooled(model: Any, features: Tensor) -> Tensor:
    """Features to one embedding an image, N C.

    Of our own networks the average or the maximum over the map, as the head has it; of another library's network
    what the last layer of its head reads.
    """
    head = model.classifier
    found: Tensor = (
        head.pool(features) if isinstance(head, Classifier) else model.forward_head(features, pre_logits=True)
    )
    return found


class AllOutputs(nn.Module):
    """N C H W -> every output of `network`, in the order of `OUTPUTS`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network: Any = self.network
        features = network.forward_features(x)
        return network.forward_head(features), features, pooled(network, features)
