"""Evaluation of Patho-CLIP: zero-shot classes, retrieval in both directions, a linear probe, and real tissue.

    python -m nanopatho.evaluate_clip --model runs/demo/clip --data data/tiny
    python -m nanopatho.evaluate_clip --model runs/demo/clip --tiles FOLDER      # FOLDER/CLASS/REGION_….jpg
    python -m nanopatho.evaluate_clip --model runs/demo/clip --protocol FOLDER [--prompts FILE.json]

Protocols after Patho-R1's clip/val and CONCH. Theirs, and where this differs:
  zero-shot  every class has synonyms, every synonym goes through every template; text vectors are made unit length,
             averaged, made unit length again; largest cosine wins. Plain accuracy with a 95 % Wilson interval.
  retrieval  R@k among 100 candidates, both directions, named (their script calls i2t what may be either). Pools are
             disjoint and hold no caption twice; a tie counts against the right answer.
             --data also ranks among all N: a repeated caption or picture has several right answers, and how many is
             told (their script counts all but one of them as misses; "r1_own" is that number).
  few-shot   logistic regression (C = 1) on the raw features of 2 to 128 tiles a class, 10 subsets: mean and spread. A
             tile is judged by a probe that saw none of its group; without groups a random half is, with a warning.
  pictures   image-to-image: is one of the k nearest of the same class; the picture's own group is left out.
  probe      logistic regression on frozen features, L2 as scikit-learn's C, and always leaving a whole group (slide,
             region, patient) out: tiles cut side by side look alike, so a random split measures memory.
The formulas (first part) need torch, numpy and metrics.py and may be copied.

Letters: N pictures, M texts, K classes, E embedding, D features.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .metrics import classification, interval

# --- formulas ---------------------------------------------------------------------------------------------------------


def wilson(correct, n, z=1.959964):
    """Share of `correct` among n, with its 95 % Wilson score interval -> {"value", "low", "high", "n"}.

    >>> wilson(9, 10)            # 0.9, between 0.596 and 0.982
    """
    if n == 0:
        raise ValueError("wilson: no items to take a share of (n = 0)")
    p, zz = correct / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (middle - half) / (1 + zz), (middle + half) / (1 + zz)
    return {"value": p, "low": max(0.0, low), "high": min(1.0, high), "n": n}


def ensemble(prompt_features):
    """list of K tensors (prompts of the class, E) -> class vectors (K, E) of unit length."""
    return torch.stack([F.normalize(F.normalize(f, dim=-1).mean(0), dim=-1) for f in prompt_features])


def zero_shot(image_features, class_features):
    """(N, E), (K, E) of unit length -> index of the nearest class (N,) long."""
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
    """(N, E), (N, E), N captions -> {"i2t": {"r1", "r5", "r10"}, "t2i": {…}, "recall_at_1", "pool", "n_pools"}.

    i2t: the picture asks, texts are ranked; t2i the other way. recall_at_1: the weaker direction's, with its interval.
    Records that say the same in other words stay apart: where findings repeat, the ceiling is below 100 %.
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
                n_pools=len(pools))


def full_retrieval(image_features, text_features, captions, pictures=None, *, ks=(1, 5, 10, 20), rows=1024):
    """All N pictures against all N texts -> {"i2t": {"r1", …, "r1_own", …}, "t2i": the same, "duplicates", "n"}.

    Records with one caption, or one picture (`pictures`: N names), answer for each other: the best of them counts.
    r*_own: only the record itself, and its doubles stand in the way, as in published scripts. Ties: pessimistic.
    """
    N, twin = len(captions), torch.zeros(len(captions), len(captions), dtype=torch.bool)
    for names in (captions, pictures or range(len(captions))):
        which = torch.tensor(np.unique(np.array(names, dtype=str), return_inverse=True)[1])
        twin |= which[:, None] == which[None]
    unit = [F.normalize(x.float(), dim=-1) for x in (image_features, text_features)]
    out = {"n": N, "duplicates": int((twin.sum(1) > 1).sum())}
    for name, (query, key) in {"i2t": unit, "t2i": unit[::-1]}.items():
        best, own = [], []
        for at in range(0, N, rows):
            similarity, same = query[at:at + rows] @ key.T, twin[at:at + rows]                # (rows, N)
            top = similarity.masked_fill(~same, -2).max(1, keepdim=True).values
            best.append(((similarity >= top) & ~same).sum(1))
            mine = similarity.gather(1, torch.arange(at, at + len(similarity))[:, None])
            own.append((similarity >= mine).sum(1) - 1)
        out[name] = {f"r{k}{end}": float((torch.cat(found) < k).double().mean())
                     for end, found in (("", best), ("_own", own)) for k in ks}
    return out


def image_retrieval(features, y, groups=None, ks=(1, 5, 10, 20)):
    """Pictures (N, D) of classes y (N,) ask for their like -> {"r1", …: one of the k nearest is of it; "majority5"}.

    The picture itself is never found; with groups (N names) nothing of its group is: neighbouring tiles of one slide
    find each other whatever they show. Classes that tie in the vote of five share the point.
    """
    unit, N = F.normalize(features.double(), dim=-1), len(y)
    which = torch.arange(N) if groups is None else torch.tensor(np.unique(np.array(groups), return_inverse=True)[1])
    similarity = (unit @ unit.T).masked_fill(which[:, None] == which[None], float("-inf"))
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :max(max(ks), 5)]
    hit = (y[order] == y[:, None]) & similarity.gather(1, order).isfinite()                   # (N, k)
    votes = F.one_hot(y[order[:, :5]]).sum(1)
    winners = votes == votes.max(1, keepdim=True).values
    vote = winners.gather(1, y[:, None]).squeeze(1).double() / winners.sum(1)
    return {**{f"r{k}": float(hit[:, :k].any(1).double().mean()) for k in ks}, "majority5": float(vote.mean())}


def few_shot(features, y, groups=None, *, train=None, shots=(2, 8, 16, 32, 64, 128), subsets=10, seed=42):
    """Probes on few tiles a class -> {"2": {"accuracy", "std", "balanced_accuracy", "weighted_f1"}, …, "all", "split"}.

    features (N, D) raw, y (N,). train: (features, y) of an official training part; else groups (N names) are left out
    in turn; else a random half is judged. Subset s draws with seed + s, as published. A class with fewer tiles than shots:
    the entry says "impossible" (published scripts leave failed subsets out of the mean).
    """
    x, K = features.double(), int(y.max()) + 1
    if train is not None:
        x, y = torch.cat([x, train[0].double()]), torch.cat([y, train[1]])
        judged = [torch.arange(len(x)) < len(features)]
        split = "the training part that was given"
    elif groups is not None:
        judged = [torch.tensor(np.array(groups) == g) for g in sorted(set(groups))]
        split = f"{len(judged)} groups, each judged by probes that saw none of it"
    else:
        judged = [torch.tensor(np.random.default_rng(seed).permutation(len(y)) >= len(y) // 2)]
        split = "WARNING: no groups known, a random half is judged; tiles of one slide in both halves make it too good"
    folds = [((~part).nonzero().squeeze(1), part.nonzero().squeeze(1)) for part in judged]

    def run(n, rng):
        guess = torch.full((len(y),), -1)
        for inside, outside in folds:
            if n:
                parts = [inside[y[inside] == k] for k in range(K)]
                inside = torch.cat([part[torch.tensor(rng.choice(len(part), n, replace=False))] for part in parts])
            weight, bias = probe_fit(x[inside], y[inside], 1.0, K)
            guess[outside] = (x[outside] @ weight.T + bias).argmax(1)
        return classification(y[guess >= 0], guess[guess >= 0], K)

    out, least = {"split": split}, min(int((y[inside] == k).sum()) for inside, _ in folds for k in range(K))
    for n in (*shots, 0):
        if n > least:
            out[str(n)] = {"impossible": f"a class has only {least} tiles to draw from"}
            continue
        found = [run(n, np.random.default_rng(seed + s)) for s in range(subsets if n else 1)]
        out[str(n or "all")] = {**{name: float(np.mean([f[name] for f in found])) for name in (
            "accuracy", "balanced_accuracy", "weighted_f1")}, "std": float(np.std([f["accuracy"] for f in found])),
            "subsets": len(found)}
    return out


def auc(score, positive):
    """Area under the ROC curve = share of (positive, negative) pairs that `score` (N,) orders rightly, ties half."""
    gap = score[positive][:, None] - score[~positive][None]           # (positives, negatives)
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def mean_auc(scores, y):
    """(N, K), (N,) -> mean one-against-rest AUC of the classes in y; NaN if y has one class. No threshold in it."""
    present = [k for k in range(scores.shape[1]) if 0 < int((y == k).sum()) < len(y)]
    return sum(auc(scores[:, k], y == k) for k in present) / len(present) if present else float("nan")


def probe_fit(x, y, C=1.0, classes=None, balanced=False):
    """Multinomial logistic regression: x (N, D), y (N,) long -> weights (K, D), biases (K,), both float64.

    Minimises sum of cross-entropies + |W|^2 / (2 C), scikit-learn's LogisticRegression(C), by Newton's method in
    float64, its equations solved by conjugate gradients, so that no Hessian is formed. The objective is convex with one minimum
    (up to a shift of all biases), so any start and any optimizer ends there.
    balanced: every class weighs the same in total, for data whose class shares mean nothing (class_weight="balanced").
    """
    x, K = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1), classes or int(y.max()) + 1
    share = torch.ones(K, dtype=torch.float64)
    if balanced:
        count = y.bincount(minlength=K)
        share = torch.where(count > 0, len(y) / (count > 0).sum() / count.clamp_min(1), 0.0).double()
    share, true = share[y][:, None], F.one_hot(y, K)                  # (N, 1), (N, K)
    penalty = torch.full((x.shape[1],), 1 / C, dtype=torch.float64)
    penalty[-1] = 0                                                   # the bias is free
    value = lambda t: share[:, 0] @ F.cross_entropy(x @ t.T, y, reduction="none") + (penalty * t * t).sum() / 2
    theta = torch.zeros(K, x.shape[1], dtype=torch.float64)           # (K, D + 1)
    for _ in range(100):
        p = (x @ theta.T).softmax(1)
        gradient = (share * (p - true)).T @ x + penalty * theta
        size = gradient.norm()
        if size < 1e-10 * len(x):
            break
        step, left = torch.zeros_like(theta), gradient.clone()        # H step = gradient
        way, square = left.clone(), size ** 2
        for _ in range(200):
            z = x @ way.T
            bent = (share * p * (z - (p * z).sum(1, keepdim=True))).T @ x + penalty * way
            step += square / (way * bent).sum() * way
            left -= square / (way * bent).sum() * bent
            before, square = square, left.square().sum()
            if square.sqrt() < min(0.1, float(size)) * size:
                break
            way = left + square / before * way
        now, rate = value(theta), 1.0
        while value(theta - rate * step) > now + 1e-12 * now and rate > 1e-6:
            rate /= 2
        theta -= rate * step
    return theta[:, :-1], theta[:, -1]


def probe_scores(x_train, y_train, x_test, C=1.0, classes=None, balanced=False):
    """Standardise by the training rows, fit, apply -> class probabilities of the test rows (N test, K) float64."""
    x_train, x_test = x_train.double(), x_test.double()
    mean, std = x_train.mean(0), x_train.std(0, correction=0).clamp_min(1e-6)
    weight, bias = probe_fit((x_train - mean) / std, y_train, C, classes, balanced)
    return ((x_test - mean) / std @ weight.T + bias).softmax(dim=1)


def leave_one_group_out(candidates, y, groups, balanced=True):
    """Score every group with a probe that never saw it, every choice being made inside the other groups.

    candidates: {name: (features (N, D), C)}; y (N,) long; groups: N names. For each group left out, each candidate is
    judged by leaving one of the *remaining* groups out in turn (mean AUC); the best one, the first at a tie, is fitted
    on all of them and applied to the left-out group. balanced: see probe_fit; here because the share of a class differs
    from group to group, so the training groups' shares say nothing about the next one.
    -> class probabilities (N, K) float64, {group: chosen candidate}
    """
    names, classes = sorted(set(map(str, groups))), int(y.max()) + 1
    which = torch.tensor([names.index(str(g)) for g in groups])
    least = 2 if len(candidates) == 1 else 3                          # choosing needs groups to spare
    if len(names) < least:
        raise ValueError(f"leave_one_group_out: needs {least} groups or more, got {len(names)}: {names}")
    scores, chosen = torch.empty(len(y), classes, dtype=torch.float64), {}

    def apply(name, train, test):
        features, C = candidates[name]
        return probe_scores(features[train], y[train], features[test], C, classes, balanced)

    def judge(name, g):
        inner = [(which == h, (which != g) & (which != h)) for h in range(len(names)) if h != g]
        values = [mean_auc(apply(name, train, test), y[test]) for test, train in inner]
        known = [v for v in values if not math.isnan(v)]              # a group of one class has no AUC
        return sum(known) / len(known) if known else 0.0

    for g, group in enumerate(names):
        marks = {name: judge(name, g) if len(candidates) > 1 else 0.0 for name in candidates}
        chosen[group] = max(marks, key=marks.get)
        scores[which == g] = apply(chosen[group], which != g, which == g)
    return scores, chosen


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
        ids = ids[:, :int(ids.argmax(1).max()) + 1]                   # cut behind the last end token, the highest id
        out.append(model.encode_text(ids.to(device)).float().cpu())
    return torch.cat(out)


# --- the drawn world --------------------------------------------------------------------------------------------------
TEMPLATES = ("CLASSNAME", "CLASSNAME.", "I see CLASSNAME.")


def text_of(record, lexicon):
    """The text by which a held-out picture is to be found: its own, or (question pools) its findings in words."""
    if record.get("morphology") or record.get("caption"):
        return record.get("morphology") or record["caption"]
    phrases = lexicon.get(record.get("subfield"), {})
    said = [values[record["facts"][a]][0] for a, values in phrases.items() if record.get("facts", {}).get(a) in values]
    if not said:
        from .data import DataError
        where = record.get("_where", record.get("id"))
        raise DataError(f"{where}: no field 'caption', and no 'facts' that lexicon.json has words for; retrieval "
                         "needs a text for each picture: add a caption")
    return ", ".join(said)


def read_prompts(path):
    """CONCH's layout {"0": {"classnames": {class: [synonyms]}, "templates": ["… CLASSNAME …"]}} -> the inner dict."""
    from .data import DataError
    form = '{"0": {"classnames": {class: [synonyms]}, "templates": ["… CLASSNAME …"]}}, no list empty'
    try:
        prompts = json.loads(Path(path).read_text(encoding="utf-8"))
        prompts = prompts.get("0", prompts)
        if (prompts["templates"] and all("CLASSNAME" in t for t in prompts["templates"]) and prompts["classnames"]
                and all(isinstance(s, list) and s for s in prompts["classnames"].values())):
            return prompts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must be {form} ({type(error).__name__}: {error})") from error
    raise DataError(f"{path}: must be {form}")


def class_features(model, tokenizer, prompts):
    """-> class names (K,), unit vectors (K, E): every synonym in every template, averaged."""
    names = list(prompts["classnames"])
    texts = [[t.replace("CLASSNAME", s) for s in prompts["classnames"][n] for t in prompts["templates"]] for n in names]
    features = text_features(model, tokenizer, [t for group in texts for t in group])
    return names, ensemble(features.split([len(group) for group in texts]))


def evaluate_pool(model, tokenizer, data, *, pool="test", items=0, label="tissue", images=None, seed=0, full=False):
    """The numbers of stage 0 on a held-out pool -> dict for results.json. items: the first so many records, 0 = all.

    Retrieval pairs each picture with `text_of` it. Zero-shot uses the records whose facts carry `label`, with the
    prompts of DATA/zero_shot.json (CONCH's layout) if it is there, else with the labels themselves as class names.
    full: also full_retrieval, among all pictures and texts.
    """
    from .data import Images, read_records
    from .evaluate import read_lexicon
    records, lexicon = read_records(f"{data}/{pool}.jsonl")[:items or None], read_lexicon(data)
    images, was_training = images or Images(), model.training
    model.eval()
    pictures = image_features(model, [images(r)[0] for r in records])
    texts = [text_of(r, lexicon) for r in records]
    said = text_features(model, tokenizer, texts)
    out = retrieval(pictures, said, texts, seed=seed)
    if full:
        out["retrieval_all"] = full_retrieval(pictures, said, texts, [str(r["image"]) for r in records])
    path = Path(data) / "zero_shot.json"
    labelled = [(i, r["facts"][label]) for i, r in enumerate(records) if r.get("facts", {}).get(label)]
    if path.is_file():
        prompts = read_prompts(path)
        labelled = [(i, name) for i, name in labelled if name in prompts["classnames"]]
    else:
        names = sorted({name for _, name in labelled})
        prompts = {"classnames": {name: [name] for name in names}, "templates": TEMPLATES}
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


# --- real tissue ------------------------------------------------------------------------------------------------------


# One-line prompts of the literature, as read in the repositories named, and an ensemble of our own.
TEMPLATE_SETS = {
    "quiltnet": ("a histopathology slide showing CLASSNAME", "histopathology image of CLASSNAME",
                 "pathology tissue showing CLASSNAME", "presence of CLASSNAME tissue on image"),  # repo quilt1m
    "plip": ("An H&E image patch of CLASSNAME.",),                                           # repo plip
    "pathgen": ("An H&E patch of CLASSNAME",),                                               # repo PathGen-1.6M
    "ours": ("CLASSNAME", "I see CLASSNAME.", "Under the microscope: CLASSNAME.", "This field of view: CLASSNAME.",
             "Mostly CLASSNAME.", "What fills the tile is CLASSNAME.", "Typical CLASSNAME, low power.",
             "Typical CLASSNAME, high power."),
}


def read_tiles(folder):
    """FOLDER/CLASS/GROUP_….jpg -> files, y (N,) long, class names, groups (N names) or None where the file names tell
    none: no "_", one group only, or every file a group of its own."""
    folder = Path(folder)
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff"))
    classes = sorted({f.parent.name for f in files})
    if len(classes) < 2:
        from .data import DataError
        raise DataError(f"{folder}: {len(files)} images in classes {classes}; needs two or more classes, as "
                         "FOLDER/CLASS/REGION_….jpg")
    groups = [f.name.split("_")[0] for f in files]
    known = all("_" in f.name for f in files) and 1 < len(set(groups)) < len(files)
    return files, torch.tensor([classes.index(f.parent.name) for f in files]), classes, groups if known else None


def protocol(model, tokenizer, folder, *, prompts=None, names=None, train=None, subsets=10):
    """Patho-CLIP's whole protocol on FOLDER/CLASS/GROUP_….jpg -> dict: zero_shot by prompt set, few_shot, pictures.

    prompts: a file in CONCH's form; names: {class folder: what to call it}; train: folder of an official training part.
    Features are computed once. Intervals resample groups where they are known.
    """
    from .data import DataError
    from .image import open_image
    files, y, classes, groups = read_tiles(folder)
    was_training = model.training
    model.eval()
    see = lambda files: torch.cat([image_features(model, [open_image(f) for f in files[at:at + 512]])
                                   for at in range(0, len(files), 512)])
    features = see(files)
    called = {c: [(names or {}).get(c, c.replace("_", " "))] for c in classes}
    sets = {name: {"classnames": called, "templates": t} for name, t in TEMPLATE_SETS.items()}
    if prompts:
        sets = {"file": read_prompts(prompts), **sets}
        missing = set(classes) - set(sets["file"]["classnames"])
        if missing:
            raise DataError(f"{prompts}: has no class {', '.join(sorted(missing))}, but {folder} has such a folder")
    out = {"classes": classes, "n": len(files), "majority": int(y.bincount().max()) / len(y), "zero_shot": {},
           "groups": sorted(set(groups)) if groups else "WARNING: none in the file names"}
    for name, prompt_set in sets.items():
        found, vectors = class_features(model, tokenizer, prompt_set)                # a file may name more classes
        guess = zero_shot(features, vectors)
        truth = torch.tensor([found.index(classes[k]) for k in y])
        numbers = classification(truth.numpy(), guess.numpy(), len(found))
        ci = interval((guess == truth).double().numpy(), groups=groups)[1]
        out["zero_shot"][name] = {**numbers, "accuracy_ci": ci, "recall": dict(zip(found, numbers["recall"]))}
    part = None
    if train:
        more, train_y, train_classes, _ = read_tiles(train)
        if train_classes != classes:
            raise DataError(f"{train}: classes {train_classes}, but {folder} has {classes}")
        part = see(more), train_y
    model.train(was_training)
    out["few_shot"] = few_shot(features, y, groups, train=part, subsets=subsets)
    out["pictures"] = image_retrieval(features, y, groups)
    if groups:
        out["pictures_with_own_group"] = image_retrieval(features, y)                # what leaking neighbours add
    return out


def symmetries(picture):
    """uint8 (S, S, 3) -> its eight turned and mirrored forms."""
    return [np.rot90(picture, k)[:, ::flip] for k in range(4) for flip in (1, -1)]


def two_magnifications(tile, size):
    """PIL tile -> two uint8 pictures (size, size, 3): resized to fill the field, and at half that, mirrored to fill it.

    The tower knows drawings of 112 um fields; the tiles show 56 um (224 px at 0.25 um/px). The second picture has the
    scale of the drawings but repeats itself, the first has twice the scale and more detail. Neither is right alone.
    """
    from PIL import Image
    large = np.asarray(tile.resize((size, size), Image.Resampling.BOX))
    small = np.asarray(tile.resize((size // 2, size // 2), Image.Resampling.BOX))
    small = np.concatenate([small, small[:, ::-1]], axis=1)
    small = np.concatenate([small, small[::-1]], axis=0)              # an odd size gives size - 1: resized later
    return large, small


def real_tissue_probe(model, folder, strengths=(0.01, 0.1, 1.0)):
    """Does a tower that has seen only drawings help on real tissue? FOLDER/CLASS/REGION_….jpg -> dict of accuracies.

    The tower stays frozen. Features: unit-length image embeddings, averaged over the 8 symmetries. A class-balanced
    logistic probe, always applied to a region it has not seen; magnification and C are chosen inside the other regions.
    Beside it, by the same protocol: mean and standard deviation of R, G, B ("colour"); and "majority" (all tiles put in
    the larger class). "auc" is the mean over regions of the AUC inside each: how well tiles are ordered, without the
    threshold, which does not carry over between regions of different colour and class shares (on bcss it costs most).
    The intervals take tiles as independent; neighbours are not, so with few regions they are too narrow. This protocol
    was settled on bcss itself after seeing results of several towers and variants: its number there is a development
    figure.
    """
    from .image import open_image
    files, y, classes, regions = read_tiles(folder)
    regions = np.array(regions or ["all"] * len(files))
    size, was_training = model.config["vision_config"]["image_size"], model.training
    tiles = [open_image(f) for f in files]
    model.eval()
    features = torch.cat([image_features(model, [form for view in two_magnifications(tile, size)
                                                 for form in symmetries(view)]) for tile in tiles])     # (N*2*8, E)
    model.train(was_training)
    large, small = F.normalize(features, dim=-1).view(len(tiles), 2, 8, -1).mean(2).unbind(1)           # (N, E) each
    pixels = [np.asarray(t, dtype=np.float64).reshape(-1, 3) for t in tiles]
    colour = torch.tensor(np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels]))            # (N, 6)

    out = {"classes": classes, "majority": wilson(int(y.bincount().max()), len(y))}
    for name, views in (("tower", {"large": large, "small": small}), ("colour", {"rgb": colour})):
        candidates = {f"{view}, C={C}": (x, C) for view, x in views.items() for C in strengths}
        scores, chosen = leave_one_group_out(candidates, y, regions)
        right, by = scores.argmax(1) == y, {}
        for region in sorted(set(regions.tolist())):
            rows = torch.tensor(regions == region)
            by[region] = dict(wilson(int(right[rows].sum()), int(rows.sum())), auc=mean_auc(scores[rows], y[rows]),
                              chosen=chosen[region])
        out[name] = dict(wilson(int(right.sum()), len(y)), auc=float(np.nanmean([r["auc"] for r in by.values()])),
                         by_region=by)
    return out


def main(argv=None):
    from . import checkpoint
    from .chat import read_tokenizer
    from .clip import CLIP
    from .data import check_images, read_records
    from .log import write_json
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder with config.json, weights, tokenizer.json; or an open_clip .pt")
    add("--tokenizer", help="tokenizer.json (default: the one in the folder --model)")
    add("--data", help="data folder: zero-shot and retrieval on its pool")
    add("--pool", default="test", help="test, val, test_combo or test_stain (default: test)")
    add("--items", type=int, default=0, help="first so many records of the pool (default: 0 = all)")
    add("--tiles", help="folder CLASS/REGION_….jpg of real tiles: the linear probe")
    add("--protocol", help="folder CLASS/GROUP_….jpg: zero-shot, few-shot, image-to-image")
    add("--prompts", help="class names and templates of --protocol, a JSON file in CONCH's form")
    add("--labels", default="", help="names for the class folders: folder=name,folder=name")
    add("--train", help="training part of --protocol, where the data set has an official one")
    add("--subsets", type=int, default=10, help="few-shot: subsets drawn for each number of shots")
    add("--out", help="folder of the results: writes clip.json (default: print only)")
    a = parser.parse_args(argv)
    if not (a.data or a.tiles or a.protocol):
        parser.error("nothing to evaluate: give --data, --tiles or --protocol")
    if any("=" not in part for part in a.labels.split(",") if part):
        parser.error(f"--labels {a.labels!r}: write folder=name,folder=name")
    if a.data:
        check_images(read_records(f"{a.data}/{a.pool}.jsonl")[:a.items or None])
    with checkpoint.reading(a.model, "--model"):
        model, out = CLIP.from_pretrained(a.model, device="cuda" if torch.cuda.is_available() else "cpu"), {}
        tokenizer = read_tokenizer(a.tokenizer or Path(a.model) / "tokenizer.json") if a.data or a.protocol else None
    if a.data:
        out.update(evaluate_pool(model, tokenizer, a.data, pool=a.pool, items=a.items, full=True))
    if a.tiles:
        out["real_tissue"] = real_tissue_probe(model, a.tiles)
    if a.protocol:
        labels = dict(part.split("=", 1) for part in a.labels.split(",") if part)
        out["protocol"] = protocol(model, tokenizer, a.protocol, prompts=a.prompts, names=labels, train=a.train,
                                   subsets=a.subsets)
    if a.out:
        Path(a.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(a.out) / "clip.json", out)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    from .log import run_main
    run_main(main)
