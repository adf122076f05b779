"""Cached group sampling against plain forward passes: same tokens, same probabilities, right masks."""

import copy

import numpy as np
import pytest
import torch
from test_vlm import IMAGE, TINY, prompt, spread_weights

from nanopatho import generate as module
from nanopatho.attention import attention
from nanopatho.decoder import KVCache
from nanopatho.generate import GroupCache, draw, generate, uniforms
from nanopatho.vlm import PathoVLM

PAD, EOS = 0, [1, 4]
GRIDS = [[(8, 8)], [], [(4, 12), (2, 2)]]  # three prompts of different lengths with one, no and two images


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = spread_weights(PathoVLM(TINY))
    with torch.no_grad():
        model.model.norm.weight *= 0.4  # a less peaked policy: several tokens have a real chance
    return model


def run(model, grids=GRIDS, extra=0, **options):
    """-> the left-padded prompts, with `extra` more padding tokens, and the answers to them."""
    ids, mask, pixels, grid = prompt(grids, 12, "left")
    zeros = torch.zeros(len(ids), extra, dtype=torch.long)
    ids, mask = torch.cat((zeros, ids), 1), torch.cat((zeros, mask), 1)
    options = dict(max_new_tokens=12, eos_token_ids=EOS, pad_token_id=PAD, banned_token_ids=[IMAGE, PAD]) | options
    return (ids, mask, pixels, grid), generate(model, ids, pixels, grid, attention_mask=mask, **options)


@torch.no_grad()
def score(model, inputs, out, group, temperature=1.0, banned=(IMAGE, PAD)):
    """Log-probabilities of the answers from one uncached pass over prompt and answer, (R, N)."""
    ids, mask, pixels, grid = inputs
    rows = torch.arange(len(ids)).repeat_interleave(group)
    full, seen = torch.cat((ids[rows], out.ids), 1), torch.cat((mask[rows], out.mask.long()), 1)
    images = torch.arange(len(grid)).split([len(images) for images in GRIDS])                # of each prompt
    order = torch.cat([one for one in images for _ in range(group)])                        # of each row
    seen_by = model.visual(pixels, grid).split((grid.prod(1) // 4).tolist())
    features, grid = torch.cat([seen_by[i] for i in order]), grid[order]
    scored = torch.cat((torch.zeros_like(ids[rows], dtype=torch.bool), out.mask), 1)
    hidden = model.hidden_states(full, None, grid, seen, image_embeds=features)
    return model.token_logps(hidden, full, scored, temperature, banned)[:, ids.shape[1]:]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_logps_equal_one_teacher_forced_pass(model, temperature):
    # 80 end tokens of 1000: rows end at different times, so finished rows are dropped on the way.
    options = dict(group_size=6, max_new_tokens=40, eos_token_ids=range(20, 100), temperature=temperature)
    rows = []
    hook = model.model.register_forward_hook(lambda m, args, y: rows.append(len(y)))
    inputs, out = run(model, generator=torch.Generator().manual_seed(1), **options)
    hook.remove()
    assert len(set(rows[1:])) > 2 and len(out.mask.sum(1).unique()) > 6
    assert out.logps.dtype == torch.float32
    torch.testing.assert_close(out.logps, score(model, inputs, out, 6, temperature), atol=1e-5, rtol=0)


def test_one_token_answers(model):
    inputs, out = run(model, group_size=2, max_new_tokens=1)
    assert out.ids.shape == (6, 1) and out.mask.all()
    torch.testing.assert_close(out.logps, score(model, inputs, out, 2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_greedy_equals_growing_the_sequence_without_a_cache(model):
    (ids, mask, pixels, grid), out = run(model, temperature=0.0, eos_token_ids=[])
    for _ in range(12):
        logits = model(ids, pixels, grid, mask)[:, -1]
        logits[:, [IMAGE, PAD]] = float("-inf")
        best, second = logits.topk(2).values.T
        assert (best - second).min() > 1e-3  # otherwise equal ids would be luck
        ids, mask = torch.cat((ids, logits.argmax(1, keepdim=True)), 1), torch.cat((mask, mask.new_ones(3, 1)), 1)
    assert torch.equal(out.ids, ids[:, -12:])


def test_greedy_equals_the_reference_generate(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, mask, pixels, grid = prompt([[(8, 8)]], 12)
    theirs = reference.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid,
                                mm_token_type_ids=(ids == IMAGE).int(), max_new_tokens=12, do_sample=False,
                                eos_token_id=None, pad_token_id=PAD)
    ours = generate(model, ids, pixels, grid, max_new_tokens=12, temperature=0, eos_token_ids=[], pad_token_id=PAD)
    assert torch.equal(ours.ids, theirs[:, ids.shape[1]:])


def test_padding_and_group_do_not_change_an_answer(model):
    (ids, mask, pixels, grid), out = run(model, temperature=0, max_new_tokens=8)
    for extra, group in [(7, 1), (0, 3)]:
        _, other = run(model, extra=extra, group_size=group, temperature=0, max_new_tokens=8)
        assert torch.equal(other.ids, out.ids.repeat_interleave(group, 0))
        torch.testing.assert_close(other.logps, out.logps.repeat_interleave(group, 0), atol=1e-5, rtol=0)
    alone = generate(model, ids[:1, mask[0] == 1], pixels[:64], grid[:1], max_new_tokens=8, temperature=0,
                     eos_token_ids=EOS, pad_token_id=PAD, banned_token_ids=[IMAGE, PAD])
    n = alone.ids.shape[1]
    assert torch.equal(alone.ids[0], out.ids[0, :n]) and not out.mask[0, n:].any()


def test_image_and_prompt_are_computed_once(model):
    seen = []
    hooks = [model.visual.register_forward_hook(lambda m, args, y: seen.append(("visual", len(args[1])))),
             model.model.register_forward_hook(lambda m, args, y: seen.append(args[0].shape[:2]))]
    (_, mask, *_), _ = run(model, group_size=5, max_new_tokens=3, eos_token_ids=[])
    for hook in hooks:
        hook.remove()
    assert seen == [("visual", 3), (1, int(mask.sum())), (15, 1), (15, 1)]


def test_end_tokens_masks_and_padding(model):
    eos = list(range(0, 1000, 10))
    _, out = run(model, group_size=20, max_new_tokens=30, eos_token_ids=eos, pad_token_id=20)  # padding ends too
    ended = 0
    for ids, logps, mask in zip(*(x.tolist() for x in out)):
        stops = [i for i, token in enumerate(ids) if token in eos]
        length = stops[0] + 1 if stops else len(ids)
        ended += bool(stops)
        assert mask == [True] * length + [False] * (len(ids) - length)
        assert ids[length:] == [20] * (len(ids) - length) and logps[length:] == [0.0] * (len(ids) - length)
        assert all(p < 0 for p in logps[:length])
    assert 30 < ended and out.mask.any(0).all()  # no column is only padding
    every = run(model, eos_token_ids=range(1000), max_new_tokens=30)[1]
    assert every.ids.shape == (3, 1) and every.mask.all()


def test_banned_tokens_are_never_drawn():
    torch.manual_seed(0)
    config = copy.deepcopy(TINY) | dict(tie_word_embeddings=False)
    model = spread_weights(PathoVLM(config))
    ids, _, pixels, grid = prompt([[(8, 8)]], 12)
    with torch.no_grad():  # a head that wants to write the image token: aligned with the hidden state
        model.lm_head.weight[IMAGE] = 10 * model.hidden_states(ids, pixels, grid)[0, -1]
    options = dict(max_new_tokens=20, eos_token_ids=[], pad_token_id=PAD, group_size=10)
    free = generate(model, ids, pixels, grid, **options)
    assert (free.ids[:, 0] == IMAGE).all()
    held = generate(model, ids, pixels, grid, banned_token_ids=[IMAGE], **options)
    assert not (held.ids == IMAGE).any() and held.logps.isfinite().all()
    only = generate(model, ids, pixels, grid, banned_token_ids=[i for i in range(1000) if i not in (8, 9)], **options)
    assert set(only.ids.flatten().tolist()) <= {8, 9}


def test_a_generator_makes_it_repeatable(model):
    a, b, c = (run(model, group_size=4, eos_token_ids=range(20, 60), generator=torch.Generator().manual_seed(seed))[1]
               for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and a.ids.tolist() != c.ids.tolist()


def test_draw_follows_the_probabilities():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 40_000
    ids = draw(p.log().expand(n, -1), uniforms(torch.arange(n), 3)[:, 2:]).squeeze(1)      # one number of each of n seeds
    counts = torch.bincount(ids, minlength=7).double()
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0].double()
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_bfloat16_reports_fp32_logps(model):
    half = copy.deepcopy(model).bfloat16()
    _, out = run(half, group_size=2)
    assert out.logps.dtype == torch.float32 and out.logps.isfinite().all()


def test_right_padding_is_refused(model):
    ids, mask, pixels, grid = prompt(GRIDS, 12, "right")
    with pytest.raises(ValueError, match="left"):
        generate(model, ids, pixels, grid, attention_mask=mask, max_new_tokens=2, eos_token_ids=EOS, pad_token_id=PAD)


# --- one seed an answer -----------------------------------------------------------------------------------------------


def splitmix64(state):
    """The generator as its authors print it, in Python's long integers -> (new state, output)."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return state, z ^ z >> 31


def test_uniforms_are_splitmix64():
    assert splitmix64(0)[1] == 0xE220A8397B1DCDAF                       # the published first output of seed 0
    seeds = [0, 1, 2**62 + 5, 2**63 - 1, -7]
    for seed, row in zip(seeds, uniforms(torch.tensor(seeds), 40).tolist()):
        state = splitmix64(seed % 2**64)[1]                             # neighbouring seeds are hashed apart first
        for got in row:
            state, out = splitmix64(state)
            assert got == (out >> 11) / 2**53


def test_uniforms_look_uniform_and_unrelated():
    u = uniforms(torch.arange(2000), 50).numpy()
    counts = np.bincount((u.flatten() * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160                    # chi-square, 99 degrees of freedom, p = 1e-4
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):               # neighbouring seeds, neighbouring tokens
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.015
    assert len(np.unique(u)) == u.size


def test_the_same_seed_gives_the_same_answer_in_every_batch(model):
    options = dict(max_new_tokens=25, eos_token_ids=list(range(20, 100)))
    seeds = torch.arange(100, 118)
    (ids, mask, pixels, grid), out = run(model, group_size=6, seeds=seeds, **options)
    assert len({tuple(row) for row in out.ids.tolist()}) == 18          # siblings differ
    order = torch.tensor([5, 2, 0])                                     # three answers to prompt 0, another order, no padding
    few = generate(model, ids[:1, mask[0] == 1], pixels[:64], grid[:1], group_size=3, seeds=seeds[order],
                   pad_token_id=PAD, banned_token_ids=[IMAGE, PAD], **options)
    n = few.ids.shape[1]
    assert torch.equal(few.ids, out.ids[order, :n]) and not out.mask[order, n:].any()
    torch.testing.assert_close(few.logps, out.logps[order, :n], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="3 . 6 answers"):
        run(model, group_size=6, seeds=seeds[:3], **options)


# --- keys and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
def test_group_attention_equals_attention_over_expanded_keys(fixed):
    """Three prompts with padding; after two tokens 4 of 9 answers go, one prompt with all of its answers."""
    torch.manual_seed(0)
    layers, B, G, Hq, Hk, T, D = 2, 3, 3, 4, 2, 5, 8
    prompts = KVCache(layers, B, Hk, T, D, torch.float32, "cpu")
    prompts.k.normal_(), prompts.v.normal_()
    valid = torch.arange(T) >= torch.tensor([[0], [2], [4]])
    owner = torch.arange(B).repeat_interleave(G)
    cache, k, v = GroupCache(prompts, valid, owner), prompts.k[:, owner], prompts.v[:, owner]
    seen = valid[owner]
    cache.at = torch.zeros(1, dtype=torch.long) if fixed else None
    cache.take(torch.arange(9), 6)
    for step in range(4):
        if step == 2:
            rows = torch.tensor([0, 2, 6, 7, 8])
            cache.length = 2
            cache.take(rows, 7)
            k, v, seen = k[:, rows], v[:, rows], seen[rows]
            assert cache.shared_k.shape[1] == 2 and cache.k.shape[1:4] == (5, Hk, 7) and cache.slot is not None
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        for layer in range(layers):
            q, new_k, new_v = (torch.randn(len(seen), h, 1, D) for h in (Hq, Hk, Hk))
            if layer == 0:
                k, v = (torch.cat([x, torch.zeros(layers, len(seen), Hk, 1, D)], 3) for x in (k, v))
            k[layer, :, :, -1:], v[layer, :, :, -1:] = new_k, new_v
            want = attention(q.double(), k[layer].double(), v[layer].double(), mask=seen[:, None, None])
            torch.testing.assert_close(cache.attend(layer, q, new_k, new_v, None).double(), want, atol=2e-6, rtol=0)
        cache.length += 1
        if fixed:
            cache.at += 1


def test_prompt_keys_are_kept_once_and_finished_answers_leave(model, monkeypatch):
    sizes, real = [], GroupCache.attend

    def attend(self, layer, q, *rest):
        if layer == 0:
            sizes.append((self.shared_k.shape[1], self.k.shape[1], self.k.shape[3]))
            assert self.k.shape[1] == len(q)
        return real(self, layer, q, *rest)

    monkeypatch.setattr(GroupCache, "attend", attend)
    monkeypatch.setattr(module, "SEGMENT", 8)
    _, out = run(model, group_size=6, max_new_tokens=40, eos_token_ids=range(20, 100), seeds=torch.arange(18))
    prompts, rows, room = zip(*sizes)
    assert max(prompts) == 3 and rows[0] == 18 and rows[-1] < 9 and list(rows) == sorted(rows, reverse=True)
    assert room[0] == 8 and all(step < r <= step + 8 for step, r in enumerate(room))       # not all 40 at once
    # computed rows stay near the running ones: a quarter may have ended, and nobody looks for three steps
    running = out.mask.sum(0).tolist()
    assert all(n <= running[max(0, step - 3)] / 0.75 + 1e-9 for step, n in enumerate(rows))


@pytest.mark.parametrize("fixed", [False, True])
def test_segments_and_fixed_shapes_change_nothing(model, fixed, monkeypatch):
    """`graph` on a CPU runs the steps that CUDA would record: fixed shapes, hidden keys, writes in place."""
    options = dict(group_size=6, max_new_tokens=40, eos_token_ids=range(20, 100), seeds=torch.arange(18))
    for temperature in (1.0, 0.0):
        _, want = run(model, temperature=temperature, **options)
        with monkeypatch.context() as patch:
            patch.setattr(module, "SEGMENT", 7)
            _, got = run(model, temperature=temperature, graph=fixed, **options)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.mask, want.mask)
        torch.testing.assert_close(got.logps, want.logps, atol=1e-5, rtol=0)
    short = run(model, graph=fixed, max_new_tokens=1)[1]
    assert short.ids.shape == (3, 1) and short.mask.all()


def test_there_is_no_truncated_sampling(model):
    for name in ("top_p", "top_k", "min_p"):
        with pytest.raises(TypeError, match=name):
            run(model, **{name: 0.9})
