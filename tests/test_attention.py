"""nanopatho/attention.py: the plain path is untouched, the choice of path, and the whole model through the kernels."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from interpreter import relative, shim
from kernels import norms
from nanopatho import attention as A
from nanopatho.decoder import KVCache
from nanopatho.generate import generate
from nanopatho.presets import VLM
from nanopatho.projector import RMSNorm
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


def run(model, ids, pixels, grid, mask, documents=None):
    """-> logits, loss, norm of the gradient, every entry of it."""
    labels = ids.masked_fill((mask == 0) | (ids == model.config["image_token_id"]), -100)
    model.zero_grad()
    hidden = model.hidden_states(ids, pixels, grid, mask, documents=documents)
    loss = model.loss(hidden, labels)
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()]).detach()
    return model.logits(hidden)[mask.bool()].detach(), loss.detach(), grads.norm(), grads


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_model_through_the_kernels_equals_the_plain_path(model, forced, rows):
    """Attention, RMSNorm, rotation, SwiGLU and the loss. Packed: the two samples in one row, and a third of one token."""
    ids, pixels, grid, mask = batch(model)
    documents = None
    if rows == "packed":
        ids, documents = torch.cat([ids[:1], ids[1:, :19], ids[:1, :1]], 1), torch.tensor([24, 19, 1])
        mask = torch.ones_like(ids)
    results = []
    for choice in ("off", "on"):
        forced(choice)
        results.append(run(model, ids, pixels, grid, mask, documents))
    for a, b in zip(*results):
        assert relative(b, a) < 5e-6
    assert not torch.equal(results[0][3], results[1][3])  # it really was another path


def test_model_in_bfloat16_is_as_near_to_fp32_as_the_plain_path(model, forced):
    """What runs on a GPU: weights, activations and rotary tables in bf16. Truth: the same rounded weights in fp32."""
    given, half = batch(model), copy.deepcopy(model).bfloat16()
    results = {}
    full = copy.deepcopy(half).float()
    for name, choice, m in (("fp32", "off", full), ("plain", "off", half), ("kernels", "on", half)):
        forced(choice)
        results[name] = run(m, *given)
    for want, plain, kernels in zip(*results.values()):
        assert relative(kernels, want) < max(2 * relative(plain, want), 2e-3)


def test_the_models_parts_take_their_kernels_and_leave_them_to_the_compiler(forced, monkeypatch):
    """To the bit what kernels/norms.py gives, tables of many shapes; inside torch.compile the plain formulas."""
    g = torch.Generator().manual_seed(0)
    x, y, norm = torch.randn(2, 5, 3, 16, generator=g), torch.randn(2, 5, 3, 16, generator=g), RMSNorm(16, 1e-5)
    plain = norm(x), A.swiglu(x, y)
    forced("on")
    assert torch.equal(norm(x), norms.rms_norm(x, norm.weight, 1e-5))
    assert torch.equal(A.swiglu(x, y), norms.swiglu(x, y))
    for rows in ((2, 5), (1, 5)):  # one table for both rows
        cos, sin = A.rotary_tables(torch.rand(*rows, 1, 8, generator=g) * 6)
        half = (t.expand(2, 5, 1, 8).reshape(10, 8) for t in (cos[..., :8], sin[..., 8:]))
        turned = A.rotate(x, cos, sin)
        assert torch.equal(turned, norms.rotary(x.view(10, 3, 16), *half).view(x.shape))
        forced("off")
        assert relative(turned, A.rotate(x, cos, sin)) < 2e-6
        forced("on")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(norm(x), plain[0]) and torch.equal(A.swiglu(x, y), plain[1])


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


@pytest.mark.parametrize("choice", ["off", "on"])
@pytest.mark.parametrize("sizes", [[5, 1, 8, 5], [6, 6]], ids=str)
def test_documents_equal_a_mask(sizes, choice, forced):
    """Against who may see whom written out over the whole row, forward and backward, four query heads on two."""
    T, g = sum(sizes), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, T, 16, generator=g, requires_grad=True) for h in (4, 2, 2))
    up, owner = torch.randn(1, 4, T, 16, generator=g), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    seen = (owner[:, None] == owner) & torch.ones(T, T).tril().bool()
    want = A.attention(*(x.double() for x in (q, k, v)), mask=seen[None, None])
    forced(choice)
    got = A.Documents(sizes, "cpu").attend(0, q, k, v, None)
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
    """torch.compile of a layer: whole on the plain path, and on the kernel path a break around attention. Packed rows,
    whose plans are all unlike, need no new graphs once their length is a variable."""
    layer = model.model.layers[0]

    def inputs(T):
        return torch.randn(1, T, 64), *model.model.rotary(torch.arange(T).expand(3, 1, T)), None

    given = inputs(9)
    want = layer(*given, None, 0)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*given, None, 0), want)
    forced("on")
    torch._dynamo.reset()
    compiled, graphs = torch.compile(layer, backend="eager"), []
    assert relative(compiled(*given, None, 0), want) < 5e-6
    for sizes in ([4, 5], [3, 3, 4], [9, 1, 2], [2, 5, 1, 1, 4]):
        row, documents = inputs(sum(sizes)), A.Documents(sizes, "cpu")
        assert relative(compiled(*row, documents, 0), layer(*row, documents, 0)) < 5e-6
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3]


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
