"""kernels/decode.py against its twin in float64, and the twin against one softmax written out key by key."""

import math

import pytest
import torch

from interpreter import GATES, poison, relative, shim
from kernels import decode as D
from kernels.decode import cascade, cascade_reference, decode, decode_reference

shim()
NAN = float("nan")


def inputs(rows, heads, kv_heads, width, caches, dtype, seed=0):
    """q (rows, heads, width) and for every (cache rows, capacity) a pair k, v."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, width, generator=g).to(dtype)
    return q, [[torch.randn(n, kv_heads, c, width, generator=g).to(dtype) for _ in "kv"] for n, c in caches]


def double(*tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 32), (7, 1, 64), (16, 2, 128)], ids=str)
def test_decode_with_ragged_lengths(dtype, heads, kv_heads, width, monkeypatch):
    """Lengths over, at and under borders of tiles and runs, one key, none; the rest of the cache is NaN and not read."""
    lengths = torch.tensor([600, 257, 64, 1, 0])
    q, [(k, v)] = inputs(5, heads, kv_heads, width, [(5, 600)], dtype)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = NAN, NAN
    poison(monkeypatch)
    got = decode(q, k, v, lengths)
    assert got.dtype == dtype and (got[4] == 0).all()
    assert relative(got, decode_reference(*double(q, k, v), lengths)) < GATES[dtype]


def test_left_padding_holes_and_strides():
    """Keys that may not be seen hold NaN; the cache is a view into all layers, longer than what is filled, as KVCache's."""
    g = torch.Generator().manual_seed(1)
    q, [(k, v)] = inputs(3, 4, 2, 16, [(3, 90)], torch.float32)
    keep = torch.rand(3, 90, generator=g) < 0.7
    keep[0, :70], keep[1] = False, False  # two tiles of nothing first; nothing at all
    for cache in (k, v):
        cache.transpose(1, 2)[~keep] = NAN
    want = decode_reference(*double(q, k, v), keep=keep)
    layers = [torch.full((2, 3, 2, 128, 16), NAN) for _ in "kv"]
    for layer, cache in zip(layers, (k, v)):
        layer[1, :, :, :90] = cache
    k, v = (layer[1, :, :, :90] for layer in layers)
    got = decode(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, keep=keep)
    assert (got[1] == 0).all() and relative(got, want) < 2e-6
    strided = k.transpose(2, 3).contiguous().transpose(2, 3)  # D is not the last axis in memory: copied
    assert torch.equal(got, decode(q, strided, v, keep=keep))


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_cascade_with_groups_of_different_sizes(dtype, monkeypatch):
    """Groups of 5, 0, 1 and 10 rows with 7 heads a KV head: 70 queries, more than a tile; own keys from 0 to 40."""
    sizes = torch.tensor([5, 0, 1, 10])
    starts = torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))
    q, [(pk, pv), (k, v)] = inputs(16, 14, 2, 32, [(4, 300), (16, 40)], dtype)
    lengths, prompt_lengths = torch.arange(16) * 40 // 15, torch.tensor([300, 7, 1, 130])
    for b, n in enumerate(prompt_lengths):
        pk[b, :, n:], pv[b, :, n:] = NAN, NAN
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = NAN, NAN
    poison(monkeypatch)
    more = dict(prompt_lengths=prompt_lengths, starts=starts, most=10)
    got = cascade(q, pk, pv, k, v, lengths, **more)
    assert relative(got, cascade_reference(*double(q, pk, pv, k, v), lengths, **more)) < GATES[dtype]


def test_cascade_is_decoding_with_the_prompt_repeated():
    q, [(pk, pv), (k, v)] = inputs(6, 4, 2, 16, [(2, 70), (6, 9)], torch.float32)
    keep = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) < 0.8
    got = cascade(q, pk, pv, k, v, prompt_keep=keep)
    both = [torch.cat((p.repeat_interleave(3, 0), own), 2) for p, own in ((pk, k), (pv, v))]
    seen = torch.cat((keep.repeat_interleave(3, 0), torch.ones(6, 9, dtype=torch.bool)), 1)
    assert relative(got, decode(q, *both, keep=seen)) < 2e-6
    assert relative(got, cascade_reference(*double(q, pk, pv, k, v), prompt_keep=keep)) < 2e-6


def test_twin_against_sums_written_out():
    q, [(k, v)] = inputs(2, 4, 2, 16, [(2, 5)], torch.float64)
    got = decode_reference(q, k, v, torch.tensor([5, 3]))
    for b, h in ((0, 0), (1, 1), (1, 3)):
        n, kv = (5, 3)[b], h // 2
        weights = [math.exp(float(q[b, h] @ k[b, kv, t]) / 4) for t in range(n)]
        want = sum(w * v[b, kv, t] for t, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(got[b, h], want, atol=1e-12, rtol=0)


def test_runs_fill_the_card_and_the_answer_does_not_depend_on_them(monkeypatch):
    assert D.count_runs(programs=512, C=4096) == 1                       # a batch of 256 fills 132 SMs by itself
    assert D.count_runs(programs=2, C=65536) == 64 and D.count_runs(programs=2, C=1000) == 4
    q, [(k, v)] = inputs(2, 4, 2, 16, [(2, 1000)], torch.float32)
    split = decode(q, k, v)
    monkeypatch.setattr(D, "PROGRAMS", 1)
    assert D.count_runs(4, 1000) == 1 and relative(split, decode(q, k, v)) < 2e-6


def test_wrong_shapes_are_named():
    q, [(k, v)] = inputs(2, 4, 2, 16, [(2, 5)], torch.float32)
    with pytest.raises(ValueError, match=r"q \(2, 4, 16\).*D 16, 32, 64 or 128"):
        decode(q, k[..., :8], v[..., :8])
    with pytest.raises(ValueError, match="multiple of Hk"):
        decode(q[:, :3], k, v)
