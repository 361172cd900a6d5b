import numpy as np
import pytest
import torch

from torchnnfs.testing.precision import PRECISIONS

FLOAT32 = PRECISIONS["float32"]


def test_precisions_are_torchs():
    for name, precision in PRECISIONS.items():
        dtype = getattr(torch, name)
        info = torch.finfo(dtype)
        assert precision.largest == info.max
        assert 2.0 ** (1 - precision.digits) == info.eps
        assert precision.smallest == info.smallest_normal * info.eps
        assert precision.roundoff >= info.eps / 2
        one_up = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(9.0, dtype=dtype))
        assert precision.ulp(np.array(3.0)) == one_up.double() - 3
    assert FLOAT32.ulp(np.array(0.0)) == 2.0**-149


def test_gamma_is_highams():
    assert FLOAT32.gamma(3) == 3 * FLOAT32.unit / (1 - 3 * FLOAT32.unit)
    assert FLOAT32.gamma(2**25) == np.inf


def test_half_types_round_once_on_top():
    y, error = np.array([1.0, 3e-8]), np.array([0.0, 0.0])
    half = PRECISIONS["float16"].stored(y, error)
    np.testing.assert_allclose(half, [2.0**-11 + 2.0**-25, 2.0**-25], rtol=1e-3)


@pytest.mark.parametrize("name", PRECISIONS)
def test_rounding_is_torchs(name):
    values = torch.cat([torch.randn(999), torch.logspace(-46, 38, 999), torch.zeros(1)]).double()
    theirs = values.to(getattr(torch, name)).double().numpy()
    np.testing.assert_array_equal(PRECISIONS[name].round(values.numpy()), theirs)


@pytest.mark.parametrize("name", PRECISIONS)
def test_what_is_not_finite_stays_so(name):
    values = np.array([np.inf, -np.inf, np.nan, 1e308 * 10])
    np.testing.assert_array_equal(PRECISIONS[name].round(values), values)
    assert (PRECISIONS[name].ulp(values) > 0).all()
