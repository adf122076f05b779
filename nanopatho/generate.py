"""Sampling answers with a KV cache; image and prompt are computed once for the whole group of answers.

Contract: `generate(model, ids, pixels, grid, group_size=G, ...)` draws G answers to each of B prompts and returns ids,
the log-probability of every drawn token under exactly the distribution it was drawn from, and a mask. No top-k, no
top-p: a policy gradient needs the probabilities of the real policy, and truncated sampling shifts them (log S per
token, S = mass kept). The same `banned_token_ids` and temperature in `PathoVLM.token_logps` reproduce `logps`. Needs
vlm.py and what that needs.

Letters: B prompts, G answers each, R = B * G rows, A rows still running, T prompt length, N new tokens, E width, V
vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import padded_causal_mask
from .decoder import KVCache
from .vlm import PathoVLM, log_softmax, mrope_positions

LOOK_EVERY = 4  # steps between two looks at who has finished: each look waits for the device


class Generation(NamedTuple):
    ids: Tensor  # (R, N) long, pad_token_id after the end; rows 0..G-1 answer prompt 0
    logps: Tensor  # (R, N) fp32, 0 after the end
    mask: Tensor  # (R, N) bool, True up to and including the end token; an answer cut off at N has no end token


def draw(logp: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(A, V) log-probabilities -> (A, 1) ids: where a uniform number falls in the running sum of the probabilities.

    One random number a row instead of torch.multinomial's one a token: (128, 1000) on a CPU core 0.25 ms, not 2.7 ms.
    float64, so that probabilities near 1e-8 in a vocabulary of 150,000 keep their share; `right` skips ids of
    probability 0, the banned ones.
    """
    below = logp.exp().cumsum(1, dtype=torch.float64)  # (A, V)
    uniform = torch.rand(len(logp), 1, generator=generator, dtype=torch.float64, device=logp.device)
    return torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp_(max=logp.shape[1] - 1)


@torch.no_grad()
def generate(model: PathoVLM, input_ids: Tensor, pixel_values: Tensor | None = None,
             image_grid_thw: Tensor | None = None, *, attention_mask: Tensor | None = None, group_size: int = 1,
             max_new_tokens: int, temperature: float = 1.0, eos_token_ids, pad_token_id: int, banned_token_ids=(),
             generator: torch.Generator | None = None, image_embeds: Tensor | None = None) -> Generation:
    """input_ids (B, T), left-padded where attention_mask is 0; images as in PathoVLM.hidden_states -> Generation.

    eos_token_ids: one id or several, any of them ends an answer. banned_token_ids can never be drawn (give image,
    vision and padding ids, or a policy can "write" an image). temperature 0 takes the most probable token, logps are
    then those at temperature 1. N is the length of the longest answer, at most max_new_tokens. `generator` lives on the
    device of input_ids; the same state of it gives the same answers.
    """
    device, (B, T) = input_ids.device, input_ids.shape
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if not (valid[:, -1].all() and (valid[:, 1:] >= valid[:, :-1]).all()):
        raise ValueError("attention_mask: prompts must be padded on the left, so that every row ends with a real token")
    eos = torch.tensor([eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids), device=device)
    banned = torch.tensor(list(banned_token_ids), dtype=torch.long, device=device)
    padded = not bool(valid.all())

    # -- the prompts, once each
    decoder, c = model.model, model.config
    positions, next_position = mrope_positions(input_ids, image_grid_thw, valid, c["image_token_id"],
                                               model.visual.merge)
    x = model.embed(input_ids, pixel_values, image_grid_thw, image_embeds)  # (B, T, E)
    cache = KVCache(len(decoder.layers), B, c["num_key_value_heads"], T, decoder.head_width, x.dtype, device)
    h = decoder(x, *decoder.rotary(positions), padded_causal_mask(valid) if padded else None, cache)[:, -1]  # (B, E)

    # -- the group: every row continues from its prompt's cache
    R, N = B * group_size, max_new_tokens
    running = torch.arange(B, device=device).repeat_interleave(group_size)  # (R,)
    cache, h, valid, next_position = cache.take(running, N - 1), h[running], valid[running], next_position[running]
    # Positions go on from the prompt's own count, not from the cache length: an image takes fewer numbers than it has
    # tokens, and padding takes none.
    cos, sin = decoder.rotary((next_position[:, None] + torch.arange(N, device=device)).expand(3, R, N))  # (R, N, 1, D)
    keys = torch.cat((valid, valid.new_ones(R, N)), dim=1)[:, None, None] if padded else None  # (R, 1, 1, T + N)
    ids = torch.full((R, N), pad_token_id, device=device)
    logps = torch.zeros(R, N, device=device)
    mask = torch.zeros(R, N, dtype=torch.bool, device=device)
    running = torch.arange(R, device=device)  # (A,) which row of the result each computed row is
    done = torch.zeros(R, dtype=torch.bool, device=device)  # (A,)

    for step in range(N):
        logp = log_softmax(model.logits(h), temperature or 1.0, banned)  # (A, V)
        token = draw(logp, generator) if temperature else logp.argmax(1, keepdim=True)  # (A, 1)
        ids[running, step] = token.squeeze(1).masked_fill(done, pad_token_id)
        logps[running, step] = logp.gather(1, token).squeeze(1).masked_fill(done, 0.0)
        mask[running, step] = ~done
        done |= torch.isin(token.squeeze(1), eos)
        if step == N - 1:
            break
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            finished = int(done.sum())
            if finished == len(done):
                break
            if 4 * finished > len(done):  # stop computing rows that have ended
                alive = (~done).nonzero().squeeze(1)
                running, done, token, cos, sin = running[alive], done[alive], token[alive], cos[alive], sin[alive]
                cache, keys = cache.take(alive, N - 1 - step), keys[alive] if padded else None
        now = slice(step, step + 1)
        h = decoder(decoder.embed_tokens(token), cos[:, now], sin[:, now],
                    keys[..., :cache.length + 1] if padded else None, cache)[:, 0]  # (A, E)
    longest = int(mask.any(0).sum())
    return Generation(ids[:, :longest], logps[:, :longest], mask[:, :longest])
