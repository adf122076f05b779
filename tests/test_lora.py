"""LoRA against the model with the corrections multiplied out: outputs, gradients, files; switched off, against the start."""

import copy

import pytest
import torch
import torch.distributed as dist

from nanopatho import distributed, lora, presets
from nanopatho.optim import Optimizers
from nanopatho.vlm import PathoVLM

RANK = 3


def models(dtype=torch.float32):
    """-> (model with corrections that are not zero, the model it started from, a batch)."""
    torch.manual_seed(0)
    start = PathoVLM(presets.VLM["smoke"]).to(dtype)
    model = copy.deepcopy(start)
    lora.add(model, RANK)
    assert all(torch.equal(x, y) for x, y in zip(outputs(model), outputs(start)))          # B = 0: nothing changed yet
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.05)
    return model, start


def batch():
    ids = torch.randint(0, 900, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 2:6] = presets.VLM["smoke"]["image_token_id"]
    pixels = torch.randn(32, 1176, generator=torch.Generator().manual_seed(2))
    return ids, pixels, torch.tensor([(1, 4, 4)] * 2)


def outputs(model):
    ids, pixels, grid = batch()
    h = model.hidden_states(ids, pixels.to(model.head.dtype), grid)
    return model.logits(h), model.loss(h, ids)


def multiplied_out(model):
    plain = PathoVLM(presets.VLM["smoke"]).double()
    state = model.state_dict()
    for name in [n for n in state if n.endswith("lora_a")]:
        a, b = state.pop(name), state.pop(name.replace("lora_a", "lora_b"))
        state[name.replace("lora_a", "weight")] = state[name.replace("lora_a", "weight")] + 2.0 * b @ a
    plain.load_state_dict(state)                                         # strict: all names, and no others
    return plain


def test_what_is_trained():
    model, start = models()
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    layers, (E, F, kv) = range(2), (64, 128, 32)
    sizes = dict(q_proj=(E, E), k_proj=(E, kv), v_proj=(E, kv), o_proj=(E, E), gate_proj=(E, F), up_proj=(E, F),
                 down_proj=(F, E))
    place = lambda n: "mlp" if n in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    assert trained == {f"model.layers.{i}.{place(n)}.{n}.{x}": shape for i in layers for n, (a, b) in sizes.items()
                       for x, shape in (("lora_a", (RANK, a)), ("lora_b", (b, RANK)))}
    assert set(lora.only(model.state_dict())) == set(trained)
    assert set(model.state_dict()) - set(trained) == set(start.state_dict())               # published names stay
    with pytest.raises(ValueError, match="--lora 0"):
        lora.add(start, 0)


def test_outputs_and_gradients_are_those_of_the_merged_weights():
    """With W' = W + s B A and G = dL/dW' of the merged model: dL/dB = s G A^T and dL/dA = s B^T G. In float64."""
    model, _ = models()
    model, plain = model.double(), multiplied_out(model)
    for recompute in (False, True):
        model.model.recompute = recompute
        (logits, loss), (expected, other) = outputs(model), outputs(plain)
        assert torch.allclose(logits, expected, atol=3e-6) and abs(loss - other) < 1e-6    # both cast logits to fp32
        model.zero_grad(), plain.zero_grad()
        loss.backward(), other.backward()
        named, checked = dict(model.named_parameters()), 0
        for name, p in plain.named_parameters():
            if (a := named.get(name.replace(".weight", ".lora_a"))) is None or a is named[name]:
                assert named[name].grad is None
                continue
            b, G = named[name.replace(".weight", ".lora_b")], p.grad
            assert torch.allclose(b.grad, lora.SCALE * G @ a.T, rtol=1e-4, atol=1e-8)
            assert torch.allclose(a.grad, lora.SCALE * b.T @ G, rtol=1e-4, atol=1e-8)
            checked += 1
        assert checked == 14


def test_off_is_the_start_bit_for_bit_also_after_an_error():
    model, start = models()
    changed = outputs(model)[0]
    with lora.off(model), pytest.raises(KeyError), lora.off(model):
        raise KeyError
    with lora.off(model):
        assert torch.equal(outputs(model)[0], outputs(start)[0])
    assert torch.equal(outputs(model)[0], changed) and not torch.allclose(changed, outputs(start)[0], atol=1e-3)


def test_saved_in_the_published_layout(tmp_path):
    model, start = models()
    plain = PathoVLM(presets.VLM["smoke"])
    plain.load_state_dict(lora.merged(model.state_dict()))
    plain.save_pretrained(tmp_path)
    again = PathoVLM.from_pretrained(tmp_path)
    assert torch.allclose(outputs(again)[0], outputs(model)[0], atol=1e-5)
    kept = lora.only(model.state_dict())                                 # a checkpoint: start weights, corrections, so:
    torch.manual_seed(9)
    lora.add(start, RANK)
    assert not start.load_state_dict(kept, strict=False).unexpected_keys
    assert torch.equal(outputs(start)[0], outputs(model)[0])


def test_small_steps_survive_on_bf16_weights():
    model, start = models(torch.bfloat16)
    optimizer = Optimizers(model, 1e-5, 0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outputs(model)[1].backward()
    optimizer.step(1e-5)
    for name, p in model.named_parameters():
        if name.endswith(("lora_a", "lora_b")):                           # AdamW's first step is the learning rate
            moved = (p - before[name]).abs()
            assert p.dtype == torch.float32 and moved.max() < 1.1e-5 and moved.median() > 0.9e-5
        else:
            assert torch.equal(p, before[name])
    merged, exact = lora.merged(model.state_dict()), multiplied_out(model.double()).state_dict()
    assert all(x.dtype == torch.bfloat16 and torch.allclose(x.double(), exact[n], rtol=2 ** -8, atol=1e-9) for n, x in merged.items())


def test_sharded():
    """One process of FSDP: the same loss and gradients, on, off and gathered, as without it."""
    model, start = models()
    outputs(model)[1].backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    copy_of, _ = models()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distributed.shard(copy_of, [*copy_of.visual.blocks, *copy_of.model.layers], torch.device("cpu"))
        logits, loss = distributed.call(sharded, outputs)
        loss.backward()
        found = {n: p.grad.full_tensor() for n, p in sharded.named_parameters() if p.grad is not None}
        assert set(found) == set(expected) and all(torch.allclose(found[n], expected[n], atol=1e-7) for n in found)
        with lora.off(sharded), torch.no_grad():
            assert torch.equal(distributed.call(sharded, outputs)[0], outputs(start)[0])
        whole = {n: p.full_tensor() for n, p in sharded.state_dict().items()}
        start.load_state_dict(lora.merged(whole))
        assert torch.allclose(outputs(start)[0], logits, atol=1e-5)
    finally:
        dist.destroy_process_group()
