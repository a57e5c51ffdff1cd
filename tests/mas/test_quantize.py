from functools import partial

import pytest
import torch

import mas.quantize
from mas.quantize import (
    FloatLinear,
    Int8Linear,
    Int8WeightLinear,
    can_pack,
    make_int8,
    sums_are_exact,
)
from mas.rounding import to_int8

INT8 = [Int8WeightLinear] + [Int8Linear] * sums_are_exact()
LINEARS = {
    "float64": partial(FloatLinear, dtype=torch.float64),
    "float32": partial(FloatLinear, dtype=torch.float32),
    "bfloat16": partial(FloatLinear, dtype=torch.bfloat16),
    **{make.__name__: make for make in INT8},
}


def make_inputs(rows=9, inputs=256, outputs=128):
    generator = torch.Generator().manual_seed(0)
    weight_VK = torch.randn(outputs, inputs, generator=generator) / 16
    return weight_VK, torch.randn(rows, inputs, generator=generator)


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_every_layer_multiplies_by_the_transposed_weight(make):
    weight_VK, x_RK = make_inputs()
    result = make(weight_VK)(x_RK)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x_RK @ weight_VK.T, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_a_row_is_the_same_alone(make):
    weight_VK, x_RK = make_inputs()
    linear = make(weight_VK)
    for rows in range(1, 9):
        assert torch.equal(linear(x_RK)[:rows], linear(x_RK[:rows]))


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_rows_and_outputs_of_zeros_stay_zeros(make):
    weight_VK, x_RK = make_inputs()
    weight_VK[3], x_RK[2] = 0, 0
    result = make(weight_VK)(x_RK)
    assert result.isfinite().all() and (result[2] == 0).all() and (result[:, 3] == 0).all()


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_nan_in_inputs_or_weights_comes_out(make):
    weight_VK, x_RK = make_inputs()
    x_RK[1, 0] = float("nan")
    assert make(weight_VK)(x_RK)[1].isnan().all()
    weight_VK[2, 5] = float("nan")
    assert make(weight_VK)(x_RK)[:, 2].isnan().all()


@pytest.mark.skipif(not sums_are_exact(), reason="this CPU has no exact 8-bit sums")
def test_int8_is_exact_integer_arithmetic_between_the_roundings():
    weight_VK, x_RK = make_inputs()
    integers_VK, scale_V = to_int8(weight_VK)
    step_R1 = x_RK.abs().amax(1, keepdim=True) / 127
    sums_RV = (x_RK / step_R1).round().double() @ integers_VK.double().T
    expected = sums_RV * step_R1.double() * scale_V.double()
    torch.testing.assert_close(Int8Linear(weight_VK)(x_RK).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_cpu_with_overflowing_sums_gets_the_other_int8_layer(monkeypatch):
    monkeypatch.setattr(mas.quantize, "sums_are_exact", lambda: False)
    assert isinstance(make_int8(make_inputs()[0]), Int8WeightLinear)


@pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")
def test_floats_are_packed_and_packing_can_be_done_without(monkeypatch):
    weight_VK, x_RK = make_inputs()
    packed = FloatLinear(weight_VK, torch.float32)
    monkeypatch.setattr(mas.quantize, "can_pack", lambda dtype: False)
    plain = FloatLinear(weight_VK, torch.float32)
    assert packed.packed and not plain.packed
    torch.testing.assert_close(packed(x_RK), plain(x_RK), rtol=1e-5, atol=1e-5)
