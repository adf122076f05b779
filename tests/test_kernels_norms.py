"""kernels/norms.py against its twins in float64, and the twins against the model's own functions."""

import pytest
import torch
import torch.nn.functional as F

from interpreter import GATES, poison, relative, shim
from kernels import norms
from kernels.norms import (rms_norm, rms_norm_reference, rotary, rotary_reference, swiglu, swiglu_reference)
from nanopatho.attention import rotary_tables, rotate
from nanopatho.decoder import mrope
from nanopatho.projector import RMSNorm

shim()


def gradients(function, inputs, upstream):
    """Outputs and gradients of every input; upstream one tensor an output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs)])
    return [o.detach() for o in outputs] + [leaf.grad for leaf in leaves]


def compare(kernel, twin, inputs, upstream, gate):
    got, want = gradients(kernel, inputs, upstream), gradients(twin, [x.double() for x in inputs], upstream)
    for i, (a, b) in enumerate(zip(got, want)):
        assert relative(a, b) < gate, f"tensor {i} of outputs and gradients"
        assert a.dtype == inputs[0].dtype and a.shape == b.shape


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 80), (1, 1, 1280), (3, 5, 2049)], ids=str)
def test_rms_norm(dtype, shape, poisoned):
    E = shape[-1]
    x, r, w = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(E, dtype=dtype, seed=2)
    up = random(*shape, seed=3), random(*shape, seed=4)
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), [x, w], up[:1],
            GATES[dtype])
    compare(lambda x, r, w: rms_norm(x, w, 1e-6, r), lambda x, r, w: rms_norm_reference(x, w, 1e-6, r), [x, r, w], up,
            GATES[dtype])


def test_rms_norm_walks_over_many_rows_and_takes_strided_ones(monkeypatch):
    monkeypatch.setattr(norms, "PROGRAMS", 3)  # more tiles than programs: the weight's gradient is a running sum
    monkeypatch.setattr(norms, "TILE", 128)
    x, w = random(50, 4, 64)[:, 1], random(64, seed=1)  # rows 256 apart
    compare(rms_norm, rms_norm_reference, [x, w], [random(64, 50, seed=2).T], 2e-6)  # a gradient with strided columns
    got = rms_norm(random(64, 50).T, w)
    assert relative(got, rms_norm_reference(random(64, 50).T.double(), w.double())) < 2e-6
    first, second = (gradients(rms_norm, [x, w], [random(50, 64, seed=3)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    none = gradients(rms_norm, [x[:0], w], [x[:0]])
    assert none[0].shape == (0, 64) and (none[2] == 0).all()


def test_rms_norm_twin_is_the_models():
    x, up, ours = random(6, 40), random(6, 40, seed=1), RMSNorm(40, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(random(40, seed=2))
    x.requires_grad_()
    y = ours(x)
    y.backward(up)
    twin = gradients(lambda x, w: rms_norm_reference(x, w, 1e-5), [x, ours.weight], [up])
    for a, b in zip((y, x.grad, ours.weight.grad), twin):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_multimodal_rotary(dtype, poisoned):
    """Kernel and twin against the decoder's own formula: three position axes, sections of 2, 3 and 3 pairs."""
    positions = torch.randint(0, 60, (3, 33), generator=torch.Generator().manual_seed(0))
    frequency = 1e4 ** -(torch.arange(8) / 8)
    angles = torch.arange(60)[:, None] * frequency
    cos, sin, axis = angles.cos(), angles.sin(), torch.tensor([0] * 2 + [1] * 3 + [2] * 3)
    x, up = random(33, 5, 16, dtype=dtype), random(33, 5, 16, seed=1)
    turn = lambda f: lambda x: f(x, cos, sin, positions, axis)
    compare(turn(rotary), turn(rotary_reference), [x], [up], GATES[dtype])
    table = [t[0] for t in mrope(positions[:, None].float(), 16, 1e4, [2, 3, 3])]
    want = rotate(x.double(), *(t.double() for t in table))
    assert relative(rotary(x.float(), cos, sin, positions, axis), want) < 2e-6


def test_rotary_of_a_vision_tower_from_tables_and_from_positions(poisoned):
    """D = 80, 40 pairs, no power of two; q and k of a fused qkv in one launch; half the pairs by row, half by column."""
    where = torch.cartesian_prod(torch.arange(4), torch.arange(5))  # (20, 2)
    frequency = 1e4 ** -(torch.arange(20) / 20)
    angles = (where[:, :, None] * frequency).flatten(1)  # (20, 40)
    qkv, up = random(20, 3, 2, 80), random(20, 4, 80, seed=1)
    compare(lambda qkv: rotary(qkv[:, :2].flatten(1, 2), angles.cos(), angles.sin()),
            lambda qkv: rotary_reference(qkv[:, :2].flatten(1, 2), angles.double().cos(), angles.double().sin()),
            [qkv], [up], 2e-6)
    x = qkv[:, 0]
    want = rotate(x.double(), *(t[:, None] for t in rotary_tables(angles.double(), torch.float64)))
    both = torch.arange(5)[:, None] * frequency.repeat(2)
    for got in (rotary(x, angles.cos(), angles.sin()),
                rotary(x, both.cos(), both.sin(), where.T, torch.tensor([0] * 20 + [1] * 20)),
                rotary(x.transpose(1, 2).contiguous().transpose(1, 2), angles.cos(), angles.sin())):
        assert relative(got, want) < 2e-6
    assert rotary(x[:0], angles[:0].cos(), angles[:0].sin()).shape == (0, 2, 80)


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_swiglu(dtype, poisoned):
    both, up = random(2, 9, 2 * 1100, dtype=dtype), random(2, 9, 1100, seed=1)
    compare(lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_reference(*x.chunk(2, -1)), [both], [up], GATES[dtype])
    compare(swiglu, swiglu_reference, [random(1, 3, dtype=dtype), random(1, 3, dtype=dtype, seed=2)], [random(1, 3)],
            GATES[dtype])


def test_swiglu_twin_is_the_models_and_far_values_stay_finite():
    g, u = random(4, 6), random(4, 6, seed=1)
    torch.testing.assert_close(swiglu_reference(g, u), F.silu(g) * u)
    g = torch.tensor([[-200.0, 200.0, 0.0]])
    got = gradients(swiglu, [g, torch.ones(1, 3)], [torch.ones(1, 3)])
    assert torch.equal(got[0], torch.tensor([[0.0, 200.0, 0.0]])) and all(x.isfinite().all() for x in got)
    assert swiglu(g[:0], g[:0]).shape == (0, 3)
