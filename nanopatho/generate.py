"""Sampling answers with a KV cache; image and prompt are computed, and their keys and values kept, once for a whole group.

Contract: `generate(model, ids, pixels, grid, group_size=G, ...)` draws G answers to each of B prompts and returns ids,
the log-probability of every drawn token under exactly the distribution it was drawn from, and a mask. No top-k, no
top-p: a policy gradient needs the probabilities of the real policy, and truncated sampling shifts them (log S per
token, S = mass kept). The same `banned_token_ids` and temperature in `PathoVLM.token_logps` reproduce `logps`. Every
answer has a seed of its own, so it does not depend on what else is in the batch. Needs vlm.py and what that needs.

Letters: B prompts, G answers each, R = B * G rows, A rows still running, W most rows a prompt still has, T prompt
length, N new tokens, S own tokens kept so far, E width, V vocabulary, Hq query heads, Hk key heads, D head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import WIDTHS, Documents, group_attention, kernels_for
from .decoder import KVCache
from .vlm import PathoVLM, log_softmax, mrope_positions

LOOK_EVERY = 4  # steps between two looks at who has finished: each look waits for the device
SEGMENT = 128  # own keys and values grow by this many tokens; a CUDA graph lives for one segment


class Generation(NamedTuple):
    ids: Tensor  # (R, N) long, pad_token_id after the end; rows 0..G-1 answer prompt 0
    logps: Tensor  # (R, N) fp32, 0 after the end
    mask: Tensor  # (R, N) bool, True up to and including the end token; an answer cut off at N has no end token


# ------------------------------------------------------------------------------------------------------- random numbers


def uniforms(seeds: Tensor, n: int) -> Tensor:
    """seeds (R,) long -> (R, n) float64 in [0, 1): number t of a row depends on its seed and on t alone.

    splitmix64 (Steele et al. 2014), a hash of a counter: rows can be computed in any batch, on any device, in any order.
    Products of int64 wrap around, which is what the hash wants; >> keeps the sign and needs a mask.
    """
    gamma, first, second = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def mix(z):
        z = (z ^ (z >> 30 & (1 << 34) - 1)) * first
        z = (z ^ (z >> 27 & (1 << 37) - 1)) * second
        return z ^ (z >> 31 & (1 << 33) - 1)

    start = mix(seeds + gamma)[:, None]  # (R, 1) neighbouring seeds begin far apart
    z = mix(start + gamma * torch.arange(1, n + 1, device=seeds.device))  # (R, n)
    return (z >> 11 & (1 << 53) - 1).double() * 2.0**-53


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """(A, V) log-probabilities, (A, 1) uniform numbers -> (A, 1) ids: where the number falls in the running sum.

    One random number a row instead of torch.multinomial's one a token, and the running sum only over blocks and then
    inside one of them: (128, 1024) on a CPU core 0.19 ms, not 2.7 ms. Running sums in float64, so that probabilities near
    1e-8 in a vocabulary of 150,000 keep their share; `right` skips ids of probability 0, the banned ones.
    """
    p, size, below_one = logp.exp(), math.isqrt(logp.shape[1]), 1 - 2.0**-52
    if pad := -p.shape[1] % size:
        p = F.pad(p, (0, pad))
    p = p.unflatten(1, (-1, size))  # (A, blocks, size)
    below = p.sum(2).cumsum(1, dtype=torch.float64)  # (A, blocks)
    target = uniform.clamp(max=below_one) * below[:, -1:]
    block = torch.searchsorted(below, target, right=True)  # (A, 1)
    start, end = F.pad(below, (1, 0)).gather(1, block), below.gather(1, block)
    inside = p[torch.arange(len(p), device=p.device), block[:, 0]].cumsum(1, dtype=torch.float64)  # (A, size)
    # how far into the block, on the scale of its own sum: its fp32 sum is rounded, and no id may gain or lose by that
    target = ((target - start) / (end - start)).clamp_(0, below_one) * inside[:, -1:]
    return block * size + torch.searchsorted(inside, target, right=True)


# ------------------------------------------------------------------------------------------------------------ the cache


class Prefill(Documents):
    """Prompts as one row without padding; their keys and values go to their places in `prompts`, where valid (B, T)."""

    def __init__(self, prompts: KVCache, valid: Tensor):
        super().__init__(valid.sum(1).tolist(), valid.device)
        self.prompts, self.valid = prompts, valid

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        for kept, new in ((self.prompts.k, k), (self.prompts.v, v)):
            kept[layer].transpose(1, 2)[self.valid] = new[0].transpose(0, 1)  # (tokens, Hk, D)
        return super().attend(layer, q, k, v, mask)


class GroupCache:
    """Keys and values while answers grow: those of a prompt once for all its answers, and each answer's own ones.

    shared k, v (layers, B, Hk, T, D); own k, v (layers, A, Hk, capacity, D), of which `length` are filled. owner (A,),
    ascending: the prompt of each row. `at` None: the next token is number `length`. `at` (1,) long on the device: it is
    number `at`, and attention runs over the whole capacity, the part behind `at` hidden, so that no shape changes.
    """

    def __init__(self, prompts: KVCache, valid: Tensor | None, owner: Tensor):
        self.shared_k, self.shared_v, self.length, self.at = prompts.k, prompts.v, 0, None
        self.padding = None if valid is None else ~valid[:, None, None]  # (B, 1, 1, T)
        self.owner = owner
        layers, _, heads, _, width = prompts.k.shape
        self.k = prompts.k.new_empty(layers, len(owner), heads, 0, width)
        self.v = torch.empty_like(self.k)
        self.take(torch.arange(len(owner), device=owner.device), 0)

    def take(self, rows: Tensor, capacity: int):
        """Go on with these rows (ascending) only, and with room for `capacity` own tokens."""
        layers, _, heads, _, width = self.k.shape
        kept, self.owner = self.owner[rows].unique(return_inverse=True)
        if len(kept) < self.shared_k.shape[1]:
            self.shared_k, self.shared_v = self.shared_k[:, kept], self.shared_v[:, kept]
            self.padding = None if self.padding is None else self.padding[kept]
        for name in ("k", "v"):
            # zeros: a weight of 0 on what was never written must not meet a NaN
            old, new = getattr(self, name), self.k.new_zeros(layers, len(rows), heads, capacity, width)
            new[..., :self.length, :] = old[:, rows, :, :self.length]
            setattr(self, name, new)
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(self.owner, self.owner)
        self.width = int(place.max()) + 1  # W
        full = len(rows) == self.width * len(kept)
        self.slot = None if full else self.owner * self.width + place  # (A,) its place among B * W queries
        prompts = torch.arange(len(kept) + 1, device=rows.device)
        self.starts = torch.searchsorted(self.owner, prompts, out_int32=True)  # (B + 1,): first row of each prompt

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        """One new token a row: q (A, Hq, 1, D), k, v (A, Hk, 1, D) -> (A, Hq, 1, D)."""
        (A, Hq, _, D), Hk = q.shape, k.shape[1]
        if self.at is None:
            self.k[layer, :, :, self.length], self.v[layer, :, :, self.length] = k[:, :, 0], v[:, :, 0]
            seen, later = slice(self.length + 1), None
        else:
            self.k[layer].index_copy_(2, self.at, k)
            self.v[layer].index_copy_(2, self.at, v)
            seen, later = slice(None), torch.arange(self.k.shape[3], device=q.device) > self.at
        own_k, own_v = self.k[layer, :, :, seen], self.v[layer, :, :, seen]  # (A, Hk, S, D)
        shared_k, shared_v = self.shared_k[layer], self.shared_v[layer]  # (B, Hk, T, D)
        if kernels_for(q, f"cached heads of width {D}", D in WIDTHS and D != 80):
            filled = None if self.at is None else (self.at + 1).expand(A)
            keep = None if self.padding is None else ~self.padding[:, 0, 0]
            return group_attention(q[:, :, 0], shared_k, shared_v, own_k, own_v, filled, keep, self.starts, self.width)[:, :, None]

        q = q.reshape(A, Hk, Hq // Hk, D)  # the query heads of a key head
        common = self.together(q) @ shared_k.transpose(2, 3)  # (B, Hk, W * Hq/Hk, T)
        own = q @ own_k.transpose(2, 3)  # (A, Hk, Hq/Hk, S)
        if self.padding is not None:
            common = common.masked_fill_(self.padding, float("-inf"))
        if later is not None:
            own = own.masked_fill_(later, float("-inf"))
        p = torch.cat((self.apart(common), own), 3).float().mul_(D**-0.5).softmax(3).to(v.dtype)
        T = shared_k.shape[2]
        y = self.apart(self.together(p[..., :T]) @ shared_v) + p[..., T:] @ own_v
        return y.reshape(A, Hq, 1, D)

    def together(self, x: Tensor) -> Tensor:
        """Rows (A, Hk, g, X) -> (B, Hk, W * g, X): all queries of a prompt side by side, to meet its keys at once."""
        if self.slot is not None:  # a prompt with fewer rows than others leaves places empty
            x = x.new_zeros(self.shared_k.shape[1] * self.width, *x.shape[1:]).index_copy_(0, self.slot, x)
        return x.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def apart(self, x: Tensor) -> Tensor:
        """The way back: (B, Hk, W * g, X) -> rows (A, Hk, g, X)."""
        x = x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slot is None else x[self.slot]


# ------------------------------------------------------------------------------------------------------------- sampling


def record(step):
    """A CUDA graph of one call of `step`, recorded but not run -> the function that runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def generate(model: PathoVLM, input_ids: Tensor, pixel_values: Tensor | None = None,
             image_grid_thw: Tensor | None = None, *, attention_mask: Tensor | None = None, group_size: int = 1,
             max_new_tokens: int, temperature: float = 1.0, eos_token_ids, pad_token_id: int, banned_token_ids=(),
             seeds: Tensor | None = None, generator: torch.Generator | None = None, image_embeds: Tensor | None = None,
             graph: bool = False) -> Generation:
    """input_ids (B, T), left-padded where attention_mask is 0; images as in PathoVLM.hidden_states -> Generation.

    eos_token_ids: one id or several, any of them ends an answer. banned_token_ids can never be drawn (give image,
    vision and padding ids, or a policy can "write" an image). temperature 0 takes the most probable token, logps are
    then those at temperature 1. N is the length of the longest answer, at most max_new_tokens.
    seeds (R,) long: the same seed gives the same answer to a prompt in every batch, up to rounding of the logits;
    without them they are drawn from `generator`, which lives on the device of input_ids.
    graph: shapes are fixed for SEGMENT steps, and on CUDA one step is recorded as a graph and replayed, so that the
    device does not wait for Python. Not measured on a GPU yet; the CPU runs the same steps without recording.
    """
    device, (B, T) = input_ids.device, input_ids.shape
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if not (valid[:, -1].all() and (valid[:, 1:] >= valid[:, :-1]).all()):
        raise ValueError("attention_mask: prompts must be padded on the left, so that every row ends with a real token")
    eos = torch.tensor([eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids), device=device)
    banned = torch.tensor(list(banned_token_ids), dtype=torch.long, device=device)
    padded = not bool(valid.all())
    R, N = B * group_size, max_new_tokens
    if seeds is None:
        seeds = torch.randint(2**62, (R,), generator=generator, device=device)
    if seeds.shape != (R,):
        raise ValueError(f"seeds {tuple(seeds.shape)}: one for each of the {B} * {group_size} answers")

    # -- the prompts, once each
    decoder, c = model.model, model.config
    positions, next_position = mrope_positions(input_ids, image_grid_thw, valid, c["image_token_id"],
                                               model.visual.merge)
    x = model.embed(input_ids, pixel_values, image_grid_thw, image_embeds)  # (B, T, E)
    prompts = KVCache(len(decoder.layers), B, c["num_key_value_heads"], T, decoder.head_width, x.dtype, device)
    if padded:
        prompts.k.zero_(), prompts.v.zero_()  # a weight of 0 must not meet a NaN where nothing is written
        tables = decoder.rotary(positions[:, valid][:, None])
        h = decoder(x[valid][None], *tables, None, Prefill(prompts, valid))[0, valid.sum(1).cumsum(0) - 1]  # (B, E)
    else:
        h = decoder(x, *decoder.rotary(positions), None, prompts)[:, -1]

    # -- the group: every row continues from its prompt
    owner = torch.arange(B, device=device).repeat_interleave(group_size)  # (R,)
    cache = GroupCache(prompts, valid if padded else None, owner)
    # Positions go on from the prompt's own count, not from the cache length: an image takes fewer numbers than it has
    # tokens, and padding takes none. Text has one number on all three axes, so one table serves all rows.
    numbers = torch.arange(int(next_position.max()) + N, device=device).expand(3, 1, -1)
    cos, sin = (table[0] for table in decoder.rotary(numbers))  # (numbers, 1, D)
    ids = torch.full((R, N), pad_token_id, device=device)
    logps = torch.zeros(R, N, device=device)
    mask = torch.zeros(R, N, dtype=torch.bool, device=device)
    running = torch.arange(R, device=device)  # (A,) which row of the result each computed row is
    done = torch.zeros(R, dtype=torch.bool, device=device)  # (A,)
    h, position, uniform = h[owner], next_position[owner], uniforms(seeds.to(device), N if temperature else 0)
    at = torch.zeros(1, dtype=torch.long, device=device)  # number of the token that is drawn next

    def write():
        """Draw the next token of every row -> (A, 1)."""
        logp = log_softmax(model.logits(h), temperature or 1.0, banned)  # (A, V)
        token = draw(logp, uniform.index_select(1, at)) if temperature else logp.argmax(1, keepdim=True)
        ids[running, at] = token.squeeze(1).masked_fill(done, pad_token_id)
        logps[running, at] = logp.gather(1, token).squeeze(1).masked_fill(done, 0.0)
        mask[running, at] = ~done
        done.logical_or_((token == eos).any(1))
        return token

    def read(token):
        """Let the decoder see it: h becomes what the token after it is predicted from. Every write is in place."""
        turn = position + at  # (A,)
        h.copy_(decoder(decoder.embed_tokens(token), cos[turn, None], sin[turn, None], None, cache)[:, 0])
        at.add_(1)

    def leave(alive, capacity):
        """Stop computing the rows that have ended."""
        nonlocal running, done, h, position, uniform
        running, done, h, position, uniform = (x[alive] for x in (running, done, h, position, uniform))
        cache.take(alive, capacity)

    if graph:
        step = lambda: read(write())
        for start in range(0, N, SEGMENT):
            cache.at, cache.length = at, start
            leave((~done).nonzero().squeeze(1), min(start + SEGMENT, N))
            step()  # a real one, and it warms up what recording must not do
            run = record(step) if device.type == "cuda" else step
            for i in range(start + 1, min(start + SEGMENT, N)):
                if i % LOOK_EVERY == 0 and done.all():
                    break
                run()
            if done.all():
                break
    else:
        for i in range(N):
            token = write()
            if i == N - 1:
                break
            finished = int(done.sum()) if i % LOOK_EVERY == LOOK_EVERY - 1 else 0
            if finished == len(done):
                break
            full = i == cache.k.shape[3]
            if full or 4 * finished > len(done):
                alive = (~done).nonzero().squeeze(1) if finished else torch.arange(len(done), device=device)
                token = token[alive]
                leave(alive, min(i + SEGMENT, N - 1) if full else cache.k.shape[3])
            read(token)
    longest = int(mask.any(0).sum())
    return Generation(ids[:, :longest], logps[:, :longest], mask[:, :longest])
