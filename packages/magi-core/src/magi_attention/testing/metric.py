# SPDX-License-Identifier: Apache-2.0
"""How far two tensors may be apart."""

import torch
from torch import Tensor


def assert_within_pytorch_error(
    actual: Tensor,
    reference64: Tensor,
    pytorch_same_dtype: Tensor,
    factor: float = 2.0,
    name: str = "tensor",
    granted: float = 0.0,
) -> None:
    """Fail if ``actual`` is further from the truth than ``factor`` times what plain PyTorch is.

    One unit in the last place of the largest finite value is granted on top, for tensors that PyTorch happens to get
    exactly right. Infinities must stand in the same places with the same sign; no value may be NaN.

    Args:
        actual: what is tested, of any dtype.
        reference64: the same, computed in float64.
        pytorch_same_dtype: the same, computed by plain PyTorch in the dtype under test, and stored in it.
        factor: how many times PyTorch's largest error is allowed.
        name: what the tensor is, for the message.
        granted: an absolute error that is always allowed, on top.
    """
    actual, reference = actual.detach().double(), reference64.detach()
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    finite = reference.isfinite()
    assert torch.equal(actual[~finite], reference[~finite]), f"{name}: infinities differ from the reference's"
    if not finite.any():
        return
    error = (actual - reference)[finite].abs().max().item()
    pytorch_error = (pytorch_same_dtype.detach().double() - reference)[finite].abs().max().item()
    last_place = torch.finfo(pytorch_same_dtype.dtype).eps * reference[finite].abs().max().item()
    allowed = factor * pytorch_error + last_place + granted
    # Written so that a NaN fails.
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (plain PyTorch {pytorch_error:.3e})"


def assert_close(
    a: Tensor,
    b: Tensor,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    mismatch_threshold: float = 0,
    test_case: str = "",
    print_rank: int = 0,
) -> None:
    """Fail if more than a share ``mismatch_threshold`` of the elements differ by over ``atol + rtol * |b|``.

    ``print_rank`` is accepted for compatibility; nothing is printed.
    """
    assert a.shape == b.shape, f"{test_case}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    mismatched = ~torch.isclose(a, b.to(a.dtype), rtol=rtol, atol=atol)
    share = mismatched.double().mean().item() if a.numel() else 0.0
    assert share <= mismatch_threshold, (
        f"{test_case}: {share:.3%} of the elements differ by over {atol} + {rtol} * |b|, allowed are "
        f"{mismatch_threshold:.3%}; the largest difference is {(a - b.to(a.dtype))[mismatched].abs().max().item():.3e}"
    )
