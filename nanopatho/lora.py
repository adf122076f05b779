"""LoRA: the decoder's linear layers learn a correction of low rank, everything else stays as it was (arXiv 2106.09685).

    add(model, rank=16)                    # before the optimizer is made, and before the model is sharded
    with off(model):                       # the model it started from: the reference of the KL term, without a copy
        ...
    merged(model.state_dict())             # the published names and shapes, corrections added in: to save, to sample from
    only(model.state_dict())               # the corrections alone: what a checkpoint must keep beside the start weights

A checkpoint OUT/last of the scripts keeps them as torch.load("OUT/last/train_state.pt")["adapter"]: to get a whole model of it,
add(start, rank), start.load_state_dict(that, strict=False), merged(start.state_dict()).

y = W x + SCALE * B (A x), with A (rank, in) random and B (out, rank) zero, so that training starts from the given model.
A layer stays an nn.Linear in its place: weight and bias keep their published names, FSDP and kernels see what they know.
Corrections are fp32 even where W is bf16, whose 8 bits would swallow their small steps. Gradients and moments, 12 bytes a
parameter, are then needed for A and B alone: at rank 16 for half a per cent of the 7B. Needs torch only; may be copied alone.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn

SCALE = 2.0                                                          # alpha / rank, alpha = 2 rank: a common choice
LAYERS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


class LoRALinear(nn.Linear):
    """What `add` makes of an nn.Linear. x (..., in) -> (..., out)."""

    on = True

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return y + SCALE * F.linear(F.linear(x, a), b)


def add(model, rank):
    """Freeze the model, give each linear layer of model.model.layers its A and B -> these parameters, all that is trained.

    Random numbers come from torch's global generator: with one seed all processes draw the same.
    """
    if rank < 1:
        raise ValueError(f"--lora {rank}: the rank must be 1 or more")
    model.requires_grad_(False)
    for name, layer in model.model.layers.named_modules():
        if name.rsplit(".", 1)[-1] in LAYERS:
            layer.__class__ = LoRALinear
            new = dict(dtype=torch.float32, device=layer.weight.device)
            layer.lora_a = nn.Parameter(torch.randn(rank, layer.in_features, **new) * layer.in_features ** -0.5)
            layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, **new))
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def off(model):
    """Inside, the model is the one that `add` was given. Not between a forward pass and its backward with recomputation."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    before = [m.on for m in layers]
    for m in layers:
        m.on = False
    try:
        yield model
    finally:
        for m, on in zip(layers, before):
            m.on = on


def only(state):
    """State dict -> its A and B alone."""
    return {name: x for name, x in state.items() if name.endswith((".lora_a", ".lora_b"))}


def merged(state):
    """State dict (whole tensors) -> the same model without LoRA: W + SCALE B A, added in fp32, rounded once to W's dtype."""
    out = {name: x for name, x in state.items() if name not in only(state)}
    for name in [name for name in state if name.endswith(".lora_a")]:
        a, b = state[name], state[name.replace(".lora_a", ".lora_b")]
        weight = name.replace(".lora_a", ".weight")
        out[weight] = (state[weight].float() + SCALE * (b.float() @ a.float())).to(state[weight].dtype)
    return out
