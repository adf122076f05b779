"""Scoring with shared prompts and chunked logits: against plain forward passes, dense logits and float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_vlm import IMAGE, TINY, spread_weights
from torch.utils._python_dispatch import TorchDispatchMode

from nanopatho import attention, packed
from nanopatho.packed import TokenLogps, answer_logps, micro_batches, training_rows
from nanopatho.vlm import PathoVLM, log_softmax

V, PAD = TINY["vocab_size"], 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return spread_weights(PathoVLM(TINY))


def text_groups(lengths, prompts=(7, 3), seed=0):
    """Groups without images: prompts of two lengths, answers of the lengths given."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(200, 900, shape, generator=g)
    out = []
    for size, answers in zip(prompts, lengths):
        N = max(1, *answers)
        G = len(answers)
        out.append(dict(prompt=draw(size), ids=draw(G, N), logps=-torch.rand(G, N, generator=g),
                        mask=torch.arange(N) < torch.tensor(answers)[:, None], advantages=torch.randn(G, generator=g)))
    return out


@pytest.mark.parametrize("lengths", [[(4, 1, 6), (2, 5, 5)], [(1, 1, 1), (1, 1, 1)], [(0, 3, 0), (0, 0, 0)], [(0, 0, 0)] * 2])
def test_values_and_gradients_equal_one_forward_an_answer(model, lengths):
    """Empty answers and whole masked groups too: their values are 0, and backward works even if nothing is left."""
    groups = text_groups(lengths)
    row = training_rows(groups, PAD, 3)
    got = answer_logps(model, row, 0.7, [IMAGE])
    assert got.shape == row["mask"].shape and not got[~row["mask"]].any()
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    terms, at = [], 0
    for group in groups:
        for ids, mask in zip(group["ids"], group["mask"]):
            n = int(mask.sum())
            if n:
                logits = model(torch.cat([group["prompt"], ids[:n]])[None])[0, len(group["prompt"]) - 1:-1] / 0.7
                logits[:, IMAGE] = -torch.inf
                want = logits.log_softmax(-1).gather(1, ids[:n, None])[:, 0]
                torch.testing.assert_close(got[at, :n], want, atol=1e-5, rtol=2e-6)
                terms.append((want * weight[at, :n]).sum())
            at += 1
    if terms:
        sum(terms).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-5 * max(1, p.grad.abs().max().item()), rtol=1e-4, msg=name)
        else:
            assert found[name] is None or not found[name].any()
    model.zero_grad()


def test_the_prompt_goes_through_the_decoder_once(model):
    groups, seen = text_groups([(4, 1, 6), (2, 5, 5)]), []
    hook = model.model.register_forward_hook(lambda m, args, y: seen.append(y.shape[:2]))
    answer_logps(model, training_rows(groups, PAD, 3))
    hook.remove()
    assert seen == [(1, (7 + 3 + 0 + 5) + (3 + 1 + 4 + 4))]             # the last token of an answer is not read


def test_the_kernel_gives_the_same(model, monkeypatch):
    """The Triton kernel for packed rows, in the interpreter: the plan that both paths share describes the same row."""
    row = training_rows(text_groups([(4, 1, 6), (2, 0, 5)]), PAD, 3)
    with torch.no_grad():
        want = answer_logps(model, row)
        monkeypatch.setattr(attention, "_choice", "on")
        monkeypatch.setattr(packed, "attention", None)                  # the plain path would fail
        torch.testing.assert_close(answer_logps(model, row), want, atol=1e-4, rtol=1e-5)


def test_groups_of_the_wrong_size_are_told():
    with pytest.raises(ValueError, match="6 answers for 2 questions: each needs 4"):
        training_rows(text_groups([(1, 2, 3)] * 2), PAD, 4)


def test_micro_batches_hold_whole_groups_in_order():
    groups = text_groups([(2, 2, 2)] * 5, prompts=range(2, 7))
    for size, want in ((1, [1] * 5), (6, [2, 2, 1]), (8, [2, 2, 1]), (100, [5])):
        parts = list(micro_batches(groups, SimpleNamespace(micro_batch=size, group_size=3), PAD, "cpu"))
        assert [len(part) for part, _ in parts] == want and [g for part, _ in parts for g in part] == groups
        assert [len(row["mask"]) for _, row in parts] == [3 * n for n in want]


# --- logits in chunks -------------------------------------------------------------------------------------------------


def head(K=50, E=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(K, E, generator=g), torch.randn(300, E, generator=g) * 0.3
    return (h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), torch.randint(5, 300, (K,), generator=g),
            torch.randn(K, generator=g))


def dense(h, w, targets, grad, temperature, banned):
    """Value and both gradients from the whole matrix of logits, in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (h, w))
    logits = h @ w.T / temperature
    logits = logits.index_fill(1, torch.tensor(banned), -torch.inf) if banned else logits
    logp = logits.log_softmax(1)[torch.arange(len(h)), targets]
    return logp.detach(), *torch.autograd.grad((logp * grad).sum(), (h, w))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("temperature,banned", [(1.0, []), (0.7, [0, 3])])
def test_chunks_equal_dense_logits(chunk, temperature, banned, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", chunk)
    h, w, targets, grad = head()
    logp = TokenLogps.apply(h, w, targets, temperature, torch.tensor(banned, dtype=torch.long))
    want, want_h, want_w = dense(h, w, targets, grad, temperature, banned)
    torch.testing.assert_close(logp.double(), want, atol=1e-5, rtol=0)
    got_h, got_w = torch.autograd.grad((logp * grad).sum(), (h, w))
    torch.testing.assert_close(got_h.double(), want_h, atol=1e-5, rtol=0)
    torch.testing.assert_close(got_w.double(), want_w, atol=1e-5, rtol=0)


def test_bfloat16_is_scored_in_fp32_and_more_chunks_lose_nothing(monkeypatch):
    """A head gradient summed in bf16 over 500 chunks is off by several per cent; here it stays near one rounding, 2^-9."""
    h, w, targets, grad = head(K=500, dtype=torch.bfloat16)
    _, _, want = dense(h, w, targets, grad, 1.0, [])
    errors = []
    for chunk in (500, 50, 1):
        monkeypatch.setattr(packed, "CHUNK", chunk)
        logp = TokenLogps.apply(h, w, targets, 1.0, torch.tensor([], dtype=torch.long))
        by_hand = log_softmax(F.linear(h, w).float()).gather(1, targets[:, None])[:, 0]
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp, by_hand, atol=1e-6, rtol=0)
        got, = torch.autograd.grad((logp * grad).sum(), w)
        errors.append(((got.double() - want).norm() / want.norm()).item())
    assert max(errors) < 0.004, errors
    p = F.linear(h, w).float().softmax(1).detach()
    steps, in_bf16 = (F.one_hot(targets, 300) - p) * grad[:, None], torch.zeros_like(w)
    for one, hidden in zip(steps.bfloat16(), h.detach()):
        in_bf16 += one[:, None] * hidden
    assert (in_bf16.double() - want).norm() / want.norm() > 3 * max(errors)


def test_the_whole_matrix_of_logits_never_exists(model, monkeypatch):
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(x) and x.dim() == 2 and x.shape[-1] == V and x.shape[0] != TINY["hidden_size"]:  # head.T
                    largest.append(x.numel() // V)
            return out

    monkeypatch.setattr(packed, "CHUNK", 5)
    row = training_rows(text_groups([(9, 8, 7), (9, 9, 9)]), PAD, 3)
    with Watch():
        answer_logps(model, row).sum().backward()
    model.zero_grad()
    assert largest and max(largest) == 5
