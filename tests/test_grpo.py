"""grpo.py against numbers and gradients worked out by hand, float64 loops, and its own promise of exact splitting."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanopatho.grpo import (AGGREGATIONS, aggregate, collapsed, describe, drop_truncated, group_advantages, keep_groups,
                            kl_k3, length_ok, loss_count, policy_loss, sampler_weights, soft_overlong_penalty)

F64 = torch.float64


def ragged(lengths, T, seed=0, dtype=F64, drift=0.3):
    """Random answers of the given lengths: logp (leaf), old, advantages, mask. drift pushes ratios out of the clip."""
    g = torch.Generator().manual_seed(seed)
    R = len(lengths)
    old = -torch.rand(R, T, generator=g, dtype=dtype) * 3
    logp = (old + drift * torch.randn(R, T, generator=g, dtype=dtype)).requires_grad_()
    A = torch.randn(R, generator=g, dtype=dtype)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return SimpleNamespace(logp=logp, old=old, A=A, mask=mask)


def one_token(ratio, A, **kw):
    """(loss, d loss / d logp) of a batch that is a single token with this ratio."""
    logp = torch.tensor([[math.log(ratio)]], dtype=F64, requires_grad=True)
    old, A = torch.zeros(1, 1, dtype=F64), torch.tensor([A], dtype=F64)
    loss, metrics = policy_loss(logp, old, A, torch.ones(1, 1), **kw)
    loss.backward()
    return loss.item(), logp.grad.item(), metrics


# ----------------------------------------------------------------------------------------------------------- advantages

def test_one_of_eight_correct():
    A = group_advantages(torch.tensor([1.0] + [0.0] * 7, dtype=F64), 8, eps=0)
    # mean 1/8, unbiased variance (49/64 + 7/64) / 7 = 1/8, so A = (7/8) * sqrt(8) and -(1/8) * sqrt(8)
    assert A[0].item() == pytest.approx(7 / math.sqrt(8), abs=1e-15) and A[0].item() == pytest.approx(2.4749, abs=5e-5)
    assert A[1:].tolist() == pytest.approx([-1 / math.sqrt(8)] * 7, abs=1e-15)


def test_advantages_equal_torch_std_and_eps_sits_beside_it():
    R = torch.rand(24, dtype=F64)
    groups = R.view(3, 8)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-3)
    torch.testing.assert_close(group_advantages(R, 8, eps=1e-3), want.view(-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(group_advantages(R, 8, std=False), (groups - groups.mean(1, keepdim=True)).view(-1))


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1.0, 0.0, 1e6])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-6])
def test_equal_rewards_are_exactly_zero_and_dropped(value, eps):
    """0.1 eight times in float32 has a standard deviation of 8e-9, not 0."""
    R = torch.full((8,), value)
    assert group_advantages(R, 8, eps=eps).tolist() == [0.0] * 8
    assert keep_groups(R, 8).tolist() == [False]


def test_nan_reward_leaves_its_group_alone():
    R = torch.tensor([1.0, 0.0, math.nan, 0.0, 1.0, math.nan, math.nan, math.nan], dtype=F64)
    A = group_advantages(R, 4)
    torch.testing.assert_close(A[[0, 1, 3]], group_advantages(R[[0, 1, 3]], 3))
    assert A[2] == 0 and A[4:].tolist() == [0.0] * 4          # one scored answer has nobody to be compared with
    assert keep_groups(R, 4).tolist() == [True, False]
    assert group_advantages(torch.full((4,), math.nan), 4).tolist() == [0.0] * 4


def test_bool_int_and_half_rewards():
    R = torch.tensor([1, 0, 0, 1])
    for other in (R.bool(), R.float(), R.half(), R.bfloat16()):
        assert torch.equal(group_advantages(R, 4), group_advantages(other, 4))
    assert group_advantages(R, 4).dtype == torch.float32


def test_group_order_is_interleaved():
    """Reward = number of the question: every advantage is 0. A tiled order (a b a b) would not be."""
    assert not group_advantages(torch.arange(4.0).repeat_interleave(8), 8).any()
    assert group_advantages(torch.arange(4.0).repeat(8), 8).any()


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="group_size=1"):
        group_advantages(torch.rand(4), 1)
    with pytest.raises(ValueError, match="cut into groups of 8"):
        group_advantages(torch.rand(12), 8)
    with pytest.raises(ValueError, match="cut into groups"):
        keep_groups(torch.rand(2, 4), 4)
    with pytest.raises(ValueError, match="NaN instead"):
        group_advantages(torch.tensor([1.0, math.inf]), 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0, -1.0]), min_size=8, max_size=8))
def test_advantages_sum_to_zero_and_keep_the_order(rewards):
    A = group_advantages(torch.tensor(rewards, dtype=F64), 8)
    assert abs(A.sum().item()) < 1e-9
    assert keep_groups(torch.tensor(rewards), 8).item() == (len(set(rewards)) > 1)
    for i in range(8):
        for j in range(8):
            assert rewards[i] <= rewards[j] or A[i] > A[j]


def test_filter_on_accuracy_drops_what_length_shaping_makes_uneven():
    accuracy, lengths = torch.zeros(8), torch.tensor([50, 60, 85, 90, 95, 99, 100, 100])
    shaped = accuracy + soft_overlong_penalty(lengths, 100, 20)
    assert keep_groups(accuracy, 8).tolist() == [False] and keep_groups(shaped, 8).tolist() == [True]


# ------------------------------------------------------------------------------------------------------------- clipping

@pytest.mark.parametrize("A, ratio, active, bound, low, high", [
    (2.0, 1.5, False, 1.28, 0, 1),      # better and already much likelier: stop
    (2.0, 0.5, True, 0.5, 0, 0),        # better but less likely: pull back, not clipped
    (-2.0, 1.5, True, 1.5, 0, 0),       # worse and likelier: push down, not clipped
    (-2.0, 0.5, False, 0.8, 1, 0),      # worse and already much less likely: stop
    (2.0, 1.25, True, 1.25, 0, 0),      # between 1.2 and 1.28: DAPO lets it grow …
    (2.0, 1.0, True, 1.0, 0, 0),
    (-2.0, 1.0, True, 1.0, 0, 0),
    (0.0, 1.5, False, 1.5, 0, 0),
])
def test_one_token_per_clip_case(A, ratio, active, bound, low, high):
    loss, grad, metrics = one_token(ratio, A, clip_low=0.2, clip_high=0.28)
    assert loss == pytest.approx(-bound * A, abs=1e-14)
    assert grad == pytest.approx(-A * ratio if active else 0.0, abs=1e-14)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (low, high)


def test_clip_higher_is_asymmetric():
    assert one_token(1.25, 2.0, clip_low=0.2, clip_high=0.2)[1] == 0                 # … and GRPO does not
    assert one_token(0.75, -2.0, clip_low=0.28, clip_high=0.2)[1] == pytest.approx(1.5)
    assert one_token(0.75, -2.0, clip_low=0.2, clip_high=0.28)[1] == 0


def test_dual_clip_bounds_bad_tokens_that_became_likely():
    assert one_token(5.0, -2.0)[:2] == pytest.approx((10.0, 10.0))
    loss, grad, metrics = one_token(5.0, -2.0, dual_clip=3.0)
    assert (loss, grad, metrics["clip_low"].item()) == pytest.approx((6.0, 0.0, 1.0))
    assert one_token(2.0, -2.0, dual_clip=3.0)[:2] == pytest.approx((4.0, 4.0))
    assert one_token(0.5, -2.0, dual_clip=3.0)[:2] == pytest.approx((1.6, 0.0))


def test_equals_the_minimum_as_written_in_the_paper():
    b = ragged([7, 3, 5, 1], 7, drift=0.5)
    r = (b.logp - b.old).exp()
    A = b.A[:, None]
    paper = -torch.minimum(r * A, r.clamp(0.8, 1.28) * A)
    want = (paper * b.mask).sum() / 16
    want_grad, = torch.autograd.grad(want, b.logp)
    loss, metrics = policy_loss(b.logp, b.old, b.A, b.mask, clip_low=0.2, clip_high=0.28)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-15)
    torch.testing.assert_close(b.logp.grad, want_grad, rtol=0, atol=1e-15)
    assert 0 < metrics["clip_low"] < 1 and 0 < metrics["clip_high"] < 1 and metrics["tokens"] == 16


def test_first_update_after_a_rollout_has_ratio_one():
    b = ragged([4, 2], 4)
    logp = b.old.clone().requires_grad_()
    loss, m = policy_loss(logp, b.old, b.A, b.mask, clip_low=0.0, clip_high=0.0)
    loss.backward()
    torch.testing.assert_close(logp.grad, -b.A[:, None] * b.mask / 6, rtol=0, atol=1e-15)
    assert (m["clip_low"], m["clip_high"], m["ratio_max"], m["ratio_min"], m["old_kl"]) == (0, 0, 1, 1, 0)


def test_clip_higher_changes_the_second_update():
    """40 sgd steps on one rollout of a softmax policy: clip 0.2 and 0.28 end with different weights."""
    ids, A = torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, -0.1], dtype=F64)

    def train(clip_high):
        w, clipped = torch.zeros(2, 4, dtype=F64, requires_grad=True), 0.0
        old = w.log_softmax(1)[:, None].expand(2, 2, 4).gather(2, ids[..., None])[..., 0].detach()
        for _ in range(40):
            logp = w.log_softmax(1)[:, None].expand(2, 2, 4).gather(2, ids[..., None])[..., 0]
            loss, m = policy_loss(logp, old, A, torch.ones(2, 2), clip_high=clip_high)
            grad, = torch.autograd.grad(loss, w)
            w = (w - 0.1 * grad).detach().requires_grad_()
            clipped += m["clip_high"].item()
        assert not old.requires_grad and clipped > 0
        return w
    assert (train(0.2) - train(0.28)).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- aggregation, normaliser

def test_gradients_of_the_three_aggregations():
    b = ragged([1, 4, 2, 0], 4, drift=0.0)      # one empty row: it is in no divisor
    n_tokens, n_rows, L = 7, 3, 10
    want = {"token-mean": torch.full((4, 1), 1 / n_tokens, dtype=F64),
            "sequence-mean": 1 / (n_rows * torch.tensor([1, 4, 2, 1], dtype=F64)[:, None]),
            "constant-length": torch.full((4, 1), 1 / (n_rows * L), dtype=F64)}
    for aggregation, scale in want.items():
        loss, _ = policy_loss(b.logp, b.old, b.A, b.mask, aggregation=aggregation, max_length=L)
        grad, = torch.autograd.grad(loss, b.logp)
        torch.testing.assert_close(grad, -b.A[:, None] * scale * b.mask, rtol=0, atol=1e-15)
    assert loss_count(b.mask) == 7 and loss_count(b.mask, "sequence-mean") == 3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [3, 5], [7, 1], [2, 0, 6]])
def test_splitting_into_micro_batches_changes_nothing(aggregation, parts):
    """Very unequal lengths, an empty row, an empty micro-batch: loss and gradient as undivided, to 1e-12."""
    b = ragged([1, 12, 3, 0, 7, 12, 1, 2], 12)
    kw = dict(clip_high=0.28, aggregation=aggregation, max_length=12)
    whole, _ = policy_loss(b.logp, b.old, b.A, b.mask, **kw)
    want, = torch.autograd.grad(whole, b.logp)
    n = sum(loss_count(m, aggregation) for m in b.mask.split(parts))       # what the all-reduce adds up
    total, grad = 0.0, torch.zeros_like(want)
    for i in torch.arange(8).split(parts):
        loss, _ = policy_loss(b.logp[i], b.old[i], b.A[i], b.mask[i], n_global=n, **kw)
        total += loss.item()
        grad += torch.autograd.grad(loss, b.logp)[0]
    assert total == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_two_ranks_whose_gradients_are_averaged(aggregation):
    """Rank 0 has the short answers, rank 1 the long ones; DDP divides the summed gradient by W = 2."""
    b = ragged([1, 2, 1, 2, 12, 11, 12, 10], 12)
    kw = dict(aggregation=aggregation, max_length=12)
    want, = torch.autograd.grad(policy_loss(b.logp, b.old, b.A, b.mask, **kw)[0], b.logp)
    n, W = loss_count(b.mask, aggregation), 2
    ranks = [policy_loss(b.logp[i], b.old[i], b.A[i], b.mask[i], n_global=n / W, **kw)[0]
             for i in torch.arange(8).split(4)]
    torch.testing.assert_close(torch.autograd.grad(sum(ranks) / W, b.logp)[0], want, rtol=0, atol=1e-12)


def test_one_token_on_two_ranks():
    """n / W = 0.5 is a divisor like any other, for tensors and for numbers."""
    b = ragged([1, 0], 1, drift=0.0)
    for n in (torch.tensor(0.5), 0.5):
        ranks = [policy_loss(b.logp[i], b.old[i], b.A[i], b.mask[i], n_global=n)[0] for i in (slice(0, 1), slice(1, 2))]
        assert (sum(ranks) / 2).item() == pytest.approx(-b.A[0].item(), abs=1e-15)


def test_the_classic_bug_would_be_seen():
    """A mean per micro-batch, divided by their number, is far from the truth: the test above has teeth."""
    b = ragged([1, 12, 3, 1, 7, 12, 1, 2], 12)
    want, = torch.autograd.grad(policy_loss(b.logp, b.old, b.A, b.mask)[0], b.logp)
    bug = sum(policy_loss(b.logp[i], b.old[i], b.A[i], b.mask[i])[0] for i in torch.arange(8).split(2)) / 4
    assert (torch.autograd.grad(bug, b.logp)[0] - want).abs().max() > 0.5 * want.abs().max()


def test_fill_rows_do_not_count():
    b = ragged([3, 5, 0, 0], 5)
    for aggregation in AGGREGATIONS:
        kw = dict(aggregation=aggregation, max_length=5)
        with_fill, _ = policy_loss(b.logp, b.old, b.A, b.mask, **kw)
        without, _ = policy_loss(b.logp[:2], b.old[:2], b.A[:2], b.mask[:2], **kw)
        assert with_fill.item() == pytest.approx(without.item(), abs=1e-15)


def test_equal_lengths_make_all_aggregations_one():
    b = ragged([6] * 4, 6)
    grads = [torch.autograd.grad(policy_loss(b.logp, b.old, b.A, b.mask, aggregation=a, max_length=6)[0], b.logp)[0]
             for a in AGGREGATIONS]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_nothing_to_learn_from(aggregation, shape):
    """All filtered, or a rank without rows: loss 0, backward works, gradient 0. Every rank can run it."""
    logp = torch.randn(shape, requires_grad=True)
    loss, m = policy_loss(logp, logp.detach(), torch.zeros(shape[0]), torch.zeros(shape), aggregation=aggregation,
                          max_length=5, n_global=torch.tensor(0))
    (loss + 0.01 * aggregate(kl_k3(logp, logp.detach()), torch.zeros(shape), aggregation, max_length=5)).backward()
    assert loss == 0 and not logp.grad.any() and all(torch.isfinite(v) for v in m.values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan])
def test_junk_in_the_padding_is_harmless(aggregation, junk):
    b = ragged([2, 4], 4)
    dirty = b.logp.detach().masked_fill(~b.mask, junk).requires_grad_()
    old = b.old.masked_fill(~b.mask, junk)
    ref = (b.old - 0.1).masked_fill(~b.mask, junk)
    weights = sampler_weights(old, ref, b.mask).masked_fill(~b.mask, junk)

    def total(logp, old, ref, weights, mask):
        loss, _ = policy_loss(logp, old, b.A, mask, aggregation=aggregation, max_length=4, weights=weights)
        return loss + aggregate(kl_k3(logp, ref, mask=mask, old_logp=old), mask, aggregation, max_length=4)
    clean = total(b.logp, b.old, b.old - 0.1, torch.full_like(b.old, math.exp(0.1)), b.mask)
    loss = total(dirty, old, ref, weights, b.mask)
    assert loss.item() == pytest.approx(clean.item(), abs=1e-14)
    grad, want = torch.autograd.grad(loss, dirty)[0], torch.autograd.grad(clean, b.logp)[0]
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-14)
    assert not grad[~b.mask].any()


def test_aggregate_alone_ignores_junk_too():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, -math.inf, math.nan]], dtype=F64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    got = [aggregate(values, mask, name, max_length=10).item() for name in AGGREGATIONS]
    assert got == pytest.approx([7 / 3, (1.5 + 4) / 2, 7 / 20])


@pytest.mark.parametrize("gap", [100.0, -100.0])
@pytest.mark.parametrize("A", [1.0, -1.0])
def test_no_overflow(gap, A):
    logp = torch.tensor([[gap]], requires_grad=True)
    for variant in ("clip", "gspo", "cispo"):
        loss, _ = policy_loss(logp, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1), variant=variant)
        for old in (None, torch.zeros(1, 1)):
            loss = loss + kl_k3(logp, torch.zeros(1, 1), old_logp=old).sum()
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


def test_inputs_are_left_alone_and_only_logp_learns():
    b = ragged([3, 2], 3)
    b.old.requires_grad_(), b.A.requires_grad_()
    before = [x.detach().clone() for x in (b.logp, b.old, b.A, b.mask)]
    loss, _ = policy_loss(b.logp, b.old, b.A, b.mask)
    (loss + aggregate(kl_k3(b.logp, b.old), b.mask)).backward()
    assert b.old.grad is None and b.A.grad is None and b.logp.grad is not None
    assert all(torch.equal(x, y) for x, y in zip(before, (b.logp, b.old, b.A, b.mask)))


def test_token_level_advantages_and_low_precision():
    b = ragged([3, 2], 3)
    per_token = b.A[:, None].expand(2, 3)
    assert policy_loss(b.logp, b.old, per_token, b.mask)[0] == policy_loss(b.logp, b.old, b.A, b.mask)[0]
    loss, _ = policy_loss(b.logp.bfloat16(), b.old.bfloat16(), b.A, b.mask)
    assert loss.dtype == torch.float32


def test_wrong_calls_are_told():
    b = ragged([3, 2], 3)
    for call, words in [(lambda: policy_loss(b.logp, b.old[:1], b.A, b.mask), "one shape"),
                        (lambda: policy_loss(b.logp, b.old, b.A, b.mask, aggregation="mean"), "token-mean, sequence"),
                        (lambda: policy_loss(b.logp, b.old, b.A, b.mask, aggregation="constant-length"), "max_length"),
                        (lambda: policy_loss(b.logp, b.old, b.A, b.mask, variant="ppo"), "gspo"),
                        (lambda: length_ok(torch.tensor([1]), 10, 20), "cache_length")]:
        with pytest.raises(ValueError, match=words):
            call()


# ------------------------------------------------------------------------------------------------------------- variants

def test_gspo_has_one_ratio_a_sequence():
    b = ragged([4, 2, 1], 4, drift=0.05)
    s = torch.stack([(b.logp - b.old)[i, :n].mean().exp() for i, n in enumerate([4, 2, 1])])
    want = -torch.minimum(s * b.A, s.clamp(1 - 0.03, 1 + 0.04) * b.A).mean()
    got, _ = policy_loss(b.logp, b.old, b.A, b.mask, clip_low=0.03, clip_high=0.04, aggregation="sequence-mean",
                         variant="gspo")
    assert got.item() == pytest.approx(want.item(), abs=1e-15)
    got, want = (torch.autograd.grad(x, b.logp)[0] for x in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


def test_cispo_keeps_a_gradient_on_clipped_tokens():
    _, grad, _ = one_token(3.0, 2.0, clip_high=0.28, variant="cispo")
    assert grad == pytest.approx(-1.28 * 2.0)
    assert one_token(0.5, 2.0, variant="cispo")[1] == pytest.approx(-1.0)


def test_sampler_weights_are_capped_constants():
    old = torch.tensor([[0.0, math.log(1.5), math.log(9.0), math.nan]])
    w = sampler_weights(old, torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]))
    assert w.tolist()[0] == pytest.approx([1.0, 1.5, 2.0, 1.0])


# ------------------------------------------------------------------------------------------------------------------- KL

def test_k3_value_and_gradients():
    logp = torch.tensor([[-1.0, -2.0, -0.5]], dtype=F64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, -0.5]], dtype=F64)
    d = (ref - logp).detach()
    k3 = kl_k3(logp, ref)
    torch.testing.assert_close(k3, d.exp() - d - 1, rtol=0, atol=1e-15)
    assert (k3 >= 0).all() and k3[0, 2] == 0
    torch.testing.assert_close(torch.autograd.grad(k3.sum(), logp)[0], 1 - d.exp(), rtol=0, atol=1e-15)
    unbiased = kl_k3(logp, ref, old_logp=logp.detach())
    torch.testing.assert_close(unbiased, k3, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(unbiased.sum(), logp)[0], (logp - ref).detach(), rtol=0, atol=1e-15)


def test_k3_estimates_the_kl_and_the_second_form_its_gradient():
    """Whole vocabulary instead of samples: the expectations are exact."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(6, generator=g, dtype=F64, requires_grad=True)
    logp, ref = w.log_softmax(0), torch.randn(6, generator=g, dtype=F64).log_softmax(0)
    true = (logp.exp() * (logp - ref)).sum()
    p = logp.exp().detach()
    estimate = (p * kl_k3(logp[None], ref[None])[0]).sum()
    unbiased = (p * kl_k3(logp[None], ref[None], old_logp=logp[None].detach())[0]).sum()
    assert estimate.item() == pytest.approx(true.item(), abs=1e-14)
    want = torch.autograd.grad(true, w, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(unbiased, w, retain_graph=True)[0], want, rtol=0, atol=1e-14)
    assert (torch.autograd.grad(estimate, w, retain_graph=True)[0] - want).abs().max() > 1e-2     # plain k3 is not it
    # and one step down the plain k3 lowers the KL all the same
    w2 = w - 0.1 * torch.autograd.grad(estimate, w)[0]
    assert (w2.log_softmax(0).exp() * (w2.log_softmax(0) - ref)).sum() < true


def test_kl_term_alone_in_the_loss():
    """A = 0, beta = 1: the gradient is the KL's, with the loss's own normaliser."""
    b = ragged([3, 1], 3)
    loss, _ = policy_loss(b.logp, b.old, torch.zeros(2), b.mask)
    (loss + aggregate(kl_k3(b.logp, b.old), b.mask)).backward()
    want = (1 - (b.old - b.logp).exp()) * b.mask / 4
    torch.testing.assert_close(b.logp.grad, want.detach(), rtol=0, atol=1e-15)


def test_k3_keeps_digits_where_policies_nearly_agree():
    d = 1e-3
    got = kl_k3(torch.tensor([[0.0]]), torch.tensor([[d]])).item()
    assert got == pytest.approx(d * d / 2 + d ** 3 / 6, rel=2e-4)     # exp(d) - 1 - d in float32 is off by about 10 %


# -------------------------------------------------------------------------------------------------------------- lengths

def test_overlong_penalty_points_of_equation_13():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 99999])
    want = [0, 0, -1 / 4096, -0.5, -1, -1, -1]
    assert soft_overlong_penalty(lengths, 20480, 4096).tolist() == pytest.approx(want)
    assert length_ok(lengths, 20480, 4096).tolist() == [x == 0 for x in want]


def test_drop_truncated_masks_whole_answers():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert drop_truncated(mask, torch.tensor([False, True])).tolist() == [[True, True, False], [False] * 3]


# ----------------------------------------------------------------------------------------------- what a step looks like

def test_describe_by_hand():
    def group(accuracy, rewards, lengths, truncated, **more):
        mask = torch.arange(4) < torch.tensor(lengths)[:, None]
        parts = [dict(format=1.0, accuracy=a, length=float(n < 4), reward=r, **more)
                 for a, r, n in zip(accuracy, rewards, lengths)]
        return dict(parts=parts, mask=mask, logps=torch.where(mask, -0.5, math.nan), truncated=truncated)
    groups = [group([1.0, 0.0], [1.0, -1.0], [2, 4], [False, True], claims=0.5),
              group([1.0, 1.0], [1.0, 0.5], [1, 1], [False] * 2),
              group([0.0, 0.0], [-1.0, -1.0], [3, 1], [False] * 2)]
    got = describe(groups, 2)
    want = dict(format=1, accuracy=0.5, reward=-0.5 / 6, claims=0.5, length_ok=5 / 6, length=2, truncated=1 / 6,
                rollout_tokens=12, length_std=math.sqrt(8 / 5), pass_at_k=2 / 3, mixed=1 / 3, zero_variance=1 / 3, entropy=0.5)
    assert got == pytest.approx(want)


def test_collapse_is_told_from_a_bad_start():
    well = dict(entropy=0.2, length=30.0, format=0.97, truncated=0.01)
    best = {}
    assert collapsed(well, best) == "" and best == dict(entropy=0.2, truncated=0.01, format=0.97)
    for change, words in [(dict(format=0.4), "kept by 40% of the answers, 97% at best"), (dict(truncated=0.6), "60% of"),
                          (dict(length=2.0), "2.0 tokens long"), (dict(entropy=1.6), "1.60 nats a token, 0.20 at the start"),
                          (dict(entropy=1e-4), "1.0e-04 nats")]:
        assert words in collapsed({**well, **change}, best)
    for fine in (dict(format=0.5), dict(truncated=0.4), dict(length=8.0), dict(entropy=0.9), dict(entropy=0.01)):
        assert collapsed({**well, **fine}, dict(best)) == ""
    # a start that cannot write the format yet, talks on and on and is nearly random, and then learns: no collapse
    path, best = [(3.0, 64, 0.0, 1.0), (2.0, 60, 0.1, 0.8), (0.5, 14, 0.9, 0.0), (0.1, 12, 1.0, 0.0)], {}
    assert not any(collapsed(dict(zip(("entropy", "length", "format", "truncated"), p)), best) for p in path)
    assert best["entropy"] == 3.0 and collapsed(dict(entropy=0.1, length=12, format=0.4, truncated=0.0), best)
