"""Units that train in the compiled extension, against their definition in float64: every level, option and odd size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trainer_cases import (
    LEVELS,
    assert_errors_are_of_the_size_of_torchs_own,
    assert_gradients_are_right,
    assert_takes_the_definition,
    at_every_level,
    distance,
    leaves,
    native,
    right_of,
    run,
    run_native,
    watched,
)
from trainer_oracle import assert_the_oracle_is_the_definition, check
from unit_cases import FIXED, POOLS, Case, data_for

from xception.ops import backend, reference, trainer, units

ODD = st.sampled_from([1, 3, 5, 15, 16, 17, 32, 33, 47])


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    images, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if draw(st.integers(0, 7)) == 0:
        height = width = 1
    gathers = draw(st.booleans()) if images * height * width > 5 else False
    widths = tuple(draw(st.lists(ODD, min_size=1, max_size=4)))
    channels = draw(ODD)
    # In bfloat16 the winners are the oracle's only where its numbers are exact: behind one unit.
    pool = draw(st.sampled_from(["none", *POOLS])) if kind == "fp32" or len(widths) == 1 else "none"
    shortcut = draw(st.sampled_from(["none", "input", "tensor", "convolution"]))
    halves = pool in ("same", "torch")
    if shortcut == "input" and not halves:
        channels = widths[-1]
    elif shortcut == "input":
        shortcut = "none"
    pixels = images * height * width if not halves else images * -(-height // 2) * -(-width // 2)
    return Case(
        images=images,
        height=height,
        width=width,
        channels=channels,
        widths=widths,
        dilation=draw(st.integers(1, 3)),
        input_relu=draw(st.booleans()),
        output_relu=pool == shortcut == "none" and draw(st.booleans()),
        shortcut=shortcut,
        shortcut_kernel=draw(st.sampled_from([1, 1, 3])),
        shortcut_gathers=pixels > 5 and draw(st.booleans()),
        pool=pool,
        gathers=gathers,
        momentum=draw(st.sampled_from([0.1, 0.7, None])),
        affine=draw(st.booleans()),
        epsilon=draw(st.sampled_from([1e-3, 1e-5])),
        seed=draw(st.integers(0, 10**6)),
    )


def check_case(case: Case, level: str, kind: str, count: int) -> None:
    rounds = kind == "bf16" and len(case.widths) > 1
    check(data_for(case, kind, tame=kind == "bf16"), level, kind, count, kink=0.02 if rounds else 1e-4)


@native
@at_every_level
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(draw=st.data(), count=st.integers(1, 3))
def test_generated(level: str, kind: str, draw: st.DataObject, count: int) -> None:
    check_case(draw.draw(cases(kind)), level, kind, count)


@native
@pytest.mark.slow
@pytest.mark.timeout(3600)
@at_every_level
@settings(max_examples=3000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(draw=st.data(), count=st.integers(1, 3))
def test_generated_at_length(level: str, kind: str, draw: st.DataObject, count: int) -> None:
    check_case(draw.draw(cases(kind)), level, kind, count)


@settings(max_examples=40)
@given(case=cases("fp32"))
@example(case=Case(pool="dense_dilated", height=2, width=1, gathers=False))
def test_the_oracle_is_the_definition(case: Case) -> None:
    assert_the_oracle_is_the_definition(data_for(case))


@native
@at_every_level
@pytest.mark.parametrize("case", FIXED)
def test_errors_are_of_the_size_of_torchs_own(case: str, level: str, kind: str) -> None:
    assert_errors_are_of_the_size_of_torchs_own(data_for(FIXED[case], kind), level, kind)


@pytest.mark.parametrize(
    "case",
    [
        Case(height=3, width=4, channels=3, widths=(2, 3), shortcut="input", momentum=None),
        Case(height=3, width=5, channels=2, widths=(3,), shortcut="tensor", pool="same", momentum=None),
        Case(height=3, width=4, channels=2, widths=(3,), shortcut="convolution", pool="same", momentum=None),
        Case(height=3, width=3, channels=2, widths=(3,), output_relu=True, gathers=False, dilation=2),
    ],
    ids=["input", "tensor", "convolution", "relu"],
)
def test_gradients_of_the_definition(case: Case) -> None:
    assert_gradients_are_right(data_for(case))


# ----------------------------------------------------------------------------------------- parts that are not there


@native
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("missing", [("0.scale",), ("1.offset", "shortcut.scale"), ("0.offset", "shortcut.offset")])
def test_without_scale_or_offset(missing: tuple[str, ...], gathers: bool) -> None:
    data = data_for(Case(widths=(6, 7), gathers=gathers, shortcut="convolution")).having(dict.fromkeys(missing))
    right, found = right_of(data), run_native(data, "scalar", "fp32")
    for name, value in right.items():
        assert distance(found[name], value) <= 1e-5 * float(value.norm()), name


@native
def test_statistics_that_nobody_keeps() -> None:
    """No running statistics at all; or none that move."""
    data = data_for(Case(widths=(6, 7), momentum=None, shortcut="convolution"))
    bare = data.having(dict.fromkeys(name for name in data.tensors if "running" in name))
    assert len(data.tensors) - len(bare.tensors) == 6
    found, right = run_native(bare, "scalar", "fp32"), run_native(data, "scalar", "fp32")
    assert all(torch.equal(value, right[name]) for name, value in found.items())
    assert all(torch.equal(right[name], data.tensors[name]) for name in data.tensors if "running" in name)


# ----------------------------------------------------------------------------------------- which path is taken


@native
@pytest.mark.parametrize(("cap", "level"), [("scalar", "scalar"), ("avx2", "avx2"), ("avx512", "avx512")])
def test_the_cap_chooses_the_level(cap: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (level, "fp32") not in LEVELS:
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv(backend.CAP_VARIABLE, cap)
    with watched() as taken:
        run(units.separable_units, data_for(Case()))
        assert {call.args[:2] for call in taken.call_args_list} == {(level, "fp32")}
        assert trainer.trainer(level, "fp32", torch.get_num_threads()).level == level


@native
@pytest.mark.parametrize(
    "case",
    [
        Case(output_relu=True, shortcut="tensor"),
        Case(output_relu=True, shortcut="input", widths=(5,)),
        Case(output_relu=True, shortcut="convolution"),
        Case(output_relu=True, pool="same"),
        Case(dilation=65, height=3, width=3),
        Case(shortcut="convolution", shortcut_kernel=17, height=17, width=17),
        Case(images=1, height=1, width=(1 << 14) + 1, channels=1, widths=(1,)),
        Case(widths=(), shortcut="input"),
    ],
    ids=["tensor", "input", "convolution", "pool", "dilation", "kernel", "row", "no units"],
)
def test_what_no_kernel_knows_takes_the_definition(case: Case) -> None:
    assert_takes_the_definition(data_for(case))


ONE_PIXEL = {
    "of a unit": Case(images=1, height=1, width=1),
    "of a shortcut": Case(images=1, height=2, width=2, shortcut="convolution", pool="same"),
    "of a shortcut alone": Case(images=1, height=1, width=1, gathers=False, shortcut="convolution"),
}


@pytest.mark.parametrize("case", ONE_PIXEL)
def test_one_pixel_has_no_variance(case: str) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(units.separable_units, data_for(ONE_PIXEL[case]))


WRONG = {
    "shortcut": ("tensor", (2, 6, 9, 7)),  # as many numbers as the output, lying otherwise
    "a row of shortcut": ("tensor", (2, 6, 7, 8)),
    "0.depthwise": ("none", (4, 1, 3, 3)),
    "0.pointwise": ("none", (6, 4, 1, 1)),
    "0.scale": ("none", (5,)),
    "0.offset": ("none", (7,)),
    "one for all 0.scale": ("none", (1,)),
    "one for all 0.offset": ("none", (1,)),
    "0.running_mean": ("none", (5,)),
    "0.running_variance": ("none", (7,)),
    "shortcut.weight": ("convolution", (7, 5, 1, 1)),
    "channels of shortcut.weight": ("convolution", (6, 4, 1, 1)),
    "kernel of shortcut.weight": ("convolution", (6, 5, 3, 3)),
    "shortcut.scale": ("convolution", (5,)),
    "shortcut.offset": ("convolution", (7,)),
    "shortcut.running_mean": ("convolution", (5,)),
    "shortcut.running_variance": ("convolution", (7,)),
}


@native
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("gathers", [False, True])
def test_wrong_sizes_are_refused(name: str, gathers: bool) -> None:
    shortcut, shape = WRONG[name]
    case = Case(gathers=gathers, shortcut_gathers=gathers, shortcut=shortcut)
    data = data_for(case).having({name.split()[-1]: torch.ones(shape)})
    for function in (units.separable_units, reference.separable_units):
        with pytest.raises((RuntimeError, ValueError)):
            data.call(function, leaves(data, wanted=frozenset(["x"])))
