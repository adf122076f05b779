"""The numbers of a CLIP evaluation as pure functions of feature vectors: zero-shot, retrieval, few-shot, linear probes.

torch and numpy; may be copied. Needs metrics.py beside it. No model and no file is met here: evaluate_clip.py makes the
vectors, and its docstring tells the protocols and where they differ from published scripts.

Letters: N pictures with a text each, K classes, E embedding, D features.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from .metrics import classification


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


# --- probes on frozen features ----------------------------------------------------------------------------------------


def few_shot(features, y, groups=None, *, train=None, shots=(2, 8, 16, 32, 64, 128), subsets=10, seed=42):
    """Probes on few tiles a class -> {"2": {"accuracy", "std", "balanced_accuracy", "weighted_f1"}, …, "all", "split"}.

    features (N, D) raw, y (N,). train: (features, y) of an official training part; else groups (N names) are left out
    in turn; else a random half is judged. Subset s draws with seed + s, as published. A class with fewer tiles than
    shots: the entry says "impossible" (published scripts leave failed subsets out of the mean).
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
    float64, its equations solved by conjugate gradients, so that no Hessian is formed. The objective is convex with one
    minimum (up to a shift of all biases), so any start and any optimizer ends there.
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
