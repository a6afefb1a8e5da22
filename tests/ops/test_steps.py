"""The compiled steps against their formulas in float64, at every instruction-set level, and what they refuse."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xception.ops import backend
from xception.ops.steps import Arrays, Rows, Unsuitable

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not backend.native_available(), reason="needs the compiled extension"),
]

LEVELS = ("scalar", "avx2", "avx512")
SENTINEL = 12345.0


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in backend.available_levels():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv(backend.CAP_VARIABLE, request.param)
    assert backend.vector_level() == request.param
    return str(request.param)


def inside(size: int, seed: int, *, positive: bool = False) -> Tensor:
    """Random numbers, between sentinels, at an address that is no multiple of a vector."""
    whole = torch.full((size + 10,), SENTINEL)
    part = whole[5 : 5 + size]
    part.copy_(torch.randn(size, generator=torch.Generator().manual_seed(seed)))
    return part.abs_() if positive else part


def untouched_outside(part: Tensor) -> bool:
    size = part.numel()
    whole = torch.as_strided(part, (size + 10,), (1,), part.storage_offset() - 5)
    return bool((whole[:5] == SENTINEL).all() and (whole[5 + size :] == SENTINEL).all())


def arrays(size: int, seed: int = 0) -> Arrays:
    return Arrays(
        weight=inside(size, seed),
        gradient=inside(size, seed + 1),
        first=inside(size, seed + 2),
        second=inside(size, seed + 3, positive=True),
        average=inside(size, seed + 4),
    )


def parts(of: Arrays) -> dict[str, Tensor]:
    names = ("weight", "gradient", "first", "second", "average")
    return {name: getattr(of, name) for name in names}


def expected(rule: str, of: Arrays, c: dict[str, Any]) -> dict[str, Tensor]:
    """The step in float64, in the open."""
    v = {name: tensor.double().clone() for name, tensor in parts(of).items()}
    w, g, m, s = v["weight"], v["gradient"] * c["scale"], v["first"], v["second"]
    if rule == "sgd":
        d = g + c["decay"] * w if c["decays"] else g
        if c["momentum"]:
            m = d if c["begins"] else c["first"] * m + d
            d = d + c["first"] * m if c["nesterov"] else m
        w = w - c["rate"] * d
    elif rule == "rmsprop":
        d = g + c["decay"] * w if c["decays"] else g
        s = c["second"] * s + c["rest"] * d * d
        m = c["first"] * m + c["rate"] * d / (s + c["epsilon"]).sqrt()
        w = w - m
    elif rule == "adamw":
        w = w * c["decay"] if c["decays"] else w
        m = m + c["first"] * (g - m)
        s = c["second"] * s + c["rest"] * g * g
        w = w - c["rate"] * m / (s.sqrt() / c["correction"] + c["epsilon"])
    a = v["average"] + c["share"] * (w - v["average"])
    return {"weight": w, "gradient": v["gradient"], "first": m, "second": s, "average": a}


def coefficients(rule: str, **given: Any) -> dict[str, Any]:
    return {
        "nesterov": False, "momentum": True, "begins": False, "decays": True, "scale": 0.7, "rate": 0.03,
        "decay": 0.99 if rule == "adamw" else 0.01, "first": 0.9, "second": 0.95, "rest": 0.05, "epsilon": 0.01,
        "correction": 0.3, "share": 0.002, **given,
    }  # fmt: skip


CASES: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("average", {"share": 0.9}),
    ("rmsprop", {}),
    ("rmsprop", {"decays": False, "share": 0.5}),
    ("adamw", {"first": 0.1}),
    ("adamw", {"first": 0.6, "decays": False, "share": 0.9}),
    *(
        ("sgd", {"momentum": momentum, "begins": begins, "nesterov": nesterov, "decays": decays})
        for momentum, begins, nesterov in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, False, True),
            (True, True, True),
        )
        for decays in (False, True)
    ),
]


@pytest.mark.parametrize(("rule", "given"), CASES)
@pytest.mark.parametrize("sizes", [(1,), (0, 3, 17), (1000, 1, 31, 4099)])
def test_every_rule_is_its_formula(level: str, rule: str, given: dict[str, Any], sizes: tuple[int, ...]) -> None:
    c = coefficients(rule, **given)
    all_arrays = [arrays(size, 10 * i) for i, size in enumerate(sizes)]
    wanted = [expected(rule, of, c) for of in all_arrays]
    before = [{name: t.clone() for name, t in parts(of).items()} for of in all_arrays]
    Rows(all_arrays).step(rule, **c)  # type: ignore[arg-type]
    for of, want, old in zip(all_arrays, wanted, before, strict=True):
        for name, tensor in parts(of).items():
            torch.testing.assert_close(tensor.double(), want[name], rtol=2e-6, atol=2e-6, msg=f"{rule} {name}")
            assert untouched_outside(tensor), name
        assert torch.equal(of.gradient, old["gradient"])  # type: ignore[arg-type]
        if rule == "average":
            assert torch.equal(of.weight, old["weight"])
        if not (rule in ("rmsprop", "adamw") or (rule == "sgd" and c["momentum"])):
            assert torch.equal(of.first, old["first"])  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["sgd", "rmsprop", "adamw", "average"])
def test_all_levels_and_numbers_of_threads_give_the_same_bits(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is rounded once, everywhere: vectors and threads only deal out the numbers."""
    results = []
    threads = torch.get_num_threads()
    try:
        for name in backend.available_levels():
            if name not in LEVELS:
                continue
            for count in (1, 2, 3):
                monkeypatch.setenv(backend.CAP_VARIABLE, name)
                torch.set_num_threads(count)
                several = [arrays(size, size) for size in (5, 77, 10_007, 16, 333)]
                for _ in range(3):
                    Rows(several).step(rule, **coefficients(rule))  # type: ignore[arg-type]
                results.append(torch.cat([t for of in several for t in parts(of).values()]))
    finally:
        torch.set_num_threads(threads)
    assert len(results) >= 3
    assert all(torch.equal(results[0], other) for other in results)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["sgd", "rmsprop", "adamw", "average"]),
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
    st.floats(0, 1, width=32),
    st.floats(0, 0.99),
    st.booleans(),
)
def test_any_sizes_and_shares(
    level: str, rule: str, sizes: list[int], share: float, first: float, decays: bool
) -> None:
    c = coefficients(rule, share=share, first=first, decays=decays)
    several = [arrays(size, i) for i, size in enumerate(sizes)]
    wanted = [expected(rule, of, c) for of in several]
    Rows(several).step(rule, **c)  # type: ignore[arg-type]
    for of, want in zip(several, wanted, strict=True):
        for name, tensor in parts(of).items():
            torch.testing.assert_close(tensor.double(), want[name], rtol=4e-6, atol=4e-6)
            assert untouched_outside(tensor)


def test_what_is_not_finite_is_carried(level: str) -> None:
    of = arrays(40)
    assert of.gradient is not None
    assert of.average is not None
    of.gradient[3], of.gradient[39] = math.nan, math.inf
    Rows([of]).step("sgd", **coefficients("sgd"))
    assert torch.isnan(of.weight).nonzero().flatten().tolist() == [3]
    assert of.weight[39] == -math.inf
    assert of.average[39] == -math.inf
    assert int(torch.isfinite(of.average).sum()) == 38


def test_arrays_that_are_left_out_are_not_written(level: str) -> None:
    weight, gradient = inside(50, 1), inside(50, 2)
    start = weight.clone()
    Rows([Arrays(weight=weight, gradient=gradient)]).step("sgd", rate=0.5)
    torch.testing.assert_close(weight, start - 0.5 * gradient)


def test_a_change_can_be_seen_in_the_version() -> None:
    of = arrays(4)
    versions = [t._version for t in (of.weight, of.first, of.average)]  # type: ignore[union-attr]
    Rows([of]).step("sgd", **coefficients("sgd"))
    assert all(
        t._version > old  # type: ignore[union-attr]
        for t, old in zip((of.weight, of.first, of.average), versions, strict=True)
    )


def test_channels_last_arrays_are_taken_as_they_lie() -> None:
    def tensor(seed: int) -> Tensor:
        made = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
        return made.to(memory_format=torch.channels_last)

    weight, gradient = nn.Parameter(tensor(0)), tensor(1)
    start = weight.detach().clone()
    Rows([Arrays(weight=weight, gradient=gradient)]).step("sgd", rate=0.25)
    torch.testing.assert_close(weight.detach(), start - 0.25 * gradient)


def unsuitable_arrays() -> Iterator[tuple[str, Arrays]]:
    w = torch.zeros(4, 3, 3, 3)
    yield "float32", Arrays(weight=w.double())
    yield "float32", Arrays(weight=w, gradient=w.bfloat16())
    yield "on the CPU", Arrays(weight=torch.empty(4, device="meta"))
    yield "the weight's shape", Arrays(weight=w, gradient=torch.zeros(4, 3, 3, 2))
    yield "strides", Arrays(weight=torch.zeros(4, 4).t()[:3])
    yield "strides", Arrays(weight=torch.zeros(1, 4).expand(3, 4))
    yield "strides", Arrays(weight=w, average=w.clone(memory_format=torch.channels_last))
    yield "strides", Arrays(weight=w.to(memory_format=torch.channels_last), first=w)
    yield "sparse", Arrays(weight=torch.zeros(4, 4), gradient=torch.zeros(4, 4).to_sparse())
    with torch.inference_mode():
        yield "inference", Arrays(weight=torch.zeros(3))

    class Other(Tensor):
        pass

    yield "plain tensor", Arrays(weight=torch.zeros(3).as_subclass(Other))


@pytest.mark.parametrize(("why", "of"), list(unsuitable_arrays()))
def test_an_array_that_does_not_fit_is_refused(why: str, of: Arrays) -> None:
    with pytest.raises(Unsuitable, match=why):
        Rows([of])


@pytest.mark.parametrize(
    ("rule", "of"),
    [
        ("sgd", Arrays(weight=torch.zeros(3))),
        ("average", Arrays(weight=torch.zeros(3))),
        ("rmsprop", Arrays(weight=torch.zeros(3), gradient=torch.zeros(3), first=torch.zeros(3))),
        ("adamw", Arrays(weight=torch.zeros(3), gradient=torch.zeros(3), second=torch.zeros(3))),
    ],
)
def test_a_rule_without_its_arrays_is_an_error(rule: str, of: Arrays) -> None:
    with pytest.raises(ValueError, match="address"):
        Rows([of]).step(rule)  # type: ignore[arg-type]


def test_the_extension_refuses_what_is_no_table_of_addresses() -> None:
    optimiser = backend.new_optimiser(1)
    rows = np.zeros((1, 6), np.uint64)
    for wrong in (rows.astype(np.int64), rows.astype(np.float64), rows[0], np.zeros((2, 12), np.uint64)[:, ::2]):
        with pytest.raises(TypeError):
            optimiser.step(wrong, "sgd")
    with pytest.raises(ValueError, match="five addresses"):
        optimiser.step(np.zeros((1, 5), np.uint64), "sgd")
    with pytest.raises(ValueError, match="unknown rule"):
        optimiser.step(rows, "adagrad")
    rows[0] = (2, 4, 4, 4, 4, 1)
    with pytest.raises(ValueError, match="float32"):
        optimiser.step(rows, "sgd")
    rows[0] = (4, 4, 4, 4, 4, 2**41)
    with pytest.raises(ValueError, match="numbers"):
        optimiser.step(rows, "sgd")
    for threads in (0, -1, 5000):
        with pytest.raises(ValueError, match="threads"):
            backend.new_optimiser(threads)


def test_many_threads_may_step_at_once() -> None:
    """They wait for each other; each has its own weights."""
    several = [arrays(5000, 0) for _ in range(8)]

    def work(of: Arrays) -> None:
        for _ in range(50):
            Rows([of]).step("sgd", **coefficients("sgd"))

    started = [threading.Thread(target=work, args=(of,)) for of in several]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert all(torch.equal(several[0].weight, of.weight) for of in several)
    assert not torch.equal(several[0].weight, arrays(5000, 0).weight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_steps_after_a_fork() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here, there = arrays(5000, 0), arrays(5000, 0)
        Rows([arrays(5000, 9)]).step("sgd", **coefficients("sgd"))  # the team has begun
        Rows([here]).step("sgd", **coefficients("sgd"))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # no pytest in here, whatever happens
            try:
                Rows([there]).step("sgd", **coefficients("sgd"))
                os.write(write, there.weight.numpy().tobytes()[:4000])
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            found = stream.read()
        os.waitpid(child, 0)
    finally:
        torch.set_num_threads(threads)
    assert found == here.weight.numpy().tobytes()[:4000]
