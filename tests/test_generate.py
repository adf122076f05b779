"""Cached group sampling against plain forward passes: same tokens, same probabilities, right masks."""

import copy

import pytest
import torch
from test_vlm import IMAGE, TINY, prompt, spread_weights

from nanopatho.generate import draw, generate
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
    (ids, *_), _ = run(model, group_size=5, max_new_tokens=3, eos_token_ids=[])
    for hook in hooks:
        hook.remove()
    assert seen == [("visual", 3), (3, ids.shape[1]), (15, 1), (15, 1)]


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
    ids = draw(p.log().expand(n, -1), torch.Generator().manual_seed(0)).squeeze(1)
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
