"""Scoring a group of answers with the prompt computed once, and logits only where an answer stands. Needs vlm.py and what
that needs.

All prompts and all answers go through the decoder as one row of tokens without padding. Its attention is told who may see
whom (Siblings): a prompt token the prompt before it, an answer token its prompt and its own answer, never a sibling.
Repeating a prompt of 75 tokens for eight answers of 30 costs 840 tokens a group, packing it 315; image features enter once.
Training texts, which have no answers, are packed alike by data.pack_rows and attention.Documents.
The log-probabilities and gradients are those of the repeated form (tests/test_train_rl.py writes that one out).

Letters: g groups, G answers each, R = g * G answers, N longest answer, P longest prompt, M tokens of the row, K answer
tokens, E width, V vocabulary, Hq query heads, Hk key heads, D head width.
"""
import torch
import torch.nn.functional as F

from .attention import WIDTHS, attention, kernels_for, packed_attention
from .vlm import log_softmax, mrope_positions

CHUNK = 1024  # answer tokens whose logits exist at one time: 0.6 GB in fp32 at a vocabulary of 152,000


def training_rows(groups, pad_id, group_size):
    """Groups (as train_rl.rollout makes them: prompt, ids, mask, logps, advantages, pixels, grid) -> dict of tensors.

    prompts (g, P) and valid (g, P) bool, padded on the right; targets (R, N) the answers, mask (R, N) bool, logps (R, N) of
    the sampler, old (R, N) what the ratio is taken to (the sampler's unless a group brings its own), advantages (R,);
    pixels and grid of all images in reading order, unless there are none.
    """
    P, N = max(len(g["prompt"]) for g in groups), max(g["mask"].shape[1] for g in groups)
    pad = lambda x, width, value: F.pad(x, (0, width - x.shape[-1]), value=value)
    row = dict(prompts=torch.stack([pad(g["prompt"], P, pad_id) for g in groups]),
               valid=torch.stack([torch.arange(P) < len(g["prompt"]) for g in groups]),
               targets=torch.cat([pad(g["ids"], N, pad_id) for g in groups]),
               mask=torch.cat([pad(g["mask"], N, False) for g in groups]),
               logps=torch.cat([pad(g["logps"], N, 0.0) for g in groups]),
               old=torch.cat([pad(g.get("old", g["logps"]), N, 0.0) for g in groups]),
               advantages=torch.cat([g["advantages"] for g in groups]))
    if len(row["mask"]) != len(groups) * group_size:
        raise ValueError(f"{len(row['mask'])} answers for {len(groups)} questions: each needs {group_size}")
    pictures = [g for g in groups if g.get("pixels") is not None]
    return row | {name: torch.cat([g[name] for g in pictures]) for name in ("pixels", "grid") if pictures}


def micro_batches(groups, c, pad_id, device):
    """Whole groups, at most c.micro_batch answers at a time -> (groups, their training_rows on the device)."""
    per = max(1, c.micro_batch // c.group_size)
    for at in range(0, len(groups), per):
        part = groups[at:at + per]
        yield part, {k: v.to(device) for k, v in training_rows(part, pad_id, c.group_size).items()}


class Siblings:
    """In the place of a KV cache: how the M packed tokens attend to one another.

    valid (g, P) bool: prompt tokens, padded on the right. feeds (R, N') bool: answer tokens that are read. The row holds
    prompt 0, its answers, prompt 1, its answers, ... without padding; `at` (g, P + G * N') is the place of each in it (of
    padding: of a neighbour, nobody looks), `back` (M,) the way back.
    """
    length = 0                                                       # Decoder counts tokens here; nobody asks

    def __init__(self, valid, feeds):
        (g, P), (R, N) = valid.shape, feeds.shape
        self.here = torch.cat([valid, feeds.reshape(g, -1)], 1)                             # (g, P + G * N')
        self.at = (self.here.flatten().cumsum(0) - 1).view_as(self.here)
        self.back = self.here.flatten().nonzero()[:, 0]
        self.prompt_at, self.answer_at = self.at[:, :P], self.at[:, P:].reshape(R, N)
        sizes = torch.cat([valid.sum(1)[:, None], feeds.sum(1).view(g, -1)], 1)            # (g, 1 + G), in the row's order
        starts = torch.arange(0, sizes.numel(), sizes.shape[1])[:, None].expand(-1, R // g)
        self.sizes = tuple(sizes.flatten().tolist())
        self.shared = tuple(F.pad(starts, (1, 0), value=-1).flatten().tolist())            # for kernels: whose prompt is it
        own = torch.ones(N, N, dtype=torch.bool, device=valid.device).tril().expand(R, N, N)
        seen = valid.repeat_interleave(R // g, 0)[:, None].expand(R, N, P)
        self.mask = torch.cat([seen, own], 2)[:, None]                                      # (R, 1, N', P + N')

    def attend(self, layer, q, k, v, mask):
        """q (1, Hq, M, D), k, v (1, Hk, M, D) -> (1, Hq, M, D)."""
        if kernels_for(q, f"heads of width {q.shape[-1]}", q.shape[-1] in WIDTHS):
            return packed_attention(q, k, v, self.sizes, self.shared)
        take = lambda x, at: x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                                 # (M, H, D)
        pq, pk, pv = (take(x, self.prompt_at) for x in (q, k, v))                           # (g, H, P, D)
        y = attention(pq, pk, pv, causal=True).transpose(1, 2)                              # (g, P, Hq, D)
        if self.answer_at.numel():
            aq, ak, av = (take(x, self.answer_at) for x in (q, k, v))                       # (R, H, N', D)
            G = len(aq) // len(pq)
            ak, av = (torch.cat([p.repeat_interleave(G, 0), a], 2) for p, a in ((pk, ak), (pv, av)))    # (R, Hk, P + N', D)
            answers = attention(aq, ak, av, mask=self.mask).transpose(1, 2)                 # (R, N', Hq, D)
            y = torch.cat([y, answers.reshape(len(y), -1, *y.shape[2:])], 1)                # (g, P + G * N', Hq, D)
        return y.flatten(0, 1).index_select(0, self.back).transpose(0, 1)[None]


def answer_logps(model, row, temperature=1.0, banned=()):
    """Log-probabilities (R, N), fp32, of the answer tokens of `row` under `model`: logits / temperature, `banned` impossible,
    as generate() drew them; 0 where row["mask"] is False."""
    c, prompts, valid, targets, mask = model.config, *(row[k] for k in ("prompts", "valid", "targets", "mask"))
    g, G = len(prompts), len(mask) // len(prompts)
    feeds = mask[:, 1:]                                              # the last token of an answer predicts nothing
    plan = Siblings(valid, feeds)
    ids = torch.cat([prompts, targets[:, :-1].reshape(g, -1)], 1)[plan.here][None]          # (1, M)
    positions, free = mrope_positions(prompts, row.get("grid"), valid, c["image_token_id"], model.visual.merge)
    # every answer goes on from its prompt's own count, as if it were the only one
    turns = free[:, None] + torch.arange(feeds.shape[1], device=ids.device).repeat(G)       # (g, G * (N - 1))
    positions = torch.cat([positions, turns.expand(3, -1, -1)], 2)[:, plan.here][:, None]   # (3, 1, M)
    x = model.embed(ids, row.get("pixels"), row.get("grid"))                                # (1, M, E)
    hidden = model.model(x, *model.model.rotary(positions), None, plan)[0]                  # (M, E)
    last = plan.prompt_at[:, -1].repeat_interleave(G)                                       # (R,) last token of the prompt
    before = torch.cat([last[:, None], plan.answer_at], 1)                                  # (R, N) what predicts each token
    banned = torch.as_tensor(banned, dtype=torch.long, device=ids.device)
    h, wanted, head = hidden.index_select(0, before[mask]), targets[mask], model.head       # (K, E), (K,), (V, E)
    if kernels_for(h):                                               # logits in h's dtype, as generate() draws from
        from kernels.logprob import token_logps
        logp = token_logps(h, head.to(h.dtype), wanted, temperature=temperature, banned=banned, dtype=h.dtype)
    else:
        logp = TokenLogps.apply(h, head, wanted, temperature, banned)                       # (K,)
    return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logp)           # (R, N)


@torch.no_grad()
def score_again(model, groups, c, pad_id, banned):
    """Log-probabilities of the training pass before the first update -> g["old"] (G, N) of each group."""
    model.train()
    for part, row in micro_batches(groups, c, pad_id, next(model.parameters()).device):
        for g, old in zip(part, answer_logps(model, row, c.temperature, banned).cpu().split(c.group_size)):
            g["old"] = old[:, :g["mask"].shape[1]]


class TokenLogps(torch.autograd.Function):
    """log softmax(h @ head.T / temperature)[target] for K tokens without the (K, V) logits: CHUNK rows at a time, computed
    again in the backward pass. The head's gradient is added up in fp32: a sum in bf16 over many chunks loses digits, and
    the entropy of the policy drifts."""

    @staticmethod
    def chunks(h, head, targets, temperature, banned):
        """Yields the slice, its targets (c, 1) and its log-probabilities (c, V) in fp32."""
        for at in range(0, len(h), CHUNK):
            here = slice(at, at + CHUNK)
            with torch.autocast(h.device.type, enabled=False):
                logits = F.linear(h[here], head.to(h.dtype)).float()
            yield here, targets[here, None], log_softmax(logits, temperature, banned)

    @staticmethod
    def forward(ctx, h, head, targets, temperature, banned):
        """h (K, E), head (V, E), targets (K,) long, banned (n,) long -> (K,) fp32."""
        ctx.save_for_backward(h, head, targets, banned)
        ctx.temperature = temperature
        out = torch.empty(len(h), device=h.device)
        for here, target, logp in TokenLogps.chunks(h, head, targets, temperature, banned):
            out[here] = logp.gather(1, target)[:, 0]
        return out

    @staticmethod
    def backward(ctx, grad):
        h, head, targets, banned = ctx.saved_tensors
        grad = (grad / ctx.temperature)[:, None]                                            # (K, 1)
        grad_h, grad_head = torch.empty_like(h), torch.zeros_like(head, dtype=torch.float32)
        for here, target, logp in TokenLogps.chunks(h, head, targets, ctx.temperature, banned):
            step = logp.exp_().mul_(-grad[here]).scatter_add_(1, target, grad[here])        # (c, V): grad * (one-hot - p)
            step = step.to(h.dtype)
            grad_h[here] = step @ head.to(h.dtype)
            grad_head += step.T @ h[here]
        return grad_h, grad_head.to(head.dtype), None, None, None
