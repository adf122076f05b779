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
The formulas are in clip_metrics.py.

Letters: N pictures, M texts, K classes, E embedding, D features.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import checkpoint
from .chat import clip_ids, read_tokenizer
from .clip import CLIP
from .clip_metrics import (ensemble, few_shot, full_retrieval, image_retrieval, leave_one_group_out, mean_auc,
                           ranks, retrieval, wilson, zero_shot)          # noqa: F401  (ranks: imported from here)
from .data import DataError, Images, check_images, read_records
from .faithful import read_lexicon
from .image import clip_pixels, open_image
from .log import run_main, write_json
from .metrics import classification, interval

# --- the model's vectors ----------------------------------------------------------------------------------------------


@torch.no_grad()
def image_features(model, pictures, batch=128):
    """list of pictures (PIL or uint8 (H, W, 3)) -> (N, E) fp32 on the CPU, not of unit length."""
    device, size = next(model.parameters()).device, model.config["vision_config"]["image_size"]
    return torch.cat([model.encode_image(clip_pixels(pictures[at:at + batch], size).to(device)).float().cpu()
                      for at in range(0, len(pictures), batch)])


@torch.no_grad()
def text_features(model, tokenizer, texts, batch=256):
    """list of M texts -> (M, E) fp32 on the CPU, not of unit length."""
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
    if own := record.get("morphology") or record.get("caption"):
        return own
    phrases = lexicon.get(record.get("subfield"), {})
    said = [values[record["facts"][a]][0] for a, values in phrases.items() if record.get("facts", {}).get(a) in values]
    if not said:
        where = record.get("_where", record.get("id"))
        raise DataError(f"{where}: no field 'caption', and no 'facts' that lexicon.json has words for; retrieval "
                         "needs a text for each picture: add a caption")
    return ", ".join(said)


def read_prompts(path):
    """CONCH's layout {"0": {"classnames": {class: [synonyms]}, "templates": ["… CLASSNAME …"]}} -> the inner dict."""
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
    labels = [part.split("=", 1) for part in a.labels.split(",") if part]
    if any(len(pair) < 2 for pair in labels):
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
        out["protocol"] = protocol(model, tokenizer, a.protocol, prompts=a.prompts, names=dict(labels), train=a.train,
                                   subsets=a.subsets)
    if a.out:
        Path(a.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(a.out) / "clip.json", out)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    run_main(main)
