"""Rows of many samples: training texts, prompts with their answers; logits in chunks. Truth: plain forward passes of each
sample, dense logits, float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_vlm import IMAGE, TINY, prompt, spread_weights
from torch.utils._python_dispatch import TorchDispatchMode

from interpreter import relative
from nanopatho import attention, packed
from nanopatho.data import pack_rows
from nanopatho.packed import TokenLogps, answer_logps, micro_batches, training_rows
from nanopatho.vlm import PathoVLM, log_softmax, mrope_positions

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


# --- training texts end to end ----------------------------------------------------------------------------------------


def sample(images, seed, least=1):
    """As vlm_batch makes it of one row: random text, all of it trained, around images of these sizes in patches."""
    ids, mask, pixels, grid = prompt([images], least, seed=seed)
    return dict(input_ids=ids, labels=ids.masked_fill(ids == IMAGE, -100), attention_mask=mask, pixel_values=pixels,
                image_grid_thw=grid)


def samples():
    """Unlike and equal lengths, several images in a text, none, and a text of one token that begins with its image."""
    bare = sample([(4, 6)], 5)
    at = (bare["input_ids"][0] == IMAGE).nonzero().flatten()
    bare = bare | {name: bare[name][:, at] for name in ("input_ids", "labels", "attention_mask")}
    return [sample([(8, 8)], 1), sample([], 2), sample([(4, 6), (2, 34)], 3), bare, sample([(8, 8)], 1), sample([], 4)]


def learn(model, batches):
    """-> loss summed over the trained tokens, its gradient, how many tokens those are (as the scripts count them)."""
    model.zero_grad()
    loss = 0.0
    for b in batches:
        hidden = model.hidden_states(**{k: v for k, v in b.items() if k != "labels"})
        part = model.loss(hidden, b["labels"], reduction="sum")
        part.backward()
        loss += part.detach()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss, grads, sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches)


def apart(row, x):
    """What each sample of the row got, by its tokens: (1, T, ...) -> {tokens: (n, ...)}."""
    n = row["documents"].tolist()
    return {tuple(ids.tolist()): part for ids, part in zip(row["input_ids"][0].split(n), x[0].split(n))}


@pytest.mark.parametrize("length,rows", [(10, 6), (45, 3), (1000, 1)])
def test_samples_in_a_row_equal_each_alone(model, length, rows):
    alone = samples()
    row = pack_rows(alone, length)
    assert len(row) == rows
    loss, grads, tokens = learn(model, alone)
    got_loss, got_grads, got_tokens = learn(model, row)
    assert got_tokens == tokens and relative(got_loss, loss) < 1e-6 and relative(got_grads, grads) < 1e-6
    with torch.no_grad():
        got = {}
        for r in row:
            got |= apart(r, model(**{k: v for k, v in r.items() if k != "labels"}))
        for s in alone:
            want = model(s["input_ids"], s["pixel_values"], s["image_grid_thw"])[0]
            torch.testing.assert_close(got[tuple(s["input_ids"][0].tolist())], want, atol=2e-5, rtol=0)


def test_positions_start_anew(model, monkeypatch):
    seen, rotary = [], type(model.model).rotary
    monkeypatch.setattr(type(model.model), "rotary", lambda self, p: seen.append(p) or rotary(self, p))
    row, = pack_rows(samples(), 1000)
    model.hidden_states(**{k: v for k, v in row.items() if k != "labels"})
    got = apart(row, seen[0].permute(1, 2, 0))
    for s in samples():
        want, _ = mrope_positions(s["input_ids"], s["image_grid_thw"], None, IMAGE)
        assert torch.equal(got[tuple(s["input_ids"][0].tolist())], want[:, 0].T)


@torch.no_grad()
def test_another_document_changes_nothing(model):
    """Other words, another picture of the same size: not a bit. Another length: not more than another order of sums."""
    def logits(parts):
        ids, pixels, grid = (torch.cat([p[name] for p in parts if p[name] is not None], dim) for name, dim in (
            ("input_ids", 1), ("pixel_values", 0), ("image_grid_thw", 0)))
        n = [p["input_ids"].shape[1] for p in parts]
        return model(ids, pixels, grid, documents=torch.tensor(n))[0].split(n)

    first, middle, last = sample([], 1, 20), sample([(8, 8)], 2), sample([(4, 6)], 3)
    other = middle | dict(pixel_values=-middle["pixel_values"], input_ids=middle["input_ids"].where(
        middle["input_ids"] > 181, middle["input_ids"] + 300))
    want, same, longer = (logits([first, m, last]) for m in (middle, other, sample([(8, 8), (12, 4)], 4)))
    for i in (0, 2):
        assert torch.equal(want[i], same[i]) and relative(longer[i], want[i]) < 1e-6
    assert relative(same[1], want[1]) > 0.1


def test_documents_that_do_not_fill_the_row_are_told(model):
    ids = torch.full((1, 7), 9)
    with pytest.raises(ValueError, match=r"input_ids \(1, 7\): documents of \[4, 2\] tokens make \(1, 6\)"):
        model.hidden_states(ids, documents=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"input_ids \(2, 7\): documents of \[7, 7\] tokens make \(1, 14\)"):
        model.hidden_states(ids.repeat(2, 1), documents=torch.tensor([7, 7]))


# --- prompts and their answers ----------------------------------------------------------------------------------------


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
    """All kernels in the interpreter, values and gradients: the plan that both paths share describes the same row."""
    row, results = training_rows(text_groups([(4, 1, 6), (2, 0, 5)]), PAD, 3), []
    for choice in ("off", "on"):
        monkeypatch.setattr(attention, "_choice", choice)
        logps = answer_logps(model, row, 0.7, [IMAGE, 3])
        (logps * torch.linspace(-1, 1, 6)).sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.model.parameters()])))
        model.zero_grad()
        monkeypatch.setattr(packed, "attention", None)                  # the plain path would fail
        monkeypatch.setattr(packed, "TokenLogps", None)
    assert all(relative(got, want) < 5e-6 for want, got in zip(*results))


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
