"""kernels/vision.py against its twin in float64, in Triton's interpreter; the twin against the vision tower."""

import pytest
import torch

from interpreter import GATES, poison, relative, shim
from kernels.vision import full_attention, rotate, vision_reference, window_attention
from nanopatho import vit
from nanopatho import attention
from nanopatho.attention import segment_attention

shim()


def tower(grids, D):
    """Images with windows cut off at the border -> cos, sin (P, D/2), window bounds, image bounds, its tables."""
    tables = vit.batch_tables(tuple((1, *g) for g in grids), 2, 4, D, "cpu")
    windows, images = [0], [0]
    for rows, cols in grids:
        for cells in vit.window_order(rows // 2, cols // 2, 4)[1]:
            windows.append(windows[-1] + 4 * cells)
        images.append(images[-1] + rows * cols)
    return tables.cos[:, 0, :D // 2], tables.sin[:, 0, D // 2:], windows, images, tables


def inputs(P, H, D, dtype):
    """qkv (P, 3, H, D) and the gradient of the output, both views of wider tensors."""
    g = torch.Generator().manual_seed(0)
    qkv, do = torch.randn(P, 3, H + 1, D, generator=g), torch.randn(H, P, D, generator=g)
    return qkv.to(dtype)[:, :, 1:], do.to(dtype).transpose(0, 1)


def gradients(function, qkv, do, *args):
    qkv = qkv.detach().requires_grad_()
    o = function(qkv, *args)
    return o, torch.autograd.grad(o, qkv, do)[0]


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("function, D, H", [
    (window_attention, 80, 4), (window_attention, 64, 3), (window_attention, 32, 2), (full_attention, 80, 2)])
def test_kernels_equal_the_twin(monkeypatch, dtype, function, D, H):
    cos, sin, windows, images, _ = tower([(10, 12), (2, 2)], D)  # windows of 64, 32, 16, 8 and 4 patches
    cu = windows if function is window_attention else images
    cu = cu[:2] + cu[1:]  # and an empty one
    qkv, do = inputs(len(cos), H, D, dtype)
    want = gradients(vision_reference, qkv.double(), do.double(), cos.double(), sin.double(), cu)
    poison(monkeypatch)
    got = gradients(function, qkv, do, cos, sin, cu)
    errors = {"o": relative(got[0], want[0])}
    errors |= {name: relative(a, b) for name, a, b in zip(("dq", "dk", "dv"), got[1].unbind(1), want[1].unbind(1))}
    assert all(e <= GATES[dtype] for e in errors.values()), errors


def test_one_patch_windows():
    """A softmax over one key is 1: the output is v, and q and k get no gradient."""
    cos, sin, *_ = tower([(2, 2)], 32)
    qkv, do = inputs(4, 1, 32, torch.float32)
    o, grad = gradients(window_attention, qkv, do, cos, sin, range(5))
    assert torch.equal(o, qkv[:, 2]) and torch.equal(grad[:, 2], do)
    assert grad[:, :2].abs().max() < 1e-6


def test_twin_equals_the_vision_tower():
    D = 80
    cos, sin, windows, images, tables = tower([(10, 12), (4, 6)], D)
    qkv, _ = inputs(len(cos), 2, D, torch.float64)
    q, k, v = qkv.unbind(1)
    assert relative(rotate(q, cos, sin), attention.rotate(q, tables.cos, tables.sin)) < 1e-15
    q, k = (attention.rotate(x, tables.cos, tables.sin) for x in (q, k))
    for cu, plan in ((windows, tables.windows), (images, tables.images)):
        assert relative(vision_reference(qkv, cos, sin, cu), segment_attention(q, k, v, plan)) < 1e-14


@pytest.mark.parametrize("cu", ([0, 64, 128], [0, 66], [1, 60, 66], [0, 40, 30, 66]))
def test_wrong_windows_are_refused(cu):
    with pytest.raises(ValueError, match="steps of at most 64"):
        window_attention(torch.zeros(66, 3, 2, 16), torch.zeros(66, 8), torch.zeros(66, 8), cu)


def test_wrong_tensors_are_refused():
    cos = torch.zeros(4, 8)
    for qkv, c in ((torch.zeros(4, 2, 2, 16), cos), (torch.zeros(4, 3, 2, 32), cos)):
        with pytest.raises(ValueError, match=r"expected \(P, 3, H, D\)"):
            window_attention(qkv, c, c, [0, 4])
    with pytest.raises(ValueError, match="head width 88"):  # 44 = 32 + 12
        window_attention(torch.zeros(4, 3, 2, 88), torch.zeros(4, 44), torch.zeros(4, 44), [0, 4])
