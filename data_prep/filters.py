"""The funnel between raw pairs and training files: every record passes ten gates, every drop is counted and shown.

    python -m data_prep filter raw/captions.jsonl --out data/clean --benchmarks test.jsonl … [--clip runs/clip]

 unreadable     not a record, or an image that cannot be opened
 size           shorter side under 96 pixels, or one side over 4 times the other
 tissue         hardly any stained tissue: grey pictures and gels, charts, blank slides
 subfield       neither H&E, IHC, cytology, FISH nor gross, by the words of the caption, then by colour
 caption        under 5 words, none of them histology, or mostly repetition or symbols
 duplicate      the picture of an earlier record: re-encoded, resized, turned, mirrored, or cropped to 77 % a side
 clip           image and caption disagree by our own Patho-CLIP (only with --clip): the lowest share --clip-drop
 benchmark id, benchmark image, benchmark text       what a benchmark holds: group, patient or article; picture; wording

DIR/captions.jsonl holds what is left, dropped.jsonl where each other record stands and why, card.json the counts and
seconds, funnel.html the same to look at. The slow first pass (opening images) goes on where a killed call stopped. Of a
record with several images the first is judged. Records that share one image file under different captions are kept.
How a copy or a known text is found stands in copies.py.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import records
from data_prep.copies import SIDE, Texts, build_index, pairs, thumbnail, words_of
from nanopatho.data import DataError
from nanopatho.image import ImageError, open_image

STAGES = ("unreadable", "size", "tissue", "subfield", "caption", "duplicate", "clip", "benchmark id", "benchmark image",
          "benchmark text")
LEAST_SIDE, MOST_ASPECT = 96, 4

# --- one image: is it tissue, and of which kind -----------------------------------------------------------------------

_SPECIAL = (r"\bPAS\b|Masson|trichrome|Congo red|Ziehl|reticulin|Alcian|silver stain|electron micro|\bTEM\b|\bSEM\b|"
            r"immunofluoresc|radiograph|\bMRI\b|\bCT\b|X-ray|ultraso|endoscop|western blot|flow cytomet|电镜|免疫荧光")
KINDS = {"FISH": r"\bFISH\b|\bCISH\b|in situ hybridi[sz]ation|原位杂交", "other": _SPECIAL,
         "IHC": r"immunohistochem|\bIHC\b|immunostain|immunoperoxidase|\bDAB\b|\bKi-?67\b|免疫组化|免疫组织化学",
         "cytology": r"cytolog|smear|\bFNA\b|fine[- ]needle|Papanicolaou|Pap stain|Giemsa|细胞学|涂片|细针",
         "gross": r"\bgross(?:ly)?\b|macroscop|cut surface|resection specimen|大体|肉眼|切面",
         "H&E": r"\bH ?& ?E\b|\bHE\b|ha?ematoxylin|苏木"}


def look(image):
    """PIL RGB -> shares of the picture: tissue, grey, brown and dark pixels, and of its coloured part what is flat.

    tissue: darker than the slide (grey level under 219, OD 0.15), with a hue from blue over purple and pink to brown.
    flat: equal to the neighbour on the right and below, as in charts, hardly ever in a photograph (real tiles: 0.01).
    """
    small = image.copy()
    small.thumbnail((64, 64), Image.Resampling.BOX, reducing_gap=2.0)
    hue, sat, value = np.moveaxis(np.asarray(small.convert("HSV")), -1, 0)          # hue: 0 … 255 for 0 … 360 degrees
    coloured = (sat > 20) & (value > 40)
    tissue = coloured & (np.asarray(small.convert("L")) < 219) & ((hue > 138) | (hue < 34))
    crop = image.crop((0, 0, min(image.width, 256), min(image.height, 256)))
    pixel = np.asarray(crop.convert("RGBA")).view(np.uint32)[..., 0]
    body = np.asarray(crop.getchannel("G"))[:-1, :-1] < 235
    same = (pixel[:-1, :-1] == pixel[1:, :-1]) & (pixel[:-1, :-1] == pixel[:-1, 1:])
    return {"tissue": float(tissue.mean()), "grey": float(1 - coloured.mean()), "dark": float((value < 60).mean()),
            "brown": float((tissue & (hue > 8) & (hue < 34)).sum() / max(1, tissue.sum())),
            "flat": float((same & body).sum() / body.sum()) if body.any() else 1.0}


def tissue_problem(seen):
    """Shares of `look` -> why the picture cannot be tissue, or None. Fluorescence is dark: its spots decide."""
    if seen["flat"] > 0.3:
        return f"{100 * seen['flat']:.0f} % of it is flat colour: a chart or drawing"
    if seen["dark"] > 0.6:
        return None if seen["grey"] < 0.999 else "dark and without colour"
    if seen["tissue"] < 0.05:
        return f"{100 * seen['tissue']:.1f} % of it looks like stained tissue, {100 * seen['grey']:.0f} % is grey"
    return None


def subfield_of(seen, caption):
    """-> "H&E", "IHC", "cytology", "FISH", "gross" or "other". Words decide; if several or none, colour."""
    by_colour = "FISH" if seen["dark"] > 0.6 else "IHC" if seen["brown"] > 0.15 else "H&E"
    said = [kind for kind, pattern in KINDS.items() if re.search(pattern, caption, re.I if kind != "other" else 0)]
    return said[0] if len(said) == 1 or said and by_colour not in said else by_colour


# --- one caption ------------------------------------------------------------------------------------------------------

# Beginnings of words; a caption that has none of them is hardly about a tissue section.
LEXICON = re.compile(r"(?<![a-z])(?:" + "|".join("""
abscess acin aden amyloid anaplas angio apopto astrocyt atroph atypi basal benign biops blast bronch calcifi capill
capsul carcin cartilag caseous cell chondr chromatin chronic cirrh collagen colloid condyl connective cortex crypt cyst
cytoplas dendrit derm desmoplas differentiat duct dysplas ectasia edema elast embol endometri endotheli eosin epiderm
epitheli erythro exudat fascic fat fibro follic gangli gastr giant gland gliom glomer goblet grade granul h&e ha?ema
hepat hist hyalin hyperplas immuno infarct infiltrat inflam invasi kerat kidney lamina leiomy leuk lesion lipo
liver lobul lumen lung lymph macrophag malignan medull melan meningi mesenchym metaplas metasta mitos mitot mucin mucos
muscle myel myo necro nephro neur neutrophil nevus nodul nucle oligo osteo ovar pancrea papill parenchym patholog plasma
pleomorph polyp prostat pseudo renal sarcom schwann secret section septa sinus slide spindle squam stain stroma stromal
submucos tissue thyroid trabecul tubul tumou?r ulcer urothel vascul vessel vill xanthom""".split())
    + r")|[组細细]胞|组织|肿瘤|瘤|癌|腺|上皮|间质|染色|核|坏死|炎|浸润|切片|病变|纤维|血管|黏膜|淋巴|免疫|\b(?-i:HE)\b", re.I)


def caption_problem(caption):
    """-> why a caption teaches nothing, or None."""
    words = words_of(caption)
    named = sum(1 if w.isascii() else 0.5 for w in words if not w.isdigit())
    if named < 5:
        return f"{named:.0f} words"
    if not LEXICON.search(caption):
        return "no word of histology"
    if len(words) > 12 and len(set(words)) < 0.4 * len(words):
        return f"only {len(set(words))} of {len(words)} words differ"
    if sum(c.isalpha() or c.isspace() for c in caption) < 0.6 * len(caption):
        return "mostly symbols and digits"
    return None


# --- what a benchmark holds -------------------------------------------------------------------------------------------


def ids_of(record):
    """Names by which the origin of a record may be known elsewhere: group, TCGA patients, PMC articles, videos."""
    said = " ".join(str(record.get(k, "")) for k in ("id", "group", "image"))
    group = str(record.get("group", "")).lower()
    found = {m.lower() for m in re.findall(r"TCGA-\w\w-\w{4}|PMC\d{4,}|youtube-[\w-]{11}", said, re.I)}
    return found | {group} if len(group) >= 5 else found


def texts_of(record):
    """What a record says: caption, question with its options, turns of a conversation."""
    out = [record.get("caption"), " ".join([record.get("question") or "", *(record.get("options") or [])])]
    return [t for t in out + [m["content"] for m in record.get("messages", [])] if t and t.strip()]


# --- the funnel -------------------------------------------------------------------------------------------------------


def measure(job):
    """(record, folder) -> (stage or None, why, subfield or None, thumbnail): the gates that need one record alone."""
    record, root = job
    none = np.zeros((SIDE, SIDE), np.uint8)
    names = records.names_of(record)
    if not names or not record.get("caption"):
        return "unreadable", f"no {'caption' if names else 'image'}", None, none
    try:
        image = open_image(os.path.join(root, names[0]))
    except (ImageError, ValueError) as error:                            # ValueError: a NUL byte in the name
        return "unreadable", str(error), None, none
    thumb, (short, long) = thumbnail(image), sorted(image.size)
    if short < LEAST_SIDE or long > MOST_ASPECT * short:
        return "size", f"{image.width} x {image.height}", None, thumb
    seen = look(image)
    problem = tissue_problem(seen)
    if problem:
        return "tissue", problem, None, thumb
    subfield = record.get("subfield") or subfield_of(seen, record["caption"])
    if subfield == "other":
        return "subfield", "another stain or technique", None, thumb
    problem = caption_problem(record["caption"])
    return ("caption", problem, subfield, thumb) if problem else (None, "", subfield, thumb)


def first_pass(files, work, workers, problem):
    """Measure every record -> how many. Goes on where work/measured.jsonl and work/thumbs, an entry each, end."""
    measured, thumbs = work / "measured.jsonl", work / "thumbs"
    whole = [line for line in open(measured, "rb") if line.endswith(b"\n")] if measured.exists() else []
    done = min(len(whole), thumbs.stat().st_size // SIDE ** 2 if thumbs.exists() else 0)
    size = sum(map(len, whole[:done]))
    del whole
    stream = ((where, record, str(Path(file).parent)) for file in files
              for where, record, _ in records.lines(file, problem))
    for _ in range(done):
        next(stream)
    with open(measured, "ab") as log, open(thumbs, "ab") as pixels, multiprocessing.Pool(workers) as crew:
        log.truncate(size)
        pixels.truncate(done * SIDE ** 2)
        while chunk := list(itertools.islice(stream, 512)):
            for (where, record, root), (stage, why, subfield, thumb) in zip(chunk, crew.map(
                    measure, [(record, root) for _, record, root in chunk], chunksize=16)):
                line = {"where": where, "root": root, "stage": stage, "why": why, "subfield": subfield,
                        "record": record}
                log.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                pixels.write(thumb.tobytes())
            log.flush(), pixels.flush()
            done += len(chunk)
            print(f"\r{done:,} records measured", end="", flush=True)
    print()
    return done


def clip_scores(model_folder, rows, batch=64):
    """Iterator of (number, record, folder) -> numbers and cosines of image and caption by a Patho-CLIP run folder."""
    from torch.nn.functional import cosine_similarity

    from nanopatho.chat import read_tokenizer
    from nanopatho.clip import CLIP
    from nanopatho.evaluate_clip import image_features, text_features
    model, tokenizer = CLIP.from_pretrained(model_folder), read_tokenizer(Path(model_folder) / "tokenizer.json")
    model.eval()
    while some := list(itertools.islice(rows, batch)):
        images = image_features(model, [open_image(os.path.join(root, records.names_of(r)[0])) for _, r, root in some])
        texts = text_features(model, tokenizer, [r["caption"] for _, r, _ in some])
        yield [n for n, _, _ in some], cosine_similarity(images, texts).tolist()


def read_benchmarks(files, problem):
    """Held-out files -> {id: where}, Texts, M places, thumbnails uint8 (M, 32, 32). DataError: an image is missing."""
    ids, texts, pictures = {}, [], []
    for file in files:
        for where, record, _ in records.lines(file, problem):
            ids |= dict.fromkeys(ids_of(record), where)
            texts += texts_of(record)
            for name in records.names_of(record):
                try:
                    pictures.append((where, thumbnail(open_image(Path(file).parent / name))))
                except (ImageError, ValueError) as error:
                    raise DataError(f"{where}: field 'image': {error}; a benchmark needs all its pictures") from error
    pixels = np.array([t for _, t in pictures], np.uint8).reshape(-1, SIDE, SIDE)
    return ids, Texts(texts), [w for w, _ in pictures], pixels


def run(files, out, *, workers=2, clip=None, clip_drop=0.05, benchmarks=()):
    """The whole funnel -> the card as a dict. DataError: settings or files that cannot be used, before long work."""
    from data_prep import funnel
    out, work, seconds = Path(out), Path(out) / "work", {}
    for file in [*files, *benchmarks]:
        if not Path(file).is_file():
            raise DataError(f"{file}: no such file; give .jsonl files of records")
    settings = {"files": [os.path.abspath(f) for f in files], "sizes": [os.path.getsize(f) for f in files]}
    if (out / "card.json").exists():
        raise DataError(f"{out}: holds a finished funnel; remove it or choose another --out")
    if (work / "settings.json").exists() and json.loads((work / "settings.json").read_text()) != settings:
        raise DataError(f"{work}: was begun with other files; remove it or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps(settings))
    broken, clock = [], time.perf_counter()

    def lap(name):
        nonlocal clock
        seconds[name], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

    problem = lambda where, fault, value="": broken.append((where, f"{fault} {value}"))
    ids, known, theirs, pixels = read_benchmarks(benchmarks, problem)
    n = first_pass(files, work, workers, problem)
    if not n:
        raise DataError(f"{', '.join(map(str, files))}: no usable record; {len(broken)} problems, first: {broken[:1]}")
    with open(work / "thumbs", "ab") as file:
        file.write(pixels.tobytes())
    thumbs = np.memmap(work / "thumbs", np.uint8, "r", shape=(n + len(theirs), SIDE, SIDE))
    stage, why, names = np.full(n, -1, np.int8), {}, np.zeros(n, np.int64)

    def rows():
        with open(work / "measured.jsonl", encoding="utf-8") as file:
            yield from enumerate(map(json.loads, file))

    def drop(number, name, reason):
        stage[number], why[number] = STAGES.index(name), reason

    for i, row in rows():
        names[i] = hash((row["root"], str(row["record"].get("image"))))
        if row["stage"]:
            stage[i] = STAGES.index(row["stage"])
    lap("measure")
    alive = np.concatenate([stage < 0, np.ones(len(theirs), bool)])
    in_benchmark, captions = {}, {}
    for i, j, r in pairs(build_index(thumbs, alive), thumbs, alive, workers):
        early, late = min(i, j), max(i, j)
        if early < n <= late:
            in_benchmark[early] = f"the picture of {theirs[late - n]}, correlation {r:.2f}"
        elif late < n and early != late and names[early] != names[late] and early < why.get(late, (late, ""))[0]:
            why[late] = early, f"the picture of record {early + 1}, correlation {r:.2f}"
    for late, (_, reason) in list(why.items()):
        drop(late, "duplicate", reason)
    for i, row in rows():                                                # one file twice is fine under two captions
        if stage[i] < 0:
            same = (int(names[i]), hash(row["record"]["caption"]))
            if same in captions:
                drop(i, "duplicate", f"image file and caption of record {captions[same] + 1}")
            captions.setdefault(same, i)
    lap("duplicates")
    if clip:
        scores = np.full(n, np.nan)
        for numbers, values in clip_scores(clip, ((i, r["record"], r["root"]) for i, r in rows() if stage[i] < 0)):
            scores[numbers] = values
        limit = np.nanquantile(scores, clip_drop)
        for i in np.flatnonzero(scores < limit):
            drop(int(i), "clip", f"cosine {scores[i]:.3f}, the lowest {100 * clip_drop:g} % are under {limit:.3f}")
        lap("clip")
    if benchmarks:
        for i, row in rows():                                            # by origin, then by picture, then by wording
            if stage[i] < 0:
                same = ids_of(row["record"]) & ids.keys()
                if same:
                    drop(i, "benchmark id", f"{min(same)} is in {ids[min(same)]}")
                elif i in in_benchmark:
                    drop(i, "benchmark image", in_benchmark[i])
                elif said := next(filter(None, map(known.find, texts_of(row["record"]))), None):
                    drop(i, "benchmark text", f"shares {said} with a benchmark")
        lap("benchmarks")
    shown = {}
    used = {"clip": clip and str(clip), "clip_drop": clip_drop, "benchmarks": list(map(str, benchmarks))}
    with records.Card(out, files, settings=used) as card, \
            open(out / "captions.jsonl", "w", encoding="utf-8") as kept:
        for where, fault in broken:
            card.drop(where, "unreadable", fault)
        for i, row in rows():
            name = STAGES[stage[i]] if stage[i] >= 0 else "kept"
            reason = row["why"] or why.get(i, "")
            image = [os.path.relpath(os.path.join(row["root"], x), out) for x in records.names_of(row["record"])]
            some = shown.setdefault(name, [])
            if len(some) < funnel.EXAMPLES:
                some.append((image[:1], row["record"].get("caption", ""), reason))
            if name == "kept":
                record = records.renamed({**row["record"], "subfield": row["subfield"]}, image)
                kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                card.count(record)
            else:
                card.drop(row["where"], name, reason)
        lap("write")
        card.data |= {"read": n + len(broken), "seconds": seconds}
    data = card.data
    (out / "funnel.html").write_text(funnel.page(data, shown, out), encoding="utf-8")
    del thumbs
    shutil.rmtree(work)
    return data


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep filter", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help=".jsonl files of records with image and caption")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes that open images")
    parser.add_argument("--clip", help="run folder of our own Patho-CLIP")
    parser.add_argument("--clip-drop", type=float, default=0.05, help="share with the lowest scores to drop")
    parser.add_argument("--benchmarks", nargs="*", default=[], help=".jsonl files of held-out sets")
    args = parser.parse_args(argv)
    if not 0 <= args.clip_drop < 1:
        raise SystemExit(f"--clip-drop {args.clip_drop}: must be at least 0 and under 1")
    data = run(args.files, args.out, workers=max(1, args.workers), clip=args.clip, clip_drop=args.clip_drop,
               benchmarks=args.benchmarks)
    print(f"{data['records']:,} of {data['read']:,} records left; dropped: {data['dropped']}\n"
          f"seconds: {data['seconds']}\n{args.out}/funnel.html")
    return 0
