"""The formulas of GRPO and DAPO as pure functions of tensors.

Contract: nothing here knows a model, a tokenizer or a process group; every function takes tensors and returns tensors.
This file imports torch only and may be copied alone. The loop that uses it is train_rl.py.

Story in five lines. A policy answers one question G times and each answer gets a reward R. An answer is as good as it
is better than its siblings, so its advantage is (R - mean) / std inside the group (GRPO, arXiv 2402.03300, eq. 3).
Every token of the answer inherits that number A, and its log-probability is pushed up (A > 0) or down (A < 0), but not
farther from the policy that sampled it than a clipped ratio allows (PPO, arXiv 1707.06347). DAPO (arXiv 2503.14476)
moves the upper clip, averages over tokens instead of answers, drops the KL and throws away groups in which all answers
are equally right.

Legend: G answers of one question (group size) · R rows = answers = questions * G, rows 0..G-1 share question 0 ·
        T answer positions, padded on the right · logp log pi_theta(token), old the same before the update,
        ref the same under the reference policy.
All tensors live on one device; log-probabilities must come from fp32 logits divided by the sampling temperature, in
all of logp, old and ref (a missing temperature puts 71 % of the tokens outside the clip range at T = 0.7, before any
learning).

Departures that are ours: sequences without a single loss token do not count in a mean over sequences (verl does the
same, TRL keeps them in the divisor), and token-mean runs over the whole optimizer step, not over one question as
DAPO's paper writes.
"""

import torch

AGGREGATIONS = ("token-mean", "sequence-mean", "constant-length")
VARIANTS = ("clip", "gspo", "cispo")
LOG_RATIO_LIMIT = 20.0   # exp(20) = 5e8: far outside every clip range, and products of it are still finite in fp32


# --------------------------------------------------------------------------------------------- advantages and filtering

def _groups(values, group_size):
    """(R,) of any real dtype -> (R / G, G) float. Tells rows that cannot be cut into groups."""
    if values.dim() != 1 or group_size < 1 or values.numel() % group_size:
        raise ValueError(f"{tuple(values.shape)} values cannot be cut into groups of {group_size}: give one value an "
                         f"answer, the answers of a question in neighbouring rows")
    values = values if values.is_floating_point() and values.element_size() >= 4 else values.float()
    if torch.isinf(values).any():
        raise ValueError("an infinite reward: mark an answer that could not be scored with NaN instead")
    return values.view(-1, group_size)                                                          # (R / G, G)


def _spread(groups):
    """(B, G) -> (B,) bool: is the largest value above the smallest? NaN entries are left out.

    Not std > 0: eight times 0.1 in float32 has a std of 8e-9, which a division by (std + 1e-8) blows up to an advantage
    of -0.41 for answers that are all the same.
    """
    scored = ~groups.isnan()
    top = groups.masked_fill(~scored, -torch.inf).amax(1)                                       # (B,)
    bottom = groups.masked_fill(~scored, torch.inf).amin(1)                                     # (B,)
    return top > bottom


def group_advantages(rewards, group_size, *, eps=1e-6, std=True):
    """A_i = (R_i - mean_G) / (std_G + eps), std with G - 1 in the divisor; with std=False only the mean is taken off.

    rewards (R,) float, int or bool, the G answers of a question in neighbouring rows (repeat_interleave, never repeat).
    Returns (R,) float32 (float64 stays). A is exactly 0 where all rewards of a group are equal, and for a NaN reward
    ("could not be scored"), which also stays out of its group's mean and std. G = 1 is refused: nothing to compare
    with.

    >>> group_advantages(torch.tensor([1., 0, 0, 0, 0, 0, 0, 0]), 8, eps=0)[:2]
    tensor([ 2.4749, -0.3536])

    Source: GRPO, eq. 3; std=False is Dr. GRPO (arXiv 2503.20783), which shows that dividing by std favours questions
    that are nearly always right or nearly always wrong. Peers: TRL eps 1e-4, verl 1e-6; minimind divides by G (1.069
    times ours at G = 8); at G = 1 verl returns the raw reward and TRL 0.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: an answer is compared with its siblings, so a group needs two")
    groups = _groups(rewards, group_size)                                                       # (B, G)
    scored = ~groups.isnan()
    n = scored.sum(1, keepdim=True)                                                             # (B, 1)
    mean = groups.masked_fill(~scored, 0).sum(1, keepdim=True) / n.clamp(min=1)
    centred = (groups - mean).masked_fill(~scored, 0)                                           # (B, G)
    if std:
        variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + eps)
    else:
        advantages = centred
    return torch.where(_spread(groups)[:, None] & scored, advantages, 0.0).view(-1)             # (R,)


def keep_groups(metric, group_size):
    """DAPO's dynamic sampling: which groups carry a signal? metric (R,) -> (R / G,) bool, True iff max > min.

    Give it the accuracy, not the shaped reward: a length penalty makes eight wrong answers look different, and the
    group would teach nothing but length. Peers: verl tests std > 0; EasyR1 a mean in (0.01, 0.99), which keeps a group
    that is all wrong but well formatted; ms-swift returns the unfiltered batch when too few groups survive.
    """
    return _spread(_groups(metric, group_size))


# ------------------------------------------------------------------------------------------------------------ the loss

def loss_count(mask, aggregation="token-mean"):
    """What this micro-batch adds to the divisor: its tokens (token-mean), else its sequences that have a token.

    mask (R, T) -> () long. Sum it over all micro-batches of all ranks of ONE optimizer step (one all-reduce) and give
    it to the loss as n_global.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown: one of {', '.join(AGGREGATIONS)}")
    mask = mask.bool()
    return mask.sum() if aggregation == "token-mean" else mask.any(1).sum()


def aggregate(values, mask, aggregation="token-mean", *, n_global=None, max_length=None):
    """One number from a value a token. values (R, T) float -> () float; mask (R, T) True on loss tokens, EOS too.

    token-mean       sum of all tokens / N tokens                     DAPO; a long answer weighs more
    sequence-mean    mean over answers of the mean over their tokens  GRPO; every answer weighs the same
    constant-length  sum of all tokens / (N answers * max_length)     Dr. GRPO; the weight of a token is a constant

    n_global is the divisor's N of the WHOLE optimizer step (see loss_count). With it the values of all micro-batches
    and ranks add up to the value of the undivided batch, whatever the lengths; do not divide by the number of
    micro-batches. Where gradients are averaged over W ranks (DDP, FSDP) and not summed, pass n_global / W. None: the N
    of this batch. Dividing each micro-batch by its own N, the classic bug, is off by more than the largest gradient
    entry on a 2x2 split. Masked positions may hold anything, -inf and NaN too. An all-masked batch gives 0 with a
    graph, so backward() works.
    """
    n = loss_count(mask, aggregation) if n_global is None else n_global
    n = torch.where(n > 0, n, 1) if torch.is_tensor(n) else n or 1      # nothing to learn from: 0 / 1 = 0, not 0 / 0
    mask = mask.bool()
    total = torch.where(mask, values, 0.0).sum(1)    # (R,)  where, never values * mask: 0 * inf is NaN
    if aggregation == "sequence-mean":
        total = total / mask.sum(1).clamp(min=1)     # (R,)
    elif aggregation == "constant-length":
        if not max_length or max_length <= 0:
            raise ValueError(f"constant-length needs max_length, the longest answer in tokens; it is {max_length!r}")
        n = n * max_length
    return total.sum() / n


def policy_loss(logp, old_logp, advantages, mask, *, clip_low=0.2, clip_high=0.2, aggregation="token-mean",
                n_global=None, max_length=None, dual_clip=None, variant="clip", weights=None):
    """L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - old), aggregated to one number.

    logp, old_logp (R, T) float, mask (R, T) bool, advantages (R,) or (R, T). Only logp gets a gradient. Returns
    (loss () float with a graph, metrics dict of detached () tensors). aggregation, n_global, max_length: see aggregate.

    d L / d logp per token is -A r, and 0 where the ratio already went farther than allowed in the direction A wants:
    A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low. Going back is never clipped. In the first update after a
    rollout r = 1 everywhere: nothing is clipped, the loss is -mean(A) (about 0) and carries no information; only its
    gradient does. Clipping acts from the second update on the same answers.

    GRPO: clip 0.2 / 0.2, sequence-mean. DAPO: 0.2 / 0.28 ("clip higher": rare tokens may grow), token-mean.
    dual_clip c > 1 (arXiv 1912.09729; off in both papers; verl has it always on with c = 3): for A < 0 the loss stops
    growing at r = c. variant "gspo" (arXiv 2507.18071) has one ratio a sequence, the geometric mean of its tokens
    (clips near 3e-4 / 4e-4, sequence-mean); "cispo" (arXiv 2506.13585) is -min(r, 1 + clip_high).detach() A logp, so
    that a clipped token keeps a gradient. weights (R, T): constant factors, see sampler_weights. log r is clamped to
    +-20, so that a token that fell out of the policy yields a finite loss (and no gradient).
    """
    if logp.shape != old_logp.shape or logp.shape != mask.shape or logp.dim() != 2:
        raise ValueError(f"logp {tuple(logp.shape)}, old_logp {tuple(old_logp.shape)}, mask {tuple(mask.shape)}: they "
                         f"must have one shape (answers, positions)")
    mask = mask.bool()
    logp = torch.where(mask, logp, 0.0)                                   # (R, T)  padding may hold -inf or NaN
    old_logp = torch.where(mask, old_logp.detach(), 0.0)                  # (R, T)
    logp, old_logp = (x if x.dtype == torch.float64 else x.float() for x in (logp, old_logp))
    A = advantages.detach().to(logp.dtype)
    A = torch.where(mask, A[:, None] if A.dim() == 1 else A, 0.0)         # (R, T)

    log_ratio = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if variant == "gspo":
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logp)
    ratio = log_ratio.exp()                                               # (R, T)
    too_high = (A > 0) & (ratio > 1 + clip_high)
    too_low = (A < 0) & (ratio < 1 - clip_low)
    too_far = (A < 0) & (ratio > dual_clip) if dual_clip else torch.zeros_like(mask)

    if variant == "cispo":
        token_loss = -ratio.detach().clamp(max=1 + clip_high) * A * logp
    elif variant in ("clip", "gspo"):      # the min written as its cases: a constant in place of r has no gradient
        bounded = torch.where(too_high, 1 + clip_high, torch.where(too_low, 1 - clip_low, ratio))
        token_loss = -torch.where(too_far, dual_clip or 1.0, bounded) * A
    else:
        raise ValueError(f"variant={variant!r} is unknown: one of {', '.join(VARIANTS)}")
    if weights is not None:
        token_loss = token_loss * torch.where(mask, weights.detach(), 1.0)
    loss = aggregate(token_loss, mask, aggregation, n_global=n_global, max_length=max_length)

    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        metrics = {
            "tokens": mask.sum(),                                              # weight of the means below
            "clip_high": too_high.sum() / tokens,                              # share of tokens without gradient, A > 0
            "clip_low": (too_low | too_far).sum() / tokens,                    # the same for A < 0
            "ratio_max": ratio.max() if ratio.numel() else ratio.new_ones(()),
            "ratio_min": ratio.min() if ratio.numel() else ratio.new_ones(()),
            "old_kl": (ratio - 1 - log_ratio).sum() / tokens,                  # k3 of KL(old || theta); 0 on-policy
        }
    return loss, metrics


def kl_k3(logp, ref_logp, *, mask=None, old_logp=None):
    """The KL to a reference policy, a token: k3 = exp(d) - d - 1 with d = ref - logp; never negative. (R, T) -> (R, T).

    GRPO adds beta * aggregate(kl_k3(...), mask, ...) to the loss, with the loss's own aggregation. DAPO has no KL and
    loads no reference. ref_logp gets no gradient. Give the mask when padding may hold -inf or NaN: those positions are
    0.

    Value and gradient differ in quality. k3 estimates KL(theta || ref) without bias and with little variance
    (joschu.net/blog/kl-approx.html), but its derivative 1 - exp(d) is not the derivative of the KL. With old_logp the
    value is multiplied by r = exp(logp - old) and r is differentiated too: the same value on-policy, and the derivative
    logp - ref, the gradient of the true KL (DeepSeek-V3.2; TRL's default by version 1.16, "k3+" in verl).
    d is clamped to +-20 (verl also clamps k3 to +-10, where the gradient then dies earlier).
    """
    ref_logp = ref_logp.detach()
    if mask is not None:
        mask = mask.bool()
        logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    logp, ref_logp = (x if x.dtype == torch.float64 else x.float() for x in (logp, ref_logp))
    d = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k3 = torch.expm1(d) - d               # expm1: exp(d) - 1 loses all digits where the policies still agree
    if old_logp is not None:
        old_logp = old_logp.detach() if mask is None else torch.where(mask, old_logp.detach(), 0.0)
        k3 = k3 * (logp - old_logp.to(logp.dtype)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return k3


def sampler_weights(old_logp, sampler_logp, mask, cap=2.0):
    """Truncated importance sampling: min(exp(old - sampler), cap), (R, T), 1 on padding, for policy_loss(weights=...).

    Corrects for a sampler that is not bit for bit the trained policy (cached decoding in bf16, another engine): in bf16
    the ratio of a whole 48-token answer was seen between 0.82 and 1.35. Where the two agree this is 1.
    """
    gap = torch.where(mask.bool(), old_logp.detach() - sampler_logp.detach(), 0.0)
    return gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)


# -------------------------------------------------------------------------------------------------- length of an answer

def soft_overlong_penalty(lengths, max_length, cache_length):
    """DAPO eq. 13, added to the reward: 0 up to max_length - cache_length, falling to -1 at max_length, -1 beyond.

    lengths (R,) tokens including EOS -> (R,) float in [-1, 0].
    >>> soft_overlong_penalty(torch.tensor([70, 80, 90, 100, 130]), 100, 20)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000, -1.0000])
    """
    _check_lengths(max_length, cache_length)
    return ((max_length - cache_length - lengths.float()) / cache_length).clamp(-1, 0) + 0.0   # + 0.0: no "-0." in logs


def length_ok(lengths, max_length, cache_length):
    """The binary length reward: True iff length <= max_length - cache_length, where the soft penalty is 0. (R,) bool.

    Patho-R1's DAPO reward is gated ("1 only when both are 1"), which needs a binary term; its exact rule is
    unpublished.
    """
    _check_lengths(max_length, cache_length)
    return lengths <= max_length - cache_length


def drop_truncated(mask, truncated):
    """Overlong filtering: answers that were cut off leave the loss. mask (R, T), truncated (R,) -> (R, T) bool.

    Their rewards stay in the group's mean (the answer was really sampled). A separate trick from the penalty above;
    DAPO's best run does not combine the two.
    """
    return mask.bool() & ~truncated.bool()[:, None]


def _check_lengths(max_length, cache_length):
    if not 0 < cache_length <= max_length:
        raise ValueError(f"need 0 < cache_length <= max_length; cache_length={cache_length}, max_length={max_length}")


# ------------------------------------------------------------------------------------------------ what a step looks like

def describe(groups, group_size):
    """Sampled groups, kept or not -> the means of one step by name (explained at the top of train_rl.py).

    Of each group: parts (list of dicts: format, accuracy, length, reward, maybe claims), mask, logps (G, N), truncated.
    """
    parts = [p for g in groups for p in g["parts"]]
    mean = lambda values: sum(values) / len(values)
    each = lambda name: torch.tensor([p[name] for p in parts], dtype=torch.float64)            # (R,)
    differ = lambda name: keep_groups(each(name), group_size).double().mean().item()
    lengths = torch.cat([g["mask"].sum(1) for g in groups]).double()                            # (R,)
    names = [name for name in dict.fromkeys(name for p in parts for name in p) if name != "length"]
    return {name: float(mean([p[name] for p in parts if name in p])) for name in names} | dict(   # claims: not of all
        length_ok=each("length").mean().item(), length=lengths.mean().item(), length_std=lengths.std().item(),
        truncated=float(mean([x for g in groups for x in g["truncated"]])), rollout_tokens=lengths.sum().item(),
        pass_at_k=each("accuracy").view(-1, group_size).amax(1).mean().item(), mixed=differ("accuracy"),
        zero_variance=1 - differ("reward"), entropy=-torch.cat([g["logps"][g["mask"]] for g in groups]).mean().item())


def collapsed(now, best):
    """Has the policy come apart? -> the reason in words, or "" while all is well.

    now: entropy (nats a token), length (tokens an answer), format and truncated (shares) of one step; best: the highest
    format and lowest truncated share so far, and the entropy of the first step; empty on the first step. The limits are
    our choice, far outside what a healthy run shows, and relative, so that a start that cannot write the format yet (RL
    without SFT) is no collapse. Single steps are noisy: act on several in a row. `best` is brought up to date in passing.
    """
    first = best.setdefault("entropy", now["entropy"])
    cut = best["truncated"] = min(now["truncated"], best.get("truncated", 1.0))
    top = best["format"] = max(now["format"], best.get("format", 0.0))
    if now["format"] < top / 2:
        return f"the format is kept by {now['format']:.0%} of the answers, {top:.0%} at best"
    if now["truncated"] > max(0.5, cut + 0.4):
        return f"{now['truncated']:.0%} of the answers are cut off, {cut:.0%} at best: they do not end"
    if now["length"] < 4:
        return f"answers are {now['length']:.1f} tokens long: there is nothing in them"
    if now["entropy"] > max(1.5, 5 * first):
        return f"the entropy is {now['entropy']:.2f} nats a token, {first:.2f} at the start: words at random"
    if now["entropy"] < 1e-3:
        return f"the entropy is {now['entropy']:.1e} nats a token: all answers to a question are the same"
    return ""
