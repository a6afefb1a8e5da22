"""What batch normalisation does once a channel, against PyTorch's in float64; and arrays that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xception.ops import backend

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension"),
]

if backend.native_available():
    from xception._native import UnitTrainer

MEAN, VARIANCE, SCALE, SHIFT = range(4)
PIXELS = 50


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 70),
    epsilon=st.sampled_from([1e-3, 1e-5, 0.1]),
    given_gamma=st.booleans(),
    given_beta=st.booleans(),
    of_batch=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(
    channels: int, epsilon: float, given_gamma: bool, given_beta: bool, of_batch: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    z = (random(PIXELS, channels) * 2 + random(channels)).requires_grad_()
    gradient = random(PIXELS, channels)
    gamma, beta = (random(channels).float().double().requires_grad_() for _ in range(2))
    mean, variance = (z.mean(0), z.var(0, unbiased=False)) if of_batch else (random(channels), random(channels) ** 2)
    y = (z - mean) / (variance + epsilon).sqrt()
    y = (y * gamma if given_gamma else y) + (beta if given_beta else 0)
    wanted = [z, *([gamma] if given_gamma else []), *([beta] if given_beta else [])]
    expected = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, gradient), strict=True))

    norm = np.full((4, channels), np.nan, np.float32)
    norm[MEAN], norm[VARIANCE] = mean.detach().numpy(), variance.detach().numpy()
    UnitTrainer.normalise(
        norm,
        gamma=gamma.detach().float().numpy() if given_gamma else None,
        beta=beta.detach().float().numpy() if given_beta else None,
        epsilon=epsilon,
    )
    values = z.detach().numpy()
    np.testing.assert_allclose(values * norm[SCALE] + norm[SHIFT], y.detach().numpy(), rtol=1e-4, atol=2e-5)

    centred = z.detach() - torch.from_numpy(norm[MEAN]).double()
    sums = torch.stack([gradient.sum(0), (gradient * centred).sum(0)]).float().numpy()
    gradients, factors = np.full((2, channels), np.nan, np.float32), np.full((3, channels), np.nan, np.float32)
    UnitTrainer.norm_gradients(
        norm, epsilon=epsilon, pixels=PIXELS if of_batch else 0, sums=sums, gradients=gradients, factors=factors
    )
    if given_gamma:
        np.testing.assert_allclose(gradients[0], expected[id(gamma)].numpy(), rtol=1e-4, atol=1e-4)
    if given_beta:
        np.testing.assert_allclose(gradients[1], expected[id(beta)].numpy(), rtol=1e-4, atol=1e-4)
    of_z = factors[0] * gradient.numpy() + factors[1] * values + factors[2]
    bound = 1e-4 * max(1.0, float(np.abs(factors[0]).max()))
    np.testing.assert_allclose(of_z, expected[id(z)].numpy(), rtol=1e-4, atol=bound)
    if not of_batch:
        assert not factors[1:].any()


def arguments() -> dict[str, dict[str, Any]]:
    def numbers(*shape: int) -> Any:
        return np.ones(shape, np.float32)

    return {
        "normalise": {"norm": numbers(4, 5), "gamma": numbers(5), "beta": numbers(5), "epsilon": 1e-3},
        "norm_gradients": {
            "norm": numbers(4, 5), "epsilon": 1e-3, "pixels": 9, "sums": numbers(2, 5), "gradients": numbers(2, 5),
            "factors": numbers(3, 5),
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method, given in arguments().items() for name, value in given.items() if np.ndim(value)],
)
def test_arrays_that_do_not_fit(method: str, name: str) -> None:
    call, right = getattr(UnitTrainer, method), arguments()[method]
    call(**right)
    array = right[name]
    wrong: list[Any] = [
        array.astype(np.float64), array.astype(np.int32), array.reshape(-1)[:-1].copy(), array[..., ::2],
        np.zeros((*array.shape[:-1], 6), np.float32), np.zeros((0, 5), np.float32), array.tolist(), "numbers",
    ]  # fmt: skip
    for value in wrong:
        with pytest.raises((TypeError, ValueError)):
            call(**(right | {name: value}))
    if name not in ("gamma", "beta"):
        with pytest.raises(TypeError):
            call(**(right | {name: None}))


@pytest.mark.parametrize("epsilon", [-1.0, float("nan")])
def test_numbers_out_of_range(epsilon: float) -> None:
    for method, right in arguments().items():
        with pytest.raises(ValueError, match="expected an epsilon"):
            getattr(UnitTrainer, method)(**(right | {"epsilon": epsilon}))
    with pytest.raises(ValueError, match="expected a number of pixels"):
        UnitTrainer.norm_gradients(**(arguments()["norm_gradients"] | {"pixels": -1}))
    with pytest.raises(ValueError, match="four rows"):
        UnitTrainer.normalise(np.ones((3, 5), np.float32), gamma=None, beta=None, epsilon=1e-3)
