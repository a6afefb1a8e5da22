"""Training by the compiled extension learns as PyTorch does: its loss stays among those of PyTorch's own seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xception import create_model
from xception.data.builtin import fashion_arrays
from xception.ops.backend import use_backend

STEPS, WINDOW, BATCH = 200, 20, 64
SEEDS = (0, 1, 2, 3)


def losses(images: torch.Tensor, labels: torch.Tensor, *, backend: str, seed: int, precision: str) -> np.ndarray:
    """The mean loss of each `WINDOW` steps; the seed draws weights and batches."""
    torch.manual_seed(seed)
    model = create_model("xception_small", num_classes=10, in_channels=1).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    found = []
    with use_backend(backend):  # type: ignore[arg-type]
        for step in range(STEPS):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images[chosen])
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(float(loss.detach()))
    return np.array(found).reshape(-1, WINDOW).mean(1)


@pytest.mark.slow
@pytest.mark.native
def test_curve_of_200_steps_stays_within_the_spread_of_the_reference_s_seeds() -> None:
    pixels, targets = fashion_arrays(root=None, download=False)["train"]
    images = (torch.from_numpy(pixels[: STEPS * BATCH].reshape(-1, 1, 28, 28).astype(np.float32)) / 255 - 0.286) / 0.353
    labels = torch.from_numpy(targets[: STEPS * BATCH].astype(np.int64))
    reference = np.stack([losses(images, labels, backend="reference", seed=s, precision="fp32") for s in SEEDS])
    assert (reference[:, -1] < 0.5 * reference[:, 0]).all(), "it is to learn something"
    low, high = reference.min(0), reference.max(0)
    spread = high - low
    for precision in ("fp32", "bf16"):
        for seed in SEEDS[:2]:
            found = losses(images, labels, backend="native", seed=seed, precision=precision)
            outside = np.maximum(low - found, found - high)
            # One seed more would widen that spread now and then: by half of it in a window, never on average.
            assert (outside <= spread / 2).all(), (precision, seed, found, low, high)
            assert low.mean() - spread.mean() / 4 <= found.mean() <= high.mean() + spread.mean() / 4, (precision, seed)
            assert np.abs(found - reference[seed])[0] <= spread[0], "the same seed begins alike"
