"""Evaluation of Patho-CLIP: zero-shot classes, retrieval in both directions, a linear probe, and real tissue.

    python -m nanopatho.evaluate_clip --model runs/demo/clip --data data/tiny
    python -m nanopatho.evaluate_clip --model runs/demo/clip --tiles FOLDER      # FOLDER/CLASS/REGION_….jpg

Protocols after Patho-R1's clip/val and CONCH. Theirs, and where this differs:
  zero-shot  every class has synonyms, every synonym goes through every template; text vectors are made unit length,
             averaged, made unit length again; largest cosine wins. Plain accuracy with a 95 % Wilson interval.
  retrieval  R@k among 100 candidates, both directions, named (their script calls i2t what may be either). Pools are
             disjoint and hold no caption twice; a tie counts against the right answer.
  probe      logistic regression on frozen features, L2 as scikit-learn's C, and always leaving a whole group (slide,
             region, patient) out: tiles cut side by side look alike, so a random split measures memory.
The formulas (down to `probe_predict`) need torch alone and may be copied.

Letters: N pictures, M texts, K classes, E embedding, D features.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# --- formulas ---------------------------------------------------------------------------------------------------------


def wilson(correct, n, z=1.959964):
    """Share of `correct` among n and its 95 % Wilson score interval -> {"value", "low", "high", "n"}; honest near 0 and 1.

    >>> wilson(9, 10)            # 0.9, between 0.596 and 0.982
    """
    if n == 0:
        raise ValueError("wilson: no items to take a share of (n = 0)")
    p, zz = correct / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return {"value": p, "low": max(0.0, (middle - half) / (1 + zz)), "high": min(1.0, (middle + half) / (1 + zz)), "n": n}


def ensemble(prompt_features):
    """list of K tensors (prompts of the class, E) -> class vectors (K, E) of unit length."""
    return torch.stack([F.normalize(F.normalize(f, dim=-1).mean(0), dim=-1) for f in prompt_features])


def zero_shot(image_features, class_features):
    """(N, E), (K, E) of unit length -> index of the nearest class (N,) long. Picture lengths do not matter to argmax."""
    return (F.normalize(image_features, dim=-1) @ class_features.T).argmax(dim=1)


def ranks(similarity):
    """Square similarity (N queries, N candidates), right answers on the diagonal -> rank (N,) long, 0 = found first.
    Pessimistic: a candidate that ties with the right one stands before it, so equal vectors earn nothing."""
    right = similarity.diagonal()[:, None]
    return (similarity >= right).sum(dim=1) - 1                       # the right one counts itself


def pools_of(captions, size, seed=0):
    """Disjoint pools of `size` record indices, no caption twice in a pool; leftovers that fill no pool are dropped.
    With fewer distinct captions than `size` there is one smaller pool of all distinct ones."""
    pools, taken = [], []
    for i in np.random.default_rng(seed).permutation(len(captions)):
        for pool, names in zip(pools, taken):
            if len(pool) < size and captions[i] not in names:
                break
        else:
            pool, names = [], set()
            pools.append(pool), taken.append(names)
        pool.append(int(i)), names.add(captions[i])
    full = [p for p in pools if len(p) == size]
    return full or [max(pools, key=len)]


def retrieval(image_features, text_features, captions, *, pool=100, ks=(1, 5, 10), seed=0):
    """(N, E), (N, E), N captions -> {"i2t": {"r1", "r5", "r10"}, "t2i": {…}, "recall_at_1", "pool", "pools"}.

    i2t: the picture asks, texts are ranked; t2i the other way. recall_at_1 is the weaker direction's, with its interval.
    Two records that say the same in other words stay apart: the ceiling is below 100 % where findings repeat.
    """
    image, text = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    pools = pools_of(captions, pool, seed)
    found = {"i2t": [], "t2i": []}
    for rows in pools:
        similarity = image[rows] @ text[rows].T                       # (pool, pool)
        found["i2t"].append(ranks(similarity))
        found["t2i"].append(ranks(similarity.T))
    found = {name: torch.cat(r) for name, r in found.items()}
    out = {name: {f"r{k}": float((r < k).float().mean()) for k in ks} for name, r in found.items()}
    weaker = min(found, key=lambda name: int((found[name] < 1).sum()))
    return dict(out, recall_at_1=wilson(int((found[weaker] < 1).sum()), len(found[weaker])), pool=len(pools[0]),
                pools=len(pools))


def probe_fit(x, y, C=1.0, classes=None):
    """Multinomial logistic regression: x (N, D), y (N,) long -> weights (K, D), biases (K,), both float64.

    Minimises sum of cross-entropies + |W|^2 / (2 C), scikit-learn's LogisticRegression(C), by L-BFGS in float64. The
    objective is strictly convex up to a shift of the biases, so any start and any optimizer ends at the same probe.
    """
    x, classes = x.double(), classes or int(y.max()) + 1
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], lr=1, max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # divided by N: the same minimum, at a scale where the optimizer's tolerances mean the same for every N
        loss = F.cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def probe_predict(x_train, y_train, x_test, C=1.0, classes=None):
    """Standardise by the training rows, fit, predict -> (N test,) long."""
    x_train, x_test = x_train.double(), x_test.double()
    mean, std = x_train.mean(0), x_train.std(0, correction=0).clamp_min(1e-6)
    weight, bias = probe_fit((x_train - mean) / std, y_train, C, classes)
    return ((x_test - mean) / std @ weight.T + bias).argmax(dim=1)


def leave_one_group_out(candidates, y, groups):
    """Accuracy on groups never trained on, with every choice made inside the training groups.

    candidates: {name: function(x rows train, x rows test) …} is not needed: a candidate is a pair (features (N, D), C).
    y (N,) long, groups: N hashables. For each group left out, each candidate is scored by leaving one of the *remaining*
    groups out in turn; the best one (the first at a tie) is refitted on all remaining groups and predicts the left-out one.
    -> predictions (N,) long, {group: chosen name}
    """
    names, classes = sorted(set(groups)), int(y.max()) + 1
    which = np.array([names.index(g) for g in groups])
    if len(names) < 2:
        raise ValueError(f"leave_one_group_out: needs two groups or more, got {names}")
    predicted, chosen = torch.empty_like(y), {}

    def accuracy(features, C, train, test):
        guess = probe_predict(features[train], y[train], features[test], C, classes)
        return float((guess == y[test]).double().mean())

    for g, name in enumerate(names):
        train, test = which != g, which == g
        best = next(iter(candidates))
        if len(candidates) > 1:
            inner = [h for h in range(len(names)) if h != g]
            scores = {c: np.mean([accuracy(f, C, train & (which != h), which == h) for h in inner])
                      for c, (f, C) in candidates.items()} if len(inner) > 1 else {}
            if not scores:
                raise ValueError("leave_one_group_out: choosing among candidates needs three groups or more")
            best = max(scores, key=scores.get)
        features, C = candidates[best]
        predicted[test] = probe_predict(features[train], y[train], features[test], C, classes)
        chosen[name] = best
    return predicted, chosen


# --- the model's vectors ----------------------------------------------------------------------------------------------


@torch.no_grad()
def image_features(model, pictures, batch=128):
    """list of pictures (PIL or uint8 (H, W, 3)) -> (N, E) fp32 on the CPU, not of unit length."""
    from .image import clip_pixels
    device, size = next(model.parameters()).device, model.config["vision_config"]["image_size"]
    return torch.cat([model.encode_image(clip_pixels(pictures[at:at + batch], size).to(device)).float().cpu()
                      for at in range(0, len(pictures), batch)])


@torch.no_grad()
def text_features(model, tokenizer, texts, batch=256):
    """list of M texts -> (M, E) fp32 on the CPU, not of unit length."""
    from .chat import clip_ids
    device, context = next(model.parameters()).device, model.config["text_config"]["max_position_embeddings"]
    out = []
    for at in range(0, len(texts), batch):
        ids = clip_ids(tokenizer, texts[at:at + batch], context)
        out.append(model.encode_text(ids[:, :int((ids > 0).sum(1).max())].to(device)).float().cpu())
    return torch.cat(out)


# --- the drawn world --------------------------------------------------------------------------------------------------
TEMPLATES = ("CLASSNAME", "H&E: CLASSNAME.", "a picture of CLASSNAME", "I see CLASSNAME.")


def text_of(record, lexicon):
    """The text a held-out picture is to be found by: its caption, or (question pools have none) its findings in words."""
    if record.get("morphology") or record.get("caption"):
        return record.get("morphology") or record["caption"]
    phrases = lexicon.get(record.get("subfield"), {})
    said = [values[record["facts"][a]][0] for a, values in phrases.items() if record.get("facts", {}).get(a) in values]
    if not said:
        raise ValueError(f"{record.get('_where', record.get('id'))}: no field 'caption', and no 'facts' that lexicon.json has "
                         "words for: retrieval needs a text for each picture; add one, or evaluate with items=0")
    return ", ".join(said)


def read_prompts(path):
    """CONCH's file layout {"0": {"classnames": {class: [synonyms]}, "templates": ["… CLASSNAME …"]}} -> that inner dict."""
    prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    prompts = prompts.get("0", prompts)
    if not (isinstance(prompts.get("classnames"), dict) and prompts.get("templates")
            and all("CLASSNAME" in t for t in prompts["templates"]) and all(prompts["classnames"].values())):
        raise ValueError(f'{path}: must be {{"0": {{"classnames": {{class: [synonyms]}}, "templates": ["… CLASSNAME …"]}}}}, '
                         "no list of synonyms empty")
    return prompts


def class_features(model, tokenizer, prompts):
    """-> class names (K,), unit vectors (K, E): every synonym in every template, averaged."""
    names = list(prompts["classnames"])
    texts = [[t.replace("CLASSNAME", s) for s in prompts["classnames"][n] for t in prompts["templates"]] for n in names]
    features = text_features(model, tokenizer, [t for group in texts for t in group])
    return names, ensemble(features.split([len(group) for group in texts]))


def evaluate_pool(model, tokenizer, data, *, pool="test", items=0, label="tissue", images=None, seed=0):
    """The numbers of stage 0 on a held-out pool -> dict for results.json. items: the first so many records, 0 = all.

    Retrieval pairs each picture with `text_of` it. Zero-shot uses the records whose facts carry `label`, and the prompts of
    DATA/zero_shot.json (CONCH's layout) if it is there, else the labels themselves as class names.
    """
    from .data import Images, read_records
    from .evaluate import read_lexicon
    records, lexicon = read_records(f"{data}/{pool}.jsonl")[:items or None], read_lexicon(data)
    images, was_training = images or Images(), model.training
    model.eval()
    pictures = image_features(model, [images(r)[0] for r in records])
    texts = [text_of(r, lexicon) for r in records]
    out = retrieval(pictures, text_features(model, tokenizer, texts), texts, seed=seed)
    path = Path(data) / "zero_shot.json"
    labelled = [(i, r["facts"][label]) for i, r in enumerate(records) if r.get("facts", {}).get(label)]
    if path.is_file():
        prompts = read_prompts(path)
        labelled = [(i, name) for i, name in labelled if name in prompts["classnames"]]
    else:
        prompts = {"classnames": {name: [name] for name in sorted({name for _, name in labelled})}, "templates": TEMPLATES}
    if labelled:
        names, classes = class_features(model, tokenizer, prompts)
        guess = zero_shot(pictures[[i for i, _ in labelled]], classes)
        hits = {n: [] for n in names}
        for g, (_, name) in zip(guess.tolist(), labelled):
            hits[name].append(names[g] == name)
        out["zero_shot_accuracy"] = wilson(sum(map(sum, hits.values())), len(labelled))
        out["zero_shot_majority"] = max(map(len, hits.values())) / len(labelled)
        out["zero_shot_classes"] = {n: wilson(sum(h), len(h)) for n, h in hits.items() if h}
    model.train(was_training)
    return out
