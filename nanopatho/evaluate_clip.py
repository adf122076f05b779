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
The formulas (first part) need torch and numpy alone and may be copied.

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

    Minimises sum of cross-entropies + |W|^2 / (2 C), scikit-learn's LogisticRegression(C), by L-BFGS in float64. The
    objective is convex with one minimum (up to a shift of all biases), so any start and any optimizer ends there.
    balanced: every class weighs the same in total, for data whose class shares mean nothing (class_weight="balanced").
    """
    x, classes = x.double(), classes or int(y.max()) + 1
    share = torch.ones(classes, dtype=torch.float64)
    if balanced:
        count = y.bincount(minlength=classes)
        share = torch.where(count > 0, len(y) / (count > 0).sum() / count.clamp_min(1), 0.0).double()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], lr=1, max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        # divided by N: the same minimum, at a scale where the optimizer's tolerances mean the same for every N
        loss = F.cross_entropy(x @ weight.T + bias, y, weight=share, reduction="sum") / len(x)
        loss = loss + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


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


def evaluate_pool(model, tokenizer, data, *, pool="test", items=0, label="tissue", images=None, seed=0):
    """The numbers of stage 0 on a held-out pool -> dict for results.json. items: the first so many records, 0 = all.

    Retrieval pairs each picture with `text_of` it. Zero-shot uses the records whose facts carry `label`, with the
    prompts of DATA/zero_shot.json (CONCH's layout) if it is there, else with the labels themselves as class names.
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
    folder = Path(folder)
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif"))
    classes = sorted({f.parent.name for f in files})
    if len(classes) < 2:
        from .data import DataError
        raise DataError(f"{folder}: {len(files)} images in classes {classes}; needs two or more classes, as "
                         "FOLDER/CLASS/REGION_….jpg")
    y = torch.tensor([classes.index(f.parent.name) for f in files])
    regions = np.array([f.name.split("_")[0] for f in files])
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


def main():
    from . import checkpoint
    from .chat import read_tokenizer
    from .clip import CLIP
    from .data import check_images, read_records
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json, weights and tokenizer.json")
    parser.add_argument("--data", help="data folder: zero-shot and retrieval on its pool")
    parser.add_argument("--pool", default="test", help="test, val, test_combo or test_stain (default: test)")
    parser.add_argument("--items", type=int, default=0, help="first so many records of the pool (default: 0 = all)")
    parser.add_argument("--tiles", help="folder CLASS/REGION_….jpg of real tiles: the linear probe")
    a = parser.parse_args()
    if not (a.data or a.tiles):
        parser.error("nothing to evaluate: give --data, --tiles, or both")
    if a.data:
        check_images(read_records(f"{a.data}/{a.pool}.jsonl")[:a.items or None])
    with checkpoint.reading(a.model, "--model"):
        model, out = CLIP.from_pretrained(a.model, device="cuda" if torch.cuda.is_available() else "cpu"), {}
        tokenizer = read_tokenizer(Path(a.model) / "tokenizer.json") if a.data else None
    if a.data:
        out.update(evaluate_pool(model, tokenizer, a.data, pool=a.pool, items=a.items))
    if a.tiles:
        out["real_tissue"] = real_tissue_probe(model, a.tiles)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    from .log import run_main
    run_main(main)
