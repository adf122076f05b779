"""The whole model against transformers' Qwen2.5-VL on tiny random weights, and its pieces against brute force."""

import copy
import json

import pytest
import torch

from nanopatho import image
from nanopatho.attention import attention, padded_causal_mask, rotary_tables, rotate, segment_attention, segments
from nanopatho.decoder import KVCache
from nanopatho.generate import generate
from nanopatho.projector import RMSNorm
from nanopatho.vit import window_order
from nanopatho.vlm import PathoVLM, mrope_positions, parse_config, trainable
from nanopatho.weights import published_name

IMAGE = 185
# Odd numbers on purpose: four heads on one key head, unequal sections, sizes that are no powers of two.
CONFIG = dict(
    model_type="qwen2_5_vl", vocab_size=192, hidden_size=96, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[2, 5, 5]), bos_token_id=180, eos_token_id=181,
    vision_start_token_id=182, vision_end_token_id=183, image_token_id=IMAGE, video_token_id=186,
    vision_config=dict(depth=3, hidden_size=40, intermediate_size=72, num_heads=2, out_hidden_size=96, in_chans=3,
                       patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                       fullatt_block_indexes=[1], tokens_per_second=2))
# The configuration of the CPU demo: windows of 2 x 2 cells, two query heads a key head, tied head.
TINY = dict(
    model_type="qwen2_5_vl", vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
    rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6]), eos_token_id=1,
    vision_start_token_id=2, vision_end_token_id=3, image_token_id=IMAGE, video_token_id=5,
    vision_config=dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128, in_chans=3,
                       patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=56,
                       fullatt_block_indexes=[1, 3], tokens_per_second=2))


def spread_weights(model):
    """Random norms around 1, biases around 0: with the default values a forgotten one would go unnoticed."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(float(name.endswith("weight")), 0.3)
            else:
                p.normal_(0, 0.3 if "embed_tokens" in name or "lm_head" in name else p[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module", params=["odd tied", "odd untied", "tiny"])
def pair(request, tmp_path_factory):
    """(ours, reference) with the same random weights, handed over through a folder in the published form."""
    transformers = pytest.importorskip("transformers")
    odd = CONFIG | dict(tie_word_embeddings=request.param == "odd tied")
    flat = copy.deepcopy(TINY if request.param == "tiny" else odd)
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    reference = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**copy.deepcopy(flat)))
    spread_weights(reference).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(flat))
    reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    return PathoVLM.from_pretrained(folder, dtype=torch.float32), reference


def prompt(grids: list[list[tuple[int, int]]], length: int, pad: str = "right", seed: int = 0):
    """One row per entry of `grids`, holding those images (in patches) between random text -> ids, mask, pixels, grid.

    Rows are padded to the longest one, and at least to `length`.
    """
    g = torch.Generator().manual_seed(seed)
    rows, flat = [], [hw for row in grids for hw in row]
    for images in grids:
        row = torch.randint(6, 170, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g).tolist()
        for h, w in images:
            row += [182] + [IMAGE] * (h * w // 4) + [183] + torch.randint(6, 170, (3,), generator=g).tolist()
        rows.append(row + torch.randint(6, 170, (4,), generator=g).tolist())
    length = max(length, *map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if pad == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    if not flat:
        return ids, mask, None, None
    pixels = torch.randn(sum(h * w for h, w in flat), 1176, generator=g)
    return ids, mask, pixels, torch.tensor([(1, h, w) for h, w in flat])


def reference_positions(reference, ids, mask, grid):
    types = (ids == IMAGE).int()
    return types, reference.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)


def reference_logits(reference, ids, mask, pixels, grid):
    reference.model.rope_deltas = None  # it remembers them between calls
    types, (positions, _) = reference_positions(reference, ids, mask, grid)
    return reference(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels,
                     image_grid_thw=grid, mm_token_type_ids=types, use_cache=False).logits


# One window, several, sides that are and are not multiples of 4 cells (of 2 for the tiny windows), equal and unequal.
GRIDS = [[(4, 6)], [(8, 8), (8, 8)], [(12, 20)], [(10, 26), (4, 4), (18, 6)], [(2, 34)], [(16, 16)]]
BATCHES = {
    "one image": [[(8, 8)]], "two images in a row": [[(10, 12), (16, 8)]], "text only": [[], [], []],
    "uneven batch": [[(4, 4)], [], [(18, 10), (2, 2)]], "equal images": [[(8, 8)], [(8, 8)], [(8, 8)]],
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@torch.no_grad()
def test_vision_features(pair, grid):
    ours, reference = pair
    pixels, thw = torch.randn(sum(h * w for h, w in grid), 1176), torch.tensor([(1, h, w) for h, w in grid])
    expected = reference.model.visual(pixels, grid_thw=thw).pooler_output
    torch.testing.assert_close(ours.visual(pixels, thw), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_vision_features_of_bytes(pair):
    ours, reference = pair
    patches, thw = torch.randint(256, (64, 588), dtype=torch.uint8), torch.tensor([(1, 8, 8)])
    mean, std = (torch.from_numpy(x).view(3, 1, 1) for x in (image.MEAN, image.STD))
    pixels = ((patches.view(64, 3, 1, 196) / 255.0 - mean) / std).expand(-1, -1, 2, -1).reshape(64, 1176).float()
    expected = reference.model.visual(pixels, grid_thw=thw).pooler_output
    torch.testing.assert_close(ours.visual(patches, thw), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("window", [56, 112])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_order_and_segments(grid, window):
    get_vision_window_index = pytest.importorskip("transformers.vision_utils").get_vision_window_index
    thw = torch.tensor([(1, h, w) for h, w in grid])
    window_index, bounds = get_vision_window_index(thw, 2, window, 14)
    order, sizes, first = [], [], 0
    for h, w in grid:
        cells, lengths = window_order(h // 2, w // 2, window // 28)
        order, sizes, first = order + (cells + first).tolist(), sizes + [4 * n for n in lengths], first + len(cells)
    assert order == window_index.tolist()
    assert sizes == bounds.unique_consecutive().diff().tolist()  # an empty window repeats a bound


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_logits_loss_and_gradients(pair, name, pad):
    ours, reference = pair
    ids, mask, pixels, grid = prompt(BATCHES[name], 12, pad)
    real = mask.bool()

    _, (positions, delta) = reference_positions(reference, ids, mask, grid)
    mine, after = mrope_positions(ids, grid, real, IMAGE)
    assert torch.equal(mine * mask, positions * mask)
    assert torch.equal(after, mask.sum(1) + delta.flatten())

    logits, expected = ours(ids, pixels, grid, mask), reference_logits(reference, ids, mask, pixels, grid)
    torch.testing.assert_close(logits[real], expected[real], atol=5e-5, rtol=0)
    torch.testing.assert_close(*(x[real].log_softmax(-1) for x in (logits, expected)), atol=5e-5, rtol=0)

    trained = real & (ids != IMAGE) & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    trained[:, 1:] &= real[:, :-1]  # the first real token has nothing before it
    trained[:, 0] = False
    labels = ids.masked_fill(~trained, -100)
    loss = ours.loss(ours.hidden_states(ids, pixels, grid, mask), labels)
    truth = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(loss.item() - truth.item()) < 1e-5

    for model, value in ((ours, loss), (reference, truth)):
        model.zero_grad()
        value.backward()
    grads = [{published_name(n): p.grad for n, p in m.named_parameters() if p.grad is not None}
             for m in (ours, reference)]
    norms = [sum(g.double().square().sum() for g in some.values()).sqrt().item() for some in grads]
    assert abs(norms[0] / norms[1] - 1) < 1e-5
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], atol=3e-5 * norms[1], rtol=1e-4, msg=lambda m: f"{n}: {m}")


@torch.no_grad()
def test_greedy_text_of_a_left_padded_batch(pair):
    ours, reference = pair
    ids, mask, pixels, grid = prompt([[(8, 8)], [], [(4, 12), (6, 10)]], 12, "left")
    reference.model.rope_deltas = None
    theirs = reference.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid,
                                mm_token_type_ids=(ids == IMAGE).int(), max_new_tokens=8, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
    mine = generate(ours, ids, pixels, grid, attention_mask=mask, max_new_tokens=8, temperature=0, eos_token_ids=[],
                    pad_token_id=0)
    assert torch.equal(mine.ids, theirs[:, ids.shape[1]:])


@torch.no_grad()
def test_image_embeds_serve_many_rows(pair):
    ours, _ = pair
    ids, mask, pixels, grid = prompt([[(8, 8)]], 12)
    features = ours.visual(pixels, grid)
    many = ours(ids.repeat(3, 1), image_grid_thw=grid.repeat(3, 1), image_embeds=features.repeat(3, 1))
    torch.testing.assert_close(many, ours(ids, pixels, grid).repeat(3, 1, 1), atol=2e-5, rtol=0)


@torch.no_grad()
def test_token_logps_against_plain_log_softmax(pair):
    ours, _ = pair
    ids, mask, pixels, grid = prompt([[(8, 8)], []], 12)
    scored = mask.bool().clone()
    scored[:, :2] = False
    hidden, logits = ours.hidden_states(ids, pixels, grid, mask), ours(ids, pixels, grid, mask).double()
    plain = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    logps = ours.token_logps(hidden, ids, scored)
    assert logps.dtype == torch.float32 and (logps[~scored] == 0).all()
    torch.testing.assert_close(logps[scored].double(), plain[scored[:, 1:]], atol=1e-5, rtol=0)

    banned = [IMAGE, 7]
    scored &= ~torch.isin(ids, torch.tensor(banned))
    logits[..., banned] = float("-inf")
    plain = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    logps = ours.token_logps(hidden, ids, scored, temperature=0.7, banned=banned)
    torch.testing.assert_close(logps[scored].double(), plain[scored[:, 1:]], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="first token"):
        ours.token_logps(hidden, ids, mask)


@torch.no_grad()
def test_cached_decoding_equals_full_forward(pair):
    ours, _ = pair
    ids, mask, pixels, grid = prompt([[(8, 8)], [(4, 12)]], 12, "left")
    full = ours.hidden_states(ids, pixels, grid, mask)
    positions, _ = mrope_positions(ids, grid, mask.bool(), IMAGE)
    causal, x, (cos, sin) = padded_causal_mask(mask.bool()), ours.embed(ids, pixels, grid), ours.model.rotary(positions)
    c, T, start = ours.config, ids.shape[1], ids.shape[1] - 5
    cache = KVCache(c["num_hidden_layers"], 2, c["num_key_value_heads"], T, ours.model.head_width, torch.float32, "cpu")
    parts = [ours.model(x[:, a:b], cos[:, a:b], sin[:, a:b], causal[:, :, a:b, :b], cache)
             for a, b in [(0, start), (start, start + 2)] + [(t, t + 1) for t in range(start + 2, T)]]
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], full[mask.bool()], atol=2e-5, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(pair):
    ours, _ = pair
    ids, mask, pixels, grid = prompt([[(8, 8)]], 12)
    alone = ours(ids, pixels, grid)
    for n in (1, 7):
        zeros = torch.zeros(1, n, dtype=torch.long)
        right = ours(torch.cat((ids, zeros), 1), pixels, grid, torch.cat((mask, zeros), 1))[:, :-n]
        left = ours(torch.cat((zeros, ids), 1), pixels, grid, torch.cat((zeros, mask), 1))[:, n:]
        torch.testing.assert_close(right, alone, atol=2e-5, rtol=0)
        torch.testing.assert_close(left, alone, atol=2e-5, rtol=0)


def test_trainable_parts_cover_the_model_once():
    model = PathoVLM(TINY)
    parts = {part: {id(p) for p in trainable(model, [part])} for part in ("vision", "projector", "decoder")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == len(list(model.parameters()))
    assert parts["projector"] == {id(p) for p in model.visual.merger.parameters()}
    assert parts["decoder"] == {id(p) for p in model.model.parameters()}


def test_recomputation_gives_the_same_gradients():
    torch.manual_seed(0)
    model = spread_weights(PathoVLM(TINY))
    ids, mask, pixels, grid = prompt([[(8, 8)]], 12)
    grads = []
    for recompute in (False, True):
        model.visual.recompute = model.model.recompute = recompute
        model.zero_grad()
        model.loss(model.hidden_states(ids, pixels, grid), ids).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---------------------------------------------------------------------------------------------------- callers' mistakes


def test_image_count_errors_say_what_is_wrong():
    model = PathoVLM(TINY)
    ids, mask, pixels, grid = prompt([[(8, 8)]], 12)
    short = ids.clone()
    short[ids == IMAGE] = torch.cat((torch.full((15,), IMAGE), torch.tensor([9])))
    with pytest.raises(ValueError, match="hold 15 image tokens.*make 16"):
        model(short, pixels, grid)
    with pytest.raises(ValueError, match="hold 16 image tokens.*make 0"):
        model(ids)
    with pytest.raises(ValueError, match="60 patches"):
        model(ids, pixels[:60], grid)
    with pytest.raises(ValueError, match="videos"):
        model(ids, pixels.repeat(4, 1), torch.tensor([(4, 8, 8)]))
    torn = ids.clone()
    at = (ids[0] == IMAGE).nonzero().flatten()
    torn[0, at[-1]], torn[0, at[-1] + 1] = 9, IMAGE
    with pytest.raises(ValueError, match="do not stand in one run"):
        model(torn, pixels, grid)
    with pytest.raises(ValueError, match="nothing to learn"):
        model.loss(model.hidden_states(ids, pixels, grid), torch.full_like(ids, -100))


# ---------------------------------------------------------------------------------------------------- configuration


def test_three_forms_of_config_mean_the_same():
    flat = CONFIG | dict(tie_word_embeddings=True)
    text_names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "bos_token_id", "eos_token_id")
    rope45 = dict(mrope_section=[2, 5, 5], rope_type="default", type="default")
    text = {name: flat[name] for name in text_names}
    both = {**{k: v for k, v in flat.items() if k != "tie_word_embeddings"}, "rope_scaling": rope45,
            "text_config": text | dict(rope_theta=1e6, rope_scaling=rope45, tie_word_embeddings=True)}
    nested = {k: v for k, v in flat.items() if k not in (*text_names, "rope_theta", "rope_scaling")}
    rope5 = dict(mrope_section=[2, 5, 5], rope_theta=1e6, rope_type="default")
    nested["text_config"] = text | dict(rope_parameters=rope5)
    nested["vision_config"] = {("in_channels" if k == "in_chans" else k): v for k, v in flat["vision_config"].items()}
    assert parse_config(flat) == parse_config(both) == parse_config(nested)
    assert parse_config(parse_config(flat)) == parse_config(flat)
    assert parse_config(CONFIG)["tie_word_embeddings"] is None


def test_config_written_by_transformers_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Qwen2_5_VLConfig(**copy.deepcopy(TINY)).save_pretrained(tmp_path)
    assert parse_config(json.loads((tmp_path / "config.json").read_text())).items() >= parse_config(TINY).items()


@pytest.mark.parametrize("change, message", [
    (dict(rms_norm_eps=None), "rms_norm_eps"), (dict(model_type="qwen2_vl"), "qwen2_vl"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(rope_scaling=dict(type="yarn", mrope_section=[2, 5, 5])), "yarn"), (dict(rope_scaling=None), "mrope_section"),
    (dict(use_sliding_window=True), "sliding"), (dict(vision_config=dict(depth=3)), "vision_config.hidden_size"),
    (dict(rope_scaling=dict(type="mrope", mrope_section=[5, 5, 5])), "head width"),
])
def test_unusable_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config(CONFIG | change)


# ---------------------------------------------------------------------------------------------------- parts


def test_published_sizes_of_3b_and_7b():
    common = dict(rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
                  image_token_id=151655)
    vision = dict(hidden_size=1280)  # the rest are the defaults of the published class
    three = common | dict(vocab_size=151936, hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
                          num_key_value_heads=2, intermediate_size=11008, tie_word_embeddings=True,
                          vision_config=vision | dict(out_hidden_size=2048))
    seven = common | dict(vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
                          num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False,
                          vision_config=vision)
    with torch.device("meta"):
        for config, tensors, parameters in ((three, 824, 3_754_622_976), (seven, 729, 8_292_166_656)):
            state = PathoVLM(config).state_dict()
            assert (len(state), sum(p.numel() for p in state.values())) == (tensors, parameters)


@pytest.mark.parametrize("causal, masked, heads, kv, Tq, Tk", [
    (True, False, 4, 2, 9, 9), (False, False, 3, 3, 5, 7), (False, True, 4, 1, 6, 6), (False, True, 4, 2, 1, 8),
    (False, False, 4, 2, 1, 8)])
def test_attention_is_explicit_softmax(causal, masked, heads, kv, Tq, Tk):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, Tq, 8), torch.randn(2, kv, Tk, 8), torch.randn(2, kv, Tk, 8)
    mask = torch.ones(2, 1, Tq, Tk, dtype=torch.bool)
    if causal:
        mask = mask.tril()
    if masked:
        mask = torch.rand(2, 1, Tq, Tk) < 0.6
        mask[..., 0] = True
    expected = torch.empty(2, heads, Tq, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(heads):
            j = h // (heads // kv)
            scores = (q[b, h].double() @ k[b, j].double().T / 8 ** 0.5).masked_fill(~mask[b, 0], float("-inf"))
            expected[b, h] = scores.softmax(-1) @ v[b, j].double()
    ours = attention(q, k, v, causal=causal, mask=mask if masked else None)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_attention_refuses_causal_with_a_mask():
    q = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="mask"):
        attention(q, q, q, causal=True, mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_padded_causal_mask_literal():
    mask = padded_causal_mask(torch.tensor([[False, True, True]]))
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert torch.equal(padded_causal_mask(torch.tensor([[False, True, True]]), Tq=1), mask[:, :, 2:])


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 5, 3, 1, 5], [7]])
def test_segments_are_separate_attentions(lengths):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(lengths), 2, 8)
    parts, first = [], 0
    for n in lengths:
        parts.append(attention(*(x[first:first + n].transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1))
        first += n
    torch.testing.assert_close(segment_attention(q, k, v, segments(lengths)), torch.cat(parts), atol=1e-6, rtol=1e-5)


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x, angles = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 1, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotate(x, *rotary_tables(angles, torch.float64)), expected)


def test_rms_norm_and_its_written_out_gradient():
    torch.manual_seed(0)
    norm, x = RMSNorm(16).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    # The module works in fp32 inside, so the truth is F.rms_norm in float64 and the tolerance that of fp32.
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = norm(a), torch.nn.functional.rms_norm(b, (16,), norm.weight, norm.eps)
    torch.testing.assert_close(y, truth, atol=1e-5, rtol=1e-5)
    g = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, (a, norm.weight), g), torch.autograd.grad(truth, (b, norm.weight), g)
    for mine, true in zip(ours, theirs):
        torch.testing.assert_close(mine, true, atol=1e-5, rtol=1e-5)


def test_positions_of_the_docstring_example():
    ids = torch.tensor([[10, 11, 12, IMAGE, IMAGE, IMAGE, IMAGE, 13]])
    positions, after = mrope_positions(ids, torch.tensor([[1, 4, 4]]), None, IMAGE)
    assert positions[:, 0].tolist() == [[0, 1, 2, 3, 3, 3, 3, 5], [0, 1, 2, 3, 3, 4, 4, 5], [0, 1, 2, 3, 4, 3, 4, 5]]
    assert after.tolist() == [6]


def test_window_order_against_a_grid_walk():
    for rows, cols, side in [(2, 3, 2), (4, 4, 2), (5, 9, 4), (1, 7, 4), (8, 8, 4)]:
        walk, sizes = [], []
        for top in range(0, rows, side):
            for left in range(0, cols, side):
                cells = [r * cols + c for r in range(rows) for c in range(cols)
                         if r // side == top // side and c // side == left // side]
                walk, sizes = walk + cells, sizes + [len(cells)]
        order, lengths = window_order(rows, cols, side)
        assert (order.tolist(), lengths) == (walk, sizes)
