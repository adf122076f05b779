"""One rollout of reinforcement learning: answers to questions, and their way to the process that learns from them.

Every process answers its share of the questions with a whole copy of the model. Then all know all answers and rewards, so
that all decide alike which groups to keep; pictures stay where they are and are opened again where they are needed. Needs
data.py, distributed.py, evaluate.py, generate.py and what those need.
"""
import torch
import torch.distributed as dist

from . import distributed
from .data import vlm_batch
from .evaluate import ask
from .generate import generate


def rollout(model, tokenizer, chosen, records, c, images, score):
    """Sample c.group_size answers to each of chosen = [(number in the stream, index of the record)] -> one dict a group:
    record, prompt, pixels, grid, ids, logps, mask (G, N), texts, parts (list of dicts), truncated. An answer depends on the
    run's seed, its question's number and its place in the group, not on the batch it is computed in."""
    model.eval()
    asked, device = [records[i] for _, i in chosen], next(model.parameters()).device
    batch = vlm_batch([ask(r) for r in asked], tokenizer, model.config, images=images, max_pixels=c.max_pixels)
    batch.pop("labels")
    seeds = torch.tensor([((c.seed << 40) + n * c.group_size + i) % 2 ** 63 for n, _ in chosen for i in range(c.group_size)])
    made = generate(model, **{k: v.to(device) for k, v in batch.items()}, group_size=c.group_size, seeds=seeds, graph=c.graph,
                    max_new_tokens=c.max_new_tokens, temperature=c.temperature, eos_token_ids=tokenizer.eos_ids,
                    pad_token_id=tokenizer.pad_id, banned_token_ids=tokenizer.banned_ids)
    groups, at, patches = [], 0, batch["image_grid_thw"].prod(1).tolist()
    for i, record in enumerate(asked):
        rows_of = slice(i * c.group_size, (i + 1) * c.group_size)
        ids, logps, mask = (x[rows_of].cpu() for x in (made.ids, made.logps, made.mask))
        texts = [tokenizer.decode(t[m]) for t, m in zip(ids, mask)]
        n_images = 1 if isinstance(record["image"], str) else len(record["image"])
        grid = batch["image_grid_thw"][at:at + n_images]
        pixels = batch["pixel_values"][sum(patches[:at]):sum(patches[:at + n_images])]
        at += n_images
        groups.append(dict(record=record, prompt=batch["input_ids"][i][batch["attention_mask"][i] > 0], grid=grid,
                           pixels=pixels, ids=ids, logps=logps, mask=mask, texts=texts,
                           parts=[score(t, record, int(m.sum())) for t, m in zip(texts, mask)],
                           truncated=[bool(m.all()) and int(t[m][-1]) not in tokenizer.eos_ids for t, m in zip(ids, mask)]))
    return groups


def collect(groups):
    """The groups of every process, in the order of ranks, on each; `pixels` only on the one that has them."""
    if distributed.world() == 1:
        return groups
    found = [None] * distributed.world()
    dist.all_gather_object(found, [{k: v for k, v in g.items() if k != "pixels"} for g in groups])
    found[distributed.rank()] = groups
    return [g for part in found for g in part]


def deal(groups, tokenizer, model, c, images):
    """The groups of one update -> those that this process computes, with their pictures. Copies without a loss token make
    up for missing ones: all processes must make equally many passes."""
    own = groups[distributed.rank()::distributed.world()]
    missing = -(-len(groups) // distributed.world()) - len(own)
    own += [dict(g, mask=torch.zeros_like(g["mask"])) for g in groups[:1] * missing]
    for g in own:
        if "pixels" not in g:
            g["pixels"] = vlm_batch([ask(g["record"])], tokenizer, model.config, images=images,
                                    max_pixels=c.max_pixels)["pixel_values"]
    return own
