"""The plan of a run against what is really there: published totals, optimizer state, caches, what autograd keeps."""

import ast
import dataclasses
import re
import time

import pytest
import torch

import train_clip
import train_pretrain
import train_rl
import train_sft
from nanopatho import lora, plan, presets
from nanopatho.clip import CLIP, clip_loss
from nanopatho.decoder import KVCache
from nanopatho.optim import Optimizers
from nanopatho.vlm import PathoVLM, trainable

SCRIPTS = {"clip": train_clip, "pretrain": train_pretrain, "sft": train_sft, "rl": train_rl}
TOTALS = {"3b": 3_754_622_976, "7b": 8_292_166_656, "clip-b16": 149_620_737, "clip-l14": 427_616_513}


def config(stage, **fields):
    return SCRIPTS[stage].Config(**fields)


@pytest.mark.parametrize("stage, preset", [("clip", "clip-b16"), ("clip", "clip-l14"), ("pretrain", "3b"),
                                           ("sft", "7b"), ("rl", "7b"), ("rl", "smoke")])
def test_dry_run_of_every_script(stage, preset, capsys):
    begin = time.process_time()
    with pytest.raises(SystemExit) as ended:                           # published sizes need no --init for it
        SCRIPTS[stage].main(["--preset", preset, "--dry-run", "--world", "8"])
    assert not ended.value.code and time.process_time() - begin < 10
    with torch.device("meta"):
        model = CLIP(presets.CLIP[preset]) if stage == "clip" else PathoVLM(presets.VLM[preset])
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    total = sum(p.numel() for p in model.parameters())
    assert total == TOTALS.get(preset, total)
    shown, tensors = capsys.readouterr().out.split("\ntensors\n")
    assert f"{total:,} parameters in {len(named)} tensors, {2 * total:,} bytes as bf16" in shown
    parts = re.findall(r"^  \w+ +([\d,]+)  (?:trained|frozen)$", shown, re.MULTILINE)
    assert sum(int(number.replace(",", "")) for number in parts) == total
    names = {}
    for name, shape in re.findall(r"^  (\S+) (\(.*\))$", tensors, re.MULTILINE):   # every line written out again
        low, high = map(int, (re.findall(r"{(\d+)\.\.(\d+)}", name) or [(0, 0)])[0])
        names |= {re.sub(r"{.*}", str(i), name): ast.literal_eval(shape) for i in range(low, high + 1)}
    assert names == named


def test_a_folder_that_does_not_fit_is_told_before_anything_is_loaded(tmp_path, capsys):
    model = PathoVLM(presets.VLM["smoke"])
    model.save_pretrained(tmp_path)
    for argv, code in ((["--init", str(tmp_path)], 0), (["--init", str(tmp_path / "none")], 2), (["--world", "0"], 2)):
        with pytest.raises(SystemExit) as ended:
            train_sft.main(["--preset", "smoke", "--dry-run", *argv])
        assert (ended.value.code or 0) == code
    assert "no such folder" in (told := capsys.readouterr().err) and "--world 0: must be 1 or more" in told


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("train", ["vision,projector,decoder", "projector,decoder"])
def test_weights_gradients_and_optimizer_are_what_is_allocated(kind, train):
    c = config("sft", preset="smoke", train=train, optimizer=kind)
    model = PathoVLM(presets.VLM["smoke"])
    parameters = trainable(model, train.split(","))
    optimizer = Optimizers(model, 1e-3, 0.1, kind)
    for p in parameters:
        p.grad = torch.ones_like(p)
    gradients = sum(p.grad.nbytes for p in parameters)
    optimizer.step(1e-3)
    state = sum(x.nbytes for one in optimizer for values in one.state.values() for x in values.values() if x.ndim)
    told = plan.memory(model, c, "sft", 1)
    weights = sum(p.nbytes for p in model.parameters())
    assert (told["weights"], told["gradients"], told["optimizer"]) == (weights, gradients, state)
    shared = plan.memory(model, c, "sft", 4)
    assert all(shared[name] == told[name] / 4 for name in ("weights", "gradients", "optimizer"))


def test_lora_in_the_plan():
    """Frozen weights in bf16, A and B with gradients and moments in fp32; no reference; of the tower, activations neither."""
    model = PathoVLM(presets.VLM["small"]).bfloat16()
    parameters = lora.add(model, 4)
    optimizer = Optimizers(model, 1e-3, 0.1)
    for p in parameters:
        p.grad = torch.ones_like(p)
    gradients = sum(p.grad.nbytes for p in parameters)
    optimizer.step(1e-3)
    state = sum(x.nbytes for one in optimizer for values in one.state.values() for x in values.values() if x.ndim)
    c = config("rl", preset="small", algo="grpo", lora=4)
    told = plan.memory(model, c, "rl", 1)
    assert (told["weights"], told["gradients"], told["optimizer"]) == (sum(p.nbytes for p in model.parameters()), gradients, state)
    assert "reference model" not in told and "reference model" in plan.memory(model, dataclasses.replace(c, lora=0), "rl", 1)
    before, total = sum(n for n in told.values()), sum(p.numel() for p in parameters)
    assert plan.peak(told) == before - min(sum(told[n] for n in names) for names in (plan.SAMPLING, plan.UPDATE))
    shown = plan.describe(c, "rl")
    assert re.search(rf"  lora +{total:,}  trained\n", shown) and re.search(r"  decoder +[\d,]+  frozen\n", shown)
    assert re.search(rf"at most +{plan.peak(told) / 1e9:.2f} ", shown)


def test_what_rl_needs_besides():
    model = PathoVLM(presets.VLM["smoke"]).bfloat16()
    c = config("rl", preset="smoke", algo="grpo", prompts=4, group_size=8, max_new_tokens=10, max_pixels=28 * 28 * 16)
    told = plan.memory(model, c, "rl", 2)
    assert told["reference model"] == told["weights"] == 2 * sum(p.nbytes for p in model.parameters()) / 2
    caches = [KVCache(2, rows, 2, tokens, 16, torch.bfloat16, "cpu")   # of two prompts, and of eight answers to each
              for rows, tokens in ((2, 16 + plan.PROMPT), (16, 10))]
    assert told["copy to sample from"] == sum(p.nbytes for p in model.parameters())
    assert told["keys and values"] == sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
    outside = [p for n, p in model.named_parameters() if ".blocks." not in n and ".layers." not in n]
    layer = max(sum(p.nbytes for p in x.parameters()) for x in (*model.model.layers, *model.visual.blocks))
    assert told["gathered weights"] == sum(p.nbytes for p in outside) + layer
    for more in (dict(algo="dapo"), dict(kl="0")):
        assert "reference model" not in plan.memory(model, dataclasses.replace(c, **more), "rl", 2)


def kept(run, model):
    """Bytes of the distinct tensors that autograd keeps while run() computes a loss, weights not counted."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), x)           # x is held, so that no address is used twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    return sum(n for n, _ in seen.values()) + 0 * loss.item()


@pytest.mark.parametrize("preset, rank", [("smoke", 0), ("small", 0), ("small", 8)])
def test_activations_are_those_that_backward_keeps(preset, rank, monkeypatch):
    monkeypatch.setattr(plan, "PROMPT", 40), monkeypatch.setattr(plan, "ANSWER", 60)
    torch.manual_seed(0)
    model = PathoVLM(presets.VLM[preset])
    if rank:
        lora.add(model, rank)
    c = config("sft", preset=preset, batch_size=2, max_pixels=28 * 28 * 16, lora=rank)
    ids = torch.randint(0, 900, (2, 16 + 40 + 60))
    ids[:, 3:19] = model.config["image_token_id"]
    labels = ids.clone()
    labels[:, :-60] = -100
    pixels, grid, calls = torch.randn(128, 1176), torch.tensor([(1, 8, 8)] * 2), []
    run = lambda: model.loss(model.hidden_states(ids, pixels, grid), labels)
    assert 0.9 < plan.activations(model, c, "sft", 1, size=4) / kept(run, model) < 1.15
    model.visual.recompute = model.model.recompute = True
    layers = [*(() if rank else model.visual.blocks), *model.model.layers]     # a frozen tower keeps nothing
    hooks = [layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args))) for layer in layers]
    really = kept(run, model)
    for hook in hooks:
        hook.remove()
    really += max(kept(lambda: layer(*args).sum(), model) for layer, args in calls)          # the one that is opened
    assert len(calls) == len(layers) and 0.9 < plan.activations(model, c, "sft", 1, True, size=4) / really < 1.25


def test_activations_of_clip():
    torch.manual_seed(0)
    model = CLIP(presets.CLIP["small"])
    c = config("clip", preset="small", batch_size=4)
    ids = torch.randint(0, 2000, (4, 77))
    ids[:, -1] = 2047
    pixels = torch.randn(4, 3, 224, 224)
    really = kept(lambda: clip_loss(model.encode_image(pixels), model.encode_text(ids), model.logit_scale), model)
    assert 0.9 < plan.activations(model, c, "clip", 1, size=4) / really < 1.15
