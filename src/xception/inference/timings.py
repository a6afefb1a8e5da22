"""How long a stream of images took, and which of decoding and the network held it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class Timings:
    """Filled by `Predictor.predict_paths` while its results are taken; all times are wall clock, in seconds.

    Both rates are what was reached beside the other, on the processors that both share.
    """

    images: int = 0
    """Results, failures among them."""
    seconds: float = 0.0
    """From the first result being asked for to the last one being there."""
    workers: int = 0
    """Threads that decode."""
    decoded: int = 0
    """Files read and decoded, or found to be bad."""
    decoding_seconds: float = 0.0
    """Summed over the threads."""
    computed: int = 0
    """Images through the network."""
    network_seconds: float = 0.0

    @property
    def decoding_rate(self) -> float | None:
        """Images a second that one thread decoded; None where there is nothing to tell it from."""
        return self.decoded / self.decoding_seconds if self.decoded and self.decoding_seconds > 0 else None

    @property
    def network_rate(self) -> float | None:
        """Images a second that the network computed; None where there is nothing to tell it from."""
        return self.computed / self.network_seconds if self.computed and self.network_seconds > 0 else None

    @property
    def slower(self) -> Literal["decoding", "network"] | None:
        """Which of the two, all decoding threads together, held the other up."""
        decoding, network = self.decoding_rate, self.network_rate
        if decoding is None or network is None:
            return None
        return "decoding" if decoding * self.workers < network else "network"
