"""Scoring a group of answers with the prompt computed once: one packed row a group, the prompt and then its answers, each of
which sees the prompt and itself but not its siblings. Needs vlm.py and what that needs.

Repeating a prompt of 75 tokens for eight answers of 30 costs 840 tokens a group, packing it 315; image features enter once.
The log-probabilities and gradients are those of the repeated form (tests/test_train_rl.py writes that one out).

Letters: g groups, G answers each, R = g * G answers, N longest answer, T longest packed row, E width.
"""
import torch

from .vlm import log_softmax, mrope_positions


def training_rows(groups, pad_id, group_size):
    """Groups (as train_rl.rollout makes them: prompt, ids, mask, logps, advantages, pixels, grid) -> dict of tensors.

    input_ids, owner (g, T): owner 0 = prompt, i = answer i (from 1), -1 = padding; turn (g, T): place of a token within its
    answer. place, before (R, N): where each answer token stands in its row, and the token it is predicted from. mask (R, N)
    bool, logps (R, N) of the sampler, advantages (R,), targets (R, N), pixels and grid of all images in reading order.
    """
    lengths = [[int(m.sum()) for m in g["mask"]] for g in groups]
    T = max(len(g["prompt"]) + sum(n) for g, n in zip(groups, lengths))
    R, N = len(groups) * group_size, max(g["mask"].shape[1] for g in groups)
    ids, owner = torch.full((len(groups), T), pad_id), torch.full((len(groups), T), -1)
    turn = torch.zeros(len(groups), T, dtype=torch.long)
    place, before, targets = (torch.zeros(R, N, dtype=torch.long) for _ in range(3))
    mask, logps = torch.zeros(R, N, dtype=torch.bool), torch.zeros(R, N)
    for b, (g, sizes) in enumerate(zip(groups, lengths)):
        p = at = len(g["prompt"])
        ids[b, :p], owner[b, :p] = g["prompt"], 0
        for i, m in enumerate(sizes):
            r, span = b * group_size + i, torch.arange(at, at + m)
            ids[b, span], owner[b, span], turn[b, span] = g["ids"][i, :m], i + 1, torch.arange(m)
            place[r, :m], mask[r, :m], logps[r, :m], targets[r, :m] = span, True, g["logps"][i, :m], g["ids"][i, :m]
            before[r, :m] = torch.cat([torch.tensor([p - 1]), span[:-1]])[:m]
            at += m
    return dict(input_ids=ids, owner=owner, turn=turn, place=place, before=before, mask=mask, logps=logps, targets=targets,
                advantages=torch.cat([g["advantages"] for g in groups]), pixels=torch.cat([g["pixels"] for g in groups]),
                grid=torch.cat([g["grid"] for g in groups]))


def packed_mask(owner):
    """owner (g, T) -> (g, 1, T, T) bool, True = may look: earlier tokens of the prompt or of the own answer, and itself."""
    T = owner.shape[1]
    i = torch.arange(T, device=owner.device)
    earlier = i[None, :] <= i[:, None]                                                      # (T, T)
    kin = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])               # (g, T, T)
    return ((earlier & kin & (owner >= 0)[:, None, :]) | torch.eye(T, dtype=torch.bool, device=owner.device))[:, None]


def answer_logps(model, row, temperature=1.0, banned=()):
    """Log-probabilities (R, N), fp32, of the answer tokens of `row` under `model`: logits / temperature, `banned` impossible,
    as generate() drew them; 0 where row["mask"] is False. Logits exist at answer positions only."""
    c, ids, owner = model.config, row["input_ids"], row["owner"]
    positions, free = mrope_positions(ids, row["grid"], owner == 0, c["image_token_id"], model.visual.merge)
    # every answer goes on from its prompt's own count, as if it were the only one
    positions = torch.where(owner > 0, free[:, None] + row["turn"], positions)              # (3, g, T)
    x = model.embed(ids, image_embeds=model.visual(row["pixels"], row["grid"]))             # (g, T, E)
    hidden = model.model(x, *model.model.rotary(positions), packed_mask(owner))             # (g, T, E)
    group = torch.arange(len(ids), device=ids.device).repeat_interleave(len(row["mask"]) // len(ids))
    wanted = row["mask"]                                                                    # (R, N)
    h = hidden[group[:, None].expand_as(wanted)[wanted], row["before"][wanted]]             # (K, E)
    logp = log_softmax(model.logits(h), temperature, banned).gather(1, row["targets"][wanted][:, None]).squeeze(1)
    return torch.zeros_like(wanted, dtype=torch.float32).masked_scatter(wanted, logp)       # (R, N)
