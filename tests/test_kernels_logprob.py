"""kernels/logprob.py against its twin in float64, the model's own loss, and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from interpreter import GATES, poison, relative, shim
from kernels import logprob
from kernels.logprob import cross_entropy, cross_entropy_reference, token_logps, token_logps_reference

shim()
IDS = [3, 1500, 2099]


def case(dtype, K=13, V=2100, E=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(K, E, generator=g).to(dtype), torch.randn(V, E, generator=g).to(dtype)
    targets = torch.randint(4, V - 1, (K,), generator=g)
    targets[targets == 1500] = 7
    return h, weight, targets, torch.randn(K, generator=g)


def run(function, h, weight, targets, upstream, **options):
    """-> value and gradients of h and weight, for a loss that weights every token differently."""
    h, weight = h.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = function(h, weight, targets, **options)
    (out * upstream.to(out.dtype)).sum().backward()
    return out.detach(), h.grad, weight.grad


@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, banned=IDS)], ids=["plain", "temperature, banned"])
@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_forward_and_gradients(dtype, options, monkeypatch):
    """Three chunks of the vocabulary, the last one ragged; one row is not trained, banned words have no gradient."""
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 1)  # the smallest chunk: 1024 words
    h, weight, targets, upstream = case(dtype)
    targets[5] = -100
    poison(monkeypatch)
    got = run(token_logps, h, weight, targets, upstream, **options)
    want = run(token_logps_reference, h.double(), weight.double(), targets, upstream, **options)
    for name, a, b in zip(("logp", "dh", "dW"), got, want):
        assert relative(a, b) < GATES[dtype], name
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    assert got[0][5] == 0 and (got[1][5] == 0).all()
    if options:
        assert (got[2][IDS] == 0).all()
    # h and weight are exact in fp32, and so is everything up to the result: closer than their own dtype could hold
    assert relative(got[0], want[0]) < 2e-6


def test_logits_in_half_precision_are_the_price_of_half_the_traffic():
    h, weight, targets, upstream = case(torch.bfloat16)
    want = run(token_logps_reference, h.double(), weight.double(), targets, upstream)
    got = run(token_logps, h, weight, targets, upstream, dtype=torch.bfloat16)
    plain = run(token_logps_reference, h, weight, targets, upstream, dtype=torch.bfloat16)
    for a, b, p in zip(got, want, plain):
        assert relative(a, b) < 2 * max(relative(p, b), 6e-3)


def test_cross_entropy_is_torchs_and_the_twins():
    h, weight, targets, _ = case(torch.float32)
    targets[[0, 4]] = -100
    for reduction in ("mean", "sum"):
        want = F.cross_entropy(h.double() @ weight.double().T, targets, reduction=reduction)
        assert relative(cross_entropy(h, weight, targets, reduction=reduction), want) < 2e-6
        twin = cross_entropy_reference(h.double(), weight.double(), targets, reduction=reduction)
        assert relative(twin, want) < 1e-12


def test_gradient_against_finite_differences():
    h, weight, targets, upstream = (x.double() if x.is_floating_point() else x for x in case(torch.float32, 2, 9, 3))
    targets = torch.tensor([4, 8])

    def loss(h, weight):
        return (token_logps_reference(h, weight, targets, temperature=0.5, banned=[1]) * upstream).sum()

    assert torch.autograd.gradcheck(loss, (h.requires_grad_(), weight.requires_grad_()))


def test_one_row_no_rows_and_frozen_halves():
    h, weight, targets, _ = case(torch.float32, K=1)
    assert relative(token_logps(h, weight, targets), token_logps_reference(h.double(), weight.double(), targets)) < 2e-6
    none = run(token_logps, h[:0], weight, targets[:0], torch.ones(0))
    assert none[0].shape == (0,) and (none[2] == 0).all()
    weight.requires_grad_(False)
    token_logps(h.requires_grad_(), weight, targets).sum().backward()
    assert h.grad is not None and weight.grad is None
    frozen = h.detach()
    token_logps(frozen, weight.requires_grad_(), targets).sum().backward()
    assert frozen.grad is None and weight.grad is not None


def test_strided_inputs_and_many_blocks(monkeypatch):
    """h, weight and targets are views; a block shorter than the chunk makes the rows' inner loop turn."""
    monkeypatch.setattr(logprob, "BLOCK", 512)
    h, weight, targets, upstream = case(torch.float32, K=5)
    wide, stacked = torch.stack((h, h), 2), torch.stack((weight, weight), 0)
    twice = torch.stack((targets, targets), 1)
    got = run(token_logps, wide[..., 0], stacked[1], twice[:, 0], upstream[:5])
    want = run(token_logps_reference, h.double(), weight.double(), targets, upstream[:5])
    assert all(relative(a, b) < 2e-6 for a, b in zip(got, want))


def test_mistakes_are_named_and_a_foreign_target_is_nan():
    h, weight, targets, _ = case(torch.float32, K=2)
    with pytest.raises(ValueError, match="temperature 0"):
        token_logps(h, weight, targets, temperature=0)
    with pytest.raises(ValueError, match="of one dtype"):
        token_logps(h.half(), weight, targets)
    assert token_logps(h, weight, torch.tensor([7, 2100])).isnan().tolist() == [False, True]
