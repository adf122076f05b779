"""kernels/attention.py against its twin in float64, in Triton's interpreter; the twin against dense SDPA."""

import pytest
import torch
import torch.nn.functional as F

from interpreter import GATES, poison, relative, shim
from kernels import attention as module
from kernels.attention import attention, attention_reference, make_layout

shim()

RAGGED = [0, 1, 130, 0, 5, 256, 77], None  # lengths, shared: empty, one token, just behind a tile, two whole tiles
# groups of three answers, of one, of none; one answer is empty, and so is the last prompt
GROUPS = [140, 30, 0, 150, 9, 1, 64, 0, 3], [-1, 0, 0, 0, -1, 4, -1, -1, 7]


def cumulative(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).tolist()


def inputs(T, H, Hk, D, dtype, seed=0):
    """q, k, v and the gradient of the output; none contiguous: heads first, and views of wider tensors."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(H, T, D, generator=g).to(dtype).transpose(0, 1)
    k, v = torch.randn(T, 2, Hk, D, generator=g).to(dtype).unbind(1)
    do = torch.randn(T, 2 * H, D, generator=g).to(dtype)[:, ::2]
    return q, k, v, do


def gradients(function, q, k, v, do, *args, **kwargs):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = function(q, k, v, *args, **kwargs)
    return o, *torch.autograd.grad(o, (q, k, v), do)


def one_pass(q, k, v, cu_seqlens, causal, shared, scale, deterministic):
    """attention() has no one-pass form in fp32, where its machine code is too slow; to see that it is exact it does."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return module._Attention.apply(q, k, v, make_layout(cu_seqlens, shared), causal, scale, deterministic)


def compare(monkeypatch, dtype, D, H, Hk, lengths, shared, causal, deterministic, scale=None):
    x = inputs(sum(lengths), H, Hk, D, dtype)
    before = [t.clone() for t in x]
    rest = dict(cu_seqlens=cumulative(lengths), causal=causal, shared=shared, scale=scale)
    want = gradients(attention_reference, *(t.double() for t in x), **rest)
    function = one_pass if dtype == torch.float32 and not deterministic else attention
    poison(monkeypatch)
    got = gradients(function, *x, **rest, deterministic=deterministic)
    errors = {name: relative(a, b) for name, a, b in zip(("o", "dq", "dk", "dv"), got, want)}
    assert all(e <= GATES[dtype] for e in errors.values()), errors  # NaN fails too
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(x, before))


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("D, H, Hk, case, causal, deterministic", [
    (64, 4, 2, RAGGED, True, True), (80, 2, 2, RAGGED, False, True), (128, 4, 1, GROUPS, True, True),
    (64, 2, 1, GROUPS, False, False), (80, 2, 1, GROUPS, True, False), (128, 2, 2, RAGGED, False, False)])
def test_kernels_equal_the_twin(monkeypatch, dtype, D, H, Hk, case, causal, deterministic):
    compare(monkeypatch, dtype, D, H, Hk, *case, causal, deterministic)


@pytest.mark.parametrize("deterministic", (True, False))
def test_small_heads_other_scale_and_heads_that_are_not_split(monkeypatch, deterministic):
    monkeypatch.setattr(module, "SMS", 0)  # any number of programs is enough: one walks all query heads of a key head
    compare(monkeypatch, torch.float32, 16, 4, 2, [3, 150, 20], [-1, 0, 0], True, deterministic, scale=0.7)


def test_split_is_the_fewest_programs_that_fill_the_gpu():
    assert [module._split(tiles, 2, 8) for tiles in (1, 60, 128, 264, 1000)] == [8, 8, 4, 1, 1]
    assert module._split(10, 4, 7) == 7 and module._split(10, 16, 1) == 1


def test_twin_equals_sdpa_with_a_dense_mask():
    """A row of tokens as a model packs them: prompt 0, its three answers, prompt 1, its answer."""
    q, k, v, do = (x.double() for x in inputs(23, 4, 2, 16, torch.float32))
    cu, shared = [0, 7, 10, 11, 16, 20, 23], [-1, 0, 0, 0, -1, 4]
    group = torch.tensor([0] * 16 + [1] * 7)
    owner = torch.tensor([0] * 7 + [1] * 3 + [2] * 1 + [3] * 5 + [0] * 4 + [1] * 3)  # 0: the prompt
    mask = (group[:, None] == group) & ((owner == 0) | (owner[:, None] == owner)) & torch.ones(23, 23).tril().bool()

    def dense(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    got = gradients(attention_reference, q, k, v, do, cu, causal=True, shared=shared)
    assert all(relative(a, b) < 1e-14 for a, b in zip(got, gradients(dense, q, k, v, do)))


def test_twin_without_a_mask_is_sdpa_over_prompt_and_self():
    q, k, v, _ = (x.double() for x in inputs(20, 2, 1, 16, torch.float32))
    got = attention_reference(q, k, v, [0, 8, 15, 20], causal=False, shared=[-1, 0, -1])
    for rows, seen in ((range(8), range(8)), (range(8, 15), range(15)), (range(15, 20), range(15, 20))):
        parts = (x[list(at)].transpose(0, 1) for x, at in ((q, rows), (k, seen), (v, seen)))
        want = F.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(0, 1)
        assert relative(got[list(rows)], want) < 1e-14


def test_an_answer_changes_no_other_sequence_and_a_prompt_all_its_answers():
    lengths, shared = [20, 9, 6, 11], [-1, 0, 0, -1]
    cu = cumulative(lengths)
    layout = make_layout(cu, shared)
    q, k, v, _ = inputs(cu[-1], 2, 1, 32, torch.float32)

    def changed(b):
        other = v.clone()
        other[cu[b]] += 1
        a = attention(q, k, v, None, causal=True, layout=layout)
        c = attention(q, k, other, None, causal=True, layout=layout)
        return [not torch.equal(a[lo:hi], c[lo:hi]) for lo, hi in zip(cu, cu[1:])]

    assert changed(1) == [False, True, False, False] and changed(0) == [True, True, True, False]


def test_inputs_that_tma_cannot_read_are_copied_not_misread():
    wide = torch.randn(40, 2, 33, generator=torch.Generator().manual_seed(1))
    x = wide[..., 1:]  # rows start 4 bytes off
    got = attention(x, x, x, [0, 40], causal=True)
    assert relative(got, attention_reference(*[x.double()] * 3, [0, 40], causal=True)) < 2e-6


def test_nothing_at_all():
    x = torch.zeros(0, 2, 16, requires_grad=True)
    attention(x, x, x, [0, 0], causal=True).sum().backward()
    assert x.grad.shape == x.shape


def test_layout_lists_every_row_once_and_its_longest_tiles_first():
    layout = make_layout([0, 300, 310, 440, 441], [-1, 0, 0, -1])
    for tiles in (layout.queries, layout.keys):
        rows = sorted((row, min(row + 128, hi)) for row, _, hi, *_ in tiles.tolist())
        assert rows == [(0, 128), (128, 256), (256, 300), (300, 310), (310, 438), (438, 440), (440, 441)]
    assert layout.queries[0].tolist() == [438, 310, 440, 0, 300, 440]  # 300 + 130 keys to look at
    assert layout.keys[0].tolist() == [0, 0, 300, 0, 0, 440]  # seen by the prompt and both answers


@pytest.mark.parametrize("cu, shared, message", [
    ([1, 4], None, "start with 0"), ([0, 4, 3], None, "never fall"), ([0, 2, 4], [-1], "1 entries for 2"),
    ([0, 2, 4, 6], [-1, -1, 0], r"shared\[2\] = 0: answers must lie directly behind"),
    ([0, 2, 4, 6], [-1, 0, 1], r"shared\[2\] = 1"), ([0, 2, 4], [1, -1], r"shared\[0\] = 1"),
    ([0, 2, 4], [-1, 5], r"shared\[1\] = 5"), ([0, 2, 4, 6, 8], [-1, 0, -1, 0], r"shared\[3\] = 0")])
def test_a_wrong_layout_is_refused(cu, shared, message):
    with pytest.raises(ValueError, match=message):
        make_layout(cu, shared)


def test_wrong_tensors_are_refused():
    x = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match="covers 3 rows"):
        attention(x, x, x, [0, 3], causal=True)
    with pytest.raises(ValueError, match="H a multiple of Hk"):
        attention(x, x[:, :1].expand(4, 3, 16), x[:, :1].expand(4, 3, 16), [0, 4], causal=True)
    with pytest.raises(TypeError, match="float64"):
        attention(x.double(), x, x, [0, 4], causal=True)
    for D in (8, 72, 256):
        with pytest.raises(ValueError, match=f"head width {D}"):
            attention(*[torch.zeros(4, 2, D)] * 3, [0, 4], causal=True)
