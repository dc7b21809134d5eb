"""The CUDA kernels of layer_norm, run thread by thread on the CPU."""

import torch

from tests import emulated


def test_a_row_of_768():
    x, residual, weight, bias = (torch.randn(shape) for shape in ((5, 768), (5, 768), (768,), (768,)))
    y, z, mean, rstd = emulated.layer_norm_forward(
        x, residual, None, None, weight, bias, None, None, 0, 0, 1e-5, True
    )
    assert torch.equal(z, x + residual)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (768,), weight, bias))
    torch.testing.assert_close(mean, z.mean(1))
    torch.testing.assert_close(rstd, (z.var(1, unbiased=False) + 1e-5).rsqrt())


