"""AdamW against torch's, the split between Muon and AdamW by hand, and that state comes back."""

import copy

import pytest
import torch
from torch import nn

from nanopatho import presets
from nanopatho.clip import CLIP
from nanopatho.optim import Optimizers, lr_factors
from nanopatho.vlm import PathoVLM, trainable


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))


def descend(model, step, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for lr in (1e-2, 5e-3, 2e-2):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        (model(x) - y).square().mean().backward()
        step(lr)
    return model.state_dict()


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_equals_torchs(fused):
    ours, theirs = small(), small()
    optimizer = Optimizers(ours, lr=1.0, weight_decay=0.1, betas=(0.8, 0.97), eps=1e-7)
    reference = torch.optim.AdamW([{"params": [theirs[0].weight, theirs[2].weight], "weight_decay": 0.1},
                                   {"params": [theirs[0].bias, theirs[1].weight, theirs[1].bias], "weight_decay": 0.0}],
                                  lr=1.0, betas=(0.8, 0.97), eps=1e-7, fused=fused)

    def their_step(lr):
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()

    one, two = descend(ours, optimizer.step), descend(theirs, their_step)
    for name in one:
        if fused:
            assert torch.equal(one[name], two[name])                   # same kernel: the same bits
        else:
            torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-6)
    assert all(p.grad is None for p in ours.parameters())


def test_weight_decay_leaves_norms_and_biases():
    model = small()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = Optimizers(model, lr=1.0, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim == 2 else 1.0)), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parts_move_at_their_own_rate(kind):
    """The first step of either is the learning rate times a direction that does not depend on it."""
    moved = []
    for factors in (None, lr_factors(1e-3, vision_lr=1e-4, projector_lr=5e-4)):
        torch.manual_seed(0)
        model = PathoVLM(presets.VLM["smoke"])
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer, g = Optimizers(model, 1e-3, 0.0, kind, factors=factors), torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step(2e-3)                                           # a schedule's rate: the shares stay
        moved.append({n: p - before[n] for n, p in model.named_parameters()})
    for name, whole in moved[0].items():
        share = 0.5 if ".merger." in name else 0.1 if name.startswith("visual.") else 1.0
        torch.testing.assert_close(moved[1][name], share * whole, atol=2e-7, rtol=1e-3)
    assert lr_factors(0.0) == {} and set(lr_factors(1e-5).values()) == {1.0}


@pytest.mark.parametrize("make", [lambda: PathoVLM(presets.VLM["smoke"]), lambda: CLIP(presets.CLIP["smoke"]),
                                  lambda: PathoVLM({**presets.VLM["smoke"], "tie_word_embeddings": False})],
                         ids=["vlm", "clip", "untied"])
def test_every_parameter_is_in_one_optimizer(make):
    model = make()
    adamw, muon = Optimizers(model, 1e-3, 0.1, "muon")
    held = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())   # each once, none left out
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in in_muon}
    outside = {n for n, p in model.named_parameters() if id(p) not in in_muon}
    assert all(p.ndim == 2 for n, p in model.named_parameters() if n in names)
    # what is left to AdamW: tables, heads, patch convolutions, projections out of a tower, and everything with one axis
    matrices = {n for n in outside if dict(model.named_parameters())[n].ndim >= 2}
    want = {"model.embed_tokens.weight", "visual.patch_embed.proj.weight", "lm_head.weight",
            "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
            "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight",
            "text_projection.weight", "visual_projection.weight"} & set(dict(model.named_parameters()))
    assert matrices == want and names
    decay = {id(p): g["weight_decay"] for o in (adamw, muon) for g in o.param_groups for p in g["params"]}
    assert all((decay[id(p)] == 0.1) == (p.ndim >= 2) for p in model.parameters())


def test_frozen_parts_are_left_alone():
    model = PathoVLM(presets.VLM["smoke"])
    parameters = trainable(model, ["projector"])
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = Optimizers(model, 1e-3, 0.1, "muon")
    held = [p for o in optimizer for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in parameters}
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step(1e-2)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """Without momentum from earlier steps the update is U V^T of the gradient times lr * 0.2 * sqrt(longer side)."""
    model = PathoVLM(presets.VLM["smoke"])
    weight = model.model.layers[0].mlp.up_proj.weight                  # (128, 64)
    before = weight.detach().clone()
    optimizer = Optimizers(model, 1.0, 0.0, "muon")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    u, _, v = torch.linalg.svd(weight.grad.double(), full_matrices=False)
    optimizer.step(1e-2)
    moved = (before - weight).double() / (1e-2 * 0.2 * max(weight.shape) ** 0.5)
    assert (moved * (u @ v)).sum() / (moved.norm() * (u @ v).norm()) > 0.97  # five Newton-Schulz steps, bf16
    singular = torch.linalg.svdvals(moved)
    assert 0.6 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_comes_back(kind):
    def run(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step(1e-3)
        return model.state_dict()

    torch.manual_seed(0)
    model = PathoVLM(presets.VLM["smoke"])
    optimizer = Optimizers(model, 1e-3, 0.1, kind)
    run(model, optimizer, (1, 2))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))     # else both share the tensors
    assert len(state) == (2 if kind == "muon" else 1)
    other = PathoVLM(presets.VLM["smoke"])
    other.load_state_dict(weights)
    restored = Optimizers(other, 9.0, 0.1, kind)
    restored.load_state_dict(state)
    one, two = run(model, optimizer, (3, 4)), run(other, restored, (3, 4))
    assert all(torch.equal(one[k], two[k]) for k in one)
    if kind == "muon":
        with pytest.raises(ValueError):
            Optimizers(other, 1e-3, 0.1, "adamw").load_state_dict(state)   # of another kind of run: not half of it


def test_an_old_torch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SystemExit, match="muon needs torch 2.9 or later .*use adamw"):
        Optimizers(small(), 1e-3, 0.1, "muon")
