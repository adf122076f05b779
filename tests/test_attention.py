"""nanopatho/attention.py: the plain path is untouched, the choice of path, and the whole model through the kernels."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from interpreter import relative, shim
from kernels import logprob
from nanopatho import attention as A
from nanopatho.decoder import KVCache
from nanopatho.generate import generate
from nanopatho.presets import VLM
from nanopatho.vlm import PathoVLM, mrope_positions

shim()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def forced():
    """Kernels on in the interpreter, and whatever the test says in between; back to auto at the end."""
    yield A.force
    A.force("auto")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = copy.deepcopy(VLM["smoke"])
    model = PathoVLM(config)
    with torch.no_grad():
        for p in model.parameters():  # far from the start, so that attention is not flat
            p.add_(torch.randn_like(p) * (0.05 if p.ndim == 1 else 0.15))
    return model


def batch(model, seed=0):
    """Two rows, each an image of unlike size (windows of 16, 8 and 4 patches) between text, the second padded right."""
    g, c = torch.Generator().manual_seed(seed), model.config
    grid = torch.tensor([(1, 6, 8), (1, 4, 4)])
    ids = torch.randint(5, 900, (2, 24), generator=g)
    mask = torch.ones_like(ids)
    ids[0, 3:15], ids[1, 2:6], mask[1, 19:] = c["image_token_id"], c["image_token_id"], 0
    return ids, torch.randn(64, 1176, generator=g), grid, mask


def test_model_through_the_kernels_equals_the_plain_path(model, forced):
    """Logits, loss, norm of the gradient and every entry of it; on the kernels' side the loss is kernels/logprob.py's."""
    ids, pixels, grid, mask = batch(model)
    labels = ids.masked_fill((mask == 0) | (ids == model.config["image_token_id"]), -100)
    results = []
    for choice in ("off", "on"):
        forced(choice)
        model.zero_grad()
        hidden = model.hidden_states(ids, pixels, grid, mask)
        if choice == "on":
            loss = logprob.cross_entropy(hidden[:, :-1].flatten(0, 1), model.head, labels[:, 1:].flatten())
        else:
            loss = model.loss(hidden, labels)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((model.logits(hidden)[mask.bool()].detach(), loss.detach(), grads.norm(), grads))
    for a, b in zip(*results):
        assert relative(b, a) < 5e-6
    assert not torch.equal(results[0][3], results[1][3])  # it really was another path


@torch.no_grad()
def test_decoding_through_the_kernels(model, forced):
    """Prefill and three steps over a cache, once with a key mask, equal the plain forward of the whole row."""
    ids, pixels, grid, _ = batch(model)
    forced("off")
    want = model.hidden_states(ids, pixels, grid)
    forced("on")
    c, d = model.config, model.model
    positions, _ = mrope_positions(ids, grid, None, c["image_token_id"], model.visual.merge)
    x, (cos, sin) = model.embed(ids, pixels, grid), d.rotary(positions)
    cache = KVCache(c["num_hidden_layers"], 2, c["num_key_value_heads"], 24, d.head_width, torch.float32, "cpu")
    parts = [d(x[:, :21], cos[:, :21], sin[:, :21], None, cache)]
    for t in (21, 22, 23):
        keys = torch.ones(2, 1, 1, t + 1, dtype=torch.bool) if t == 22 else None
        parts.append(d(x[:, t:t + 1], cos[:, t:t + 1], sin[:, t:t + 1], keys, cache))
    assert relative(torch.cat(parts, 1), want) < 5e-6


def test_packed_prompts_and_answers_equal_a_mask(forced):
    """Prompts of 5 and 3 tokens, answers of 4, 1 and 6, against a mask of who may see whom, forward and backward."""
    sizes, shared = (5, 4, 1, 3, 6), (-1, 0, 0, -1, 3)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 19, 16, generator=g, requires_grad=True) for h in (4, 2, 2))
    up = torch.randn(1, 4, 19, 16, generator=g)
    owner = torch.tensor(shared).repeat_interleave(torch.tensor(sizes))
    piece = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    seen = (piece[:, None] == piece) | (owner[:, None] == piece)
    want = A.attention(*(x.double() for x in (q, k, v)), mask=(seen & torch.ones(19, 19).tril().bool())[None, None])
    forced("on")
    got = A.packed_attention(q, k, v, sizes, shared)
    grads = [torch.autograd.grad((out * up).sum(), (q, k, v)) for out in (got, want)]
    assert relative(got, want) < 2e-6 and all(relative(a, b) < 2e-6 for a, b in zip(*grads))


@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 8, 4, 20], [100, 28]], ids=str)
def test_vision_attention_on_both_paths(sizes, forced):
    P, H, D = sum(sizes), 2, 32
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(P, 3, H, D, generator=g, requires_grad=True)
    cos, sin = A.rotary_tables(torch.rand(P, 1, D // 2, generator=g) * 6)
    plan, up = A.segments(sizes), torch.randn(P, H, D, generator=g)
    plain = A.vision_attention(qkv, cos, sin, plan)
    q, k, v = qkv.unbind(1)  # what vit.py does today, to the bit
    assert torch.equal(plain, A.segment_attention(A.rotate(q, cos, sin), A.rotate(k, cos, sin), v, plan))
    forced("on")
    got = A.vision_attention(qkv, cos, sin, plan)
    grads = [torch.autograd.grad((out * up).sum(), qkv)[0] for out in (got, plain)]
    assert relative(got, plain) < 2e-6 and relative(*grads) < 4e-6


def test_plain_path_is_pytorchs_function_to_the_bit():
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    mask = torch.rand(2, 1, 7, 7) < 0.8
    mask |= torch.eye(7, dtype=torch.bool)
    sdpa = F.scaled_dot_product_attention
    assert torch.equal(A.attention(q, k, v, causal=True), sdpa(q, k, v, is_causal=True, enable_gqa=True))
    assert torch.equal(A.attention(q, k, v, mask=mask), sdpa(q, k, v, attn_mask=mask, enable_gqa=True))
    one = A.attention(q[:, :, :1], k, v)
    assert torch.equal(one, sdpa(q[:, :, :1].reshape(2, 2, 2, 16), k, v).reshape(2, 4, 1, 16))


def test_a_dense_mask_goes_the_plain_way_and_says_so(forced, capsys):
    q, mask = torch.randn(1, 2, 5, 16), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    plain = A.attention(q, q, q, mask=mask)
    forced("on")
    A.say.cache_clear()
    assert torch.equal(A.attention(q, q, q, mask=mask), plain)
    said = capsys.readouterr().err
    assert "attention: Triton kernels (forced on, in Triton's interpreter)" in said
    assert "attention: plain PyTorch for 5 queries, 5 keys, a mask, width 16, which has no kernel" in said
    A.attention(q, q, q, mask=mask)
    assert capsys.readouterr().err == ""  # once


def test_compiling_what_lies_between_the_kernels(model, forced):
    """torch.compile of a layer: whole on the plain path, and on the kernel path a break around each kernel."""
    layer, x = model.model.layers[0], torch.randn(1, 9, 64)
    cos, sin = model.model.rotary(torch.arange(9).expand(3, 1, 9))
    want = layer(x, cos, sin, None, None, 0)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x, cos, sin, None, None, 0), want)
    forced("on")
    torch._dynamo.reset()
    got = torch.compile(layer, backend="eager")(x, cos, sin, None, None, 0)
    assert relative(got, want) < 5e-6


def test_choices_that_cannot_be_made_are_errors(forced):
    with pytest.raises(ValueError, match="choose auto, on or off"):
        forced("yes")
    code = ("import torch; from nanopatho.attention import attention as f; x = torch.ones(1, 1, 2, 16); "
            "f(x, x, x, causal=True)")
    for setting, words in (("on", "NANOPATHO_KERNELS=on is impossible: this is a cpu"),
                           ("maybe", "choose auto, on or off"), ("auto", "plain PyTorch (this is a cpu")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                              env={"PATH": "", "NANOPATHO_KERNELS": setting})
        assert words in done.stderr and (done.returncode == 0) == (setting == "auto"), done.stderr


@pytest.mark.parametrize("graph", [False, True])
def test_sampling_through_the_kernels_equals_the_plain_path(model, forced, graph):
    """Two prompts of unlike length, padded left, three answers each, some ending early: the same tokens and
    log-probabilities with the prompt's keys read by the cascade kernel. graph: fixed shapes, the unwritten part hidden."""
    ids, pixels, grid, mask = batch(model)
    ids, mask = ids.flip(1), mask.flip(1)                              # the padding to the left; image tokens are one block
    made = []
    for choice in ("off", "on"):
        forced(choice)
        made.append(generate(model, ids, pixels, grid, attention_mask=mask, group_size=3, max_new_tokens=6, temperature=1.0, graph=graph,
                             eos_token_ids=[7, 8, 9, *range(100, 400)], pad_token_id=0, seeds=torch.arange(6)))
    plain, kernels = made
    assert torch.equal(plain.ids, kernels.ids) and torch.equal(plain.mask, kernels.mask)
    assert plain.mask.sum(1).unique().numel() > 1                      # rows left at different times
    torch.testing.assert_close(kernels.logps, plain.logps, atol=2e-5, rtol=0)
