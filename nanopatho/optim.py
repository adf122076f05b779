"""AdamW, or Muon for the matrices inside the layers and AdamW for everything else, used as if it were one optimizer.

The paper's stages fine-tune published weights and name no optimizer; AdamW is the default. The tiny presets start from random
weights, where Muon (Jordan et al. 2024, `torch.optim.Muon`) reached the same captions in about 0.6 of the steps (docs/LOG.md).
Imports torch only and may be copied alone.
"""
import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Matrices between hidden layers, in the published names of both models. Embeddings, heads, patch convolutions stay with AdamW.
HIDDEN = re.compile(r"(encoder\.layers|blocks|model\.layers|merger\.mlp)\..*weight$")


class Optimizers(list):
    """Over the parameters of `model` that require a gradient. kind: "adamw" or "muon" (needs torch 2.9 or later).

    Weight decay acts on tensors with two or more dimensions, not on norms and biases. Weights that are sharded over
    processes (FSDP) come after sharding: AdamW then keeps its state sharded as well. Muon needs whole matrices, so each
    process gathers them for its step and keeps their momentum whole; models that start from random weights are small.
    factors: {beginning of a name: share of the learning rate}, the first that fits counts; 1 elsewhere.
    """

    def __init__(self, model, lr, weight_decay, kind="adamw", betas=(0.9, 0.95), eps=1e-8, factors=None):
        if kind == "muon" and not hasattr(torch.optim, "Muon"):
            raise SystemExit(f"--optimizer muon needs torch 2.9 or later (here {torch.__version__}): use adamw")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hidden = {n: p for n, p in trained.items() if kind == "muon" and p.ndim == 2 and HIDDEN.search(n)}
        factor = {n: next((f for start, f in (factors or {}).items() if n.startswith(start)), 1.0) for n in trained}
        levels = sorted(set(factor.values()))
        self.append(torch.optim.AdamW([
            {"params": [p for n, p in trained.items() if n not in hidden and factor[n] == f and (p.ndim >= 2) == matrices],
             "weight_decay": weight_decay * matrices, "factor": f} for f in levels for matrices in (True, False)],
            lr=lr, betas=betas, eps=eps, fused=True))
        self.sharded = {p: nn.Parameter(p.detach().full_tensor()) for p in hidden.values() if isinstance(p, DTensor)}
        if hidden:
            # match_rms_adamw scales the orthogonal update to AdamW's usual size, so one learning rate serves both
            self.append(torch.optim.Muon([
                {"params": [self.sharded.get(p, p) for n, p in hidden.items() if factor[n] == f], "factor": f}
                for f in levels if any(factor[n] == f for n in hidden)],
                lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, lr):
        """One update at this learning rate (times each group's factor); the gradients are freed."""
        for part, matrix in self.sharded.items():
            matrix.data, matrix.grad = part.detach().full_tensor(), part.grad.full_tensor()
        for optimizer in self:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            optimizer.step()
        for part, matrix in self.sharded.items():
            part.detach().copy_(distribute_tensor(matrix.detach(), part.device_mesh, part.placements, src_data_rank=None))
        self.zero_grad()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)
        for part in self.sharded:
            part.grad = None

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)


def lr_factors(lr, vision_lr=0.0, projector_lr=0.0):
    """Rates of parts of PathoVLM (0 = as lr) -> Optimizers' factors; the projector lies inside `visual`, so it comes first."""
    return {start: rate / lr for start, rate in (("visual.merger.", projector_lr or lr), ("visual.", vision_lr or lr)) if lr}
