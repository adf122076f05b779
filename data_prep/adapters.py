"""Published files of the public sets -> records. One function a set, from the files as they are handed out.

Each adapter is a generator of records: adapter(root, drop). `root` is the folder that sources.SOURCES describes; what
cannot be used goes to drop(where, why, value), never into nothing. A record's "image" is the name in the published
table; sources.convert finds the file, checks the record and counts what was dropped. Bytes that come inside a table
travel as "_bytes" and become files. Sets of classes are in classification.py.

Groups are named so that sets can be held against each other: youtube-ID, PMC…, tweet-ID, TCGA-patient, arch-figure.
"""
import csv
import functools
import hashlib
import io
import json
import os
import re
from pathlib import Path

from PIL import Image

from data_prep.archives import finder, image_problem
from nanopatho.data import LETTERS, DataError



# --- reading tables ---------------------------------------------------------------------------------------------------

def table(path, columns, drop, delimiter=","):
    """CSV -> generator of (where, row as dict). Broken lines are dropped; columns that lack are a DataError."""
    with open(need(path), newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        missing = [c for c in columns if c not in (rows.fieldnames or [])]
        if missing:
            raise DataError(f"{path}: has no column {', '.join(missing)}; its columns are {rows.fieldnames}. Is it the "
                            "right file?")
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                drop(f"{path}:{rows.line_num}", "a broken line of the table", str(error))
                continue
            if row is None:
                return
            if None in row or None in row.values():
                drop(f"{path}:{rows.line_num}", "a line with too many or too few fields", row.get(None))
                continue
            yield f"{path}:{rows.line_num}", row


def items(path, drop):
    """JSON list, JSON object of objects, or JSONL -> generator of (where, dict). A list is read in pieces of 1 MB."""
    with open(need(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read(1 << 20).lstrip()
        if text[:1] == "[":
            decoder, at, number = json.JSONDecoder(), 1, 0
            while True:
                while at < len(text) and text[at] in " \t\r\n,":
                    at += 1
                if at < len(text) and text[at] == "]":
                    return
                try:
                    item, at = decoder.raw_decode(text, at)
                except (json.JSONDecodeError, RecursionError) as error:
                    more = file.read(1 << 20)
                    if not more or len(text) - at > 16 << 20 or isinstance(error, RecursionError):
                        drop(f"{path}: item {number + 1}", "cut off or no JSON; nothing behind it is read", error)
                        return
                    text, at = text[at:] + more, 0
                    continue
                number += 1
                yield from kept(f"{path}: item {number}", item, drop)
        if Path(path).suffix == ".json":
            try:
                everything = json.loads(text + file.read())
                for key, item in everything.items():
                    yield from kept(f"{path}: {key}", item, drop)
                return
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: not valid JSON ({error}); fetch it again") from error
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    item = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    drop(f"{path}:{number}", "not valid JSON", str(error))
                    continue
                yield from kept(f"{path}:{number}", item, drop)


def kept(where, item, drop):
    if isinstance(item, dict):
        yield where, item
    else:
        drop(where, "not a JSON object", str(item)[:80])


def parquet(root, pattern):
    """-> generator of (where, row as dict, file name) over the parquet files below root, in order of their names."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SystemExit("parquet files need pyarrow: pip install 'nanopatho[data]'") from error
    files = sorted(Path(root).glob(pattern))
    if not files:
        need(Path(root) / pattern)
    for path in files:
        try:
            number = 0
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row, path.name
        except (OSError, ValueError) as error:                           # ArrowInvalid is a ValueError
            raise DataError(f"{path}: cannot be read as parquet ({error}); fetch it again") from error


def need(path):
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; `python -m data_prep list` shows the layout of each set")
    return path


def group_of(name):
    """Image name -> group: the video, the article, else the image itself.

    >>> group_of("_KJZm1orOvU_roi_0a1b.jpg"), group_of("PMC212319_Fig3_4.jpg"), group_of("a/b.jpg")
    ('youtube-_KJZm1orOvU', 'PMC212319', 'b')
    """
    stem = os.path.splitext(os.path.basename(name))[0]
    video, pmc = re.match(r"(.{11})_(?:roi|image)_", stem), re.match(r"PMC\d+", stem)
    return f"youtube-{video[1]}" if video else pmc[0] if pmc else stem


def listed(value):
    return value if isinstance(value, list) else []


def article(number, image):
    return f"PMC{str(number).removeprefix('PMC')}" if number else group_of(image)


# --- image and caption ------------------------------------------------------------------------------------------------

def quilt1m(root, drop):
    """quilt_1M_lookup.csv; several rows an image. `not_histology` is obeyed, QuiltCleaner's csv too if it is there."""
    impaired, cleaner = {}, Path(root) / "predictions_quiltcleaner.csv"
    if cleaner.is_file():
        rows = table(cleaner, ("Filename", "Any impairment"), drop)
        rows = [r for _, r in rows if re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", r["Any impairment"])]
        impaired = {r["Filename"]: float(r["Any impairment"]) for r in rows}
    columns = ("caption", "image_path", "subset", "split", "pathology", "magnification")
    for n, (where, r) in enumerate(table(Path(root) / "quilt_1M_lookup.csv", columns, drop)):
        if r["caption"].strip().lower() in ("", "nan"):
            drop(where, "no caption")
        elif r.get("not_histology", "0") in ("1", "1.0", "True"):
            drop(where, "not histology, says the set")
        elif impaired.get(r["image_path"], 0) >= 0.5:
            drop(where, "impaired, says QuiltCleaner")
        else:
            topic = re.findall(r"[A-Za-z][\w /&-]*", r["pathology"].replace("nan", ""))
            facts = {"subset": r["subset"], "magnification": r["magnification"]}
            yield {"id": f"quilt1m-{n}", "split": r["split"] if r["split"] in ("train", "val") else "train",
                   "group": group_of(r["image_path"]), "image": r["image_path"], "caption": r["caption"],
                   "topic": topic[0].strip() if topic else None, "facts": facts}


def pathgen(root, drop, side=672):
    """List of {wsi_id, position, caption, file_id}; the region is a file WSI_X_Y.jpg, or cut out of slide WSI.svs."""
    files = sorted(Path(root).glob("PathGen*.json*")) or [Path(root) / "PathGen-1.6M.json"]
    find = finder(root)
    for where, r in (pair for f in files for pair in items(f, drop)):
        slide = r.get("wsi_id") or r.get("WSI_id")                       # the README's code says WSI_id
        position = [str(v) for v in listed(r.get("position"))]
        if not slide or len(position) != 2 or not all(v.isdecimal() for v in position):
            drop(where, "no wsi_id or position")
            continue
        x, y = map(int, position)
        record = {"id": f"pathgen-{slide}-{x}-{y}", "group": slide[:12] if slide.startswith("TCGA-") else slide,
                  "image": f"{slide}_{x}_{y}.jpg", "caption": r.get("caption"),
                  "facts": {"wsi_id": slide, "x": x, "y": y}}
        try:
            path = None if find(record["image"]) else find(f"{slide}.svs")
            if path:
                record["_bytes"] = cut(path, x, y, side)
        except ValueError as error:
            drop(where, "the region cannot be cut out", error)
            continue
        yield record


@functools.lru_cache(maxsize=4)                                         # regions of a slide mostly follow each other
def slide_of(path):
    """-> (function (x, y, side) -> PIL image, (width, height)) of level 0; without openslide only small slides."""
    try:
        import openslide
    except ImportError:
        if image_problem(path):
            raise ValueError(f"{path}: a whole slide needs openslide: pip install 'nanopatho[data]'") from None
        image = Image.open(path).convert("RGB")
        return lambda x, y, side: image.crop((x, y, x + side, y + side)), image.size
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise ValueError(f"{path}: {error}; fetch it again") from error
    return lambda x, y, side: slide.read_region((x, y), 0, (side, side)).convert("RGB"), slide.dimensions


def cut(path, x, y, side):
    """Square region of a slide's level 0 -> PNG bytes; ValueError outside of it."""
    region, (width, height) = slide_of(path)
    if x + side > width or y + side > height:
        raise ValueError(f"{path}: {side} px at {x}, {y} leave the slide of {width} x {height}")
    file = io.BytesIO()
    region(x, y, side).save(file, "PNG")
    return file.getvalue()


def pathcap(root, drop):
    """data.json of PubMed panels. The name of the image field differs between versions of the file."""
    for n, (where, r) in enumerate(items(Path(root) / "data.json", drop)):
        keys = ("image", "img", "image_name", "file_name", "figure_fn")
        name = next((r[k] for k in keys if isinstance(r.get(k), str)), None)
        if name is None:
            drop(where, "no field names the image", ", ".join(map(str, r)))
            continue
        yield {"id": f"pathcap-{n}", "group": article(r.get("pmc_id"), name), "image": name,
               "caption": r.get("caption")}


def pmc_oa(root, drop):
    """{"image": "PMC212319_Fig3_4.jpg", "caption": …} a line. All of medicine: the filters look for histology."""
    name = next((f for f in ("pmc_oa.jsonl", "pmc_oa_beta.jsonl") if (Path(root) / f).is_file()), "pmc_oa.jsonl")
    for n, (where, r) in enumerate(items(Path(root) / name, drop)):
        image = str(r.get("image") or "")
        yield {"id": f"pmc_oa-{n}", "group": article(r.get("pmcid"), image), "image": image,
               "caption": r.get("caption")}


def arch(root, drop):
    """captions.json {"0": {caption, letter, uuid, figure_id}}; letter other than "Single": the caption is the whole
    figure's, the panel is told in facts. 35 captions of the books have no image."""
    parts = [p for p in ("books_set", "pubmed_set") if (Path(root) / p).is_dir()] or ["books_set"]
    for part in parts:
        images = {p.stem: f"{part}/images/{p.name}" for p in sorted((Path(root) / part / "images").glob("*"))}
        for where, r in items(Path(root) / part / "captions.json", drop):
            uuid, caption = str(r.get("uuid")), str(r.get("caption"))
            figure = r.get("figure_id") or hashlib.sha256(caption.encode("utf-8", "replace")).hexdigest()[:16]
            yield {"id": f"arch-{uuid}", "group": f"arch-{part}-{figure}", "caption": r.get("caption"),
                   "image": images.get(uuid, f"{part}/images/{uuid}.png"),
                   "facts": {"set": part, "panel": r.get("letter") or "Single"}}


# --- conversations and questions --------------------------------------------------------------------------------------

def quilt_instruct(root, drop):
    """LLaVA's form {id, image, conversations: [{from, value}]}. The image mark may stand before or behind the question,
    or lack; here it opens the first user turn."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for n, (where, r) in enumerate(items(Path(root) / "quilt_instruct_107k.json", drop)):
        turns = r.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(t, dict) and t.get("from") in list(roles) for t in turns):
            drop(where, "conversations are not a list of human and gpt turns")
            continue
        text = lambda t: str(t.get("value") or "").replace("<image>", "").strip()
        messages = [{"role": roles[t["from"]], "content": text(t)} for t in turns]
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None or messages[-1]["role"] != "assistant":
            drop(where, "no question, or no answer at the end")
            continue
        first["content"] = "<image>" + first["content"]
        image = str(r.get("image") or "")
        yield {"id": f"quilt_instruct-{n}", "split": "train", "group": group_of(image), "image": image,
               "messages": messages, "task": "conversation" if len(messages) > 2 else "reasoning"}


def answered(question, answer):
    """Question and answer as text -> fields of a record: yes/no becomes a choice of two, the rest stays open."""
    said = re.fullmatch(r"\s*(yes|no)\b[.,!]?\s*", answer, re.I) if isinstance(answer, str) else None
    if said:
        letter = "A" if said[1].lower() == "yes" else "B"
        return {"question": question, "options": ["yes", "no"], "answer": letter, "task": "mcq"}
    return {"question": question, "answer": answer}


def vqa(root, drop, source, split_of, more=lambda row: {}):
    """Parquet rows image {bytes, path}, question, answer -> records; rows on one image share a group."""
    for n, (where, row, name) in enumerate(parquet(root, "data/*.parquet")):
        image = row.get("image") or {}
        if not isinstance(image, dict) or not image.get("bytes"):
            drop(where, "no image in the row")
            continue
        group = group_of(image.get("path") or "")
        if not group.startswith("youtube-"):
            group = f"{source}-{hashlib.sha256(image['bytes']).hexdigest()[:16]}"
        yield {"id": f"{source}-{n}", "split": split_of(name), "group": group, "_bytes": image["bytes"],
               **answered(row.get("question"), row.get("answer")), "facts": {"row": n, **more(row)}}


def pathvqa(root, drop):
    """Splits train, validation, test as published."""
    yield from vqa(root, drop, "pathvqa", lambda name: {"tr": "train", "va": "val"}.get(name[:2], "test"))


def quilt_vqa(root, drop):
    """One split, called train on the hub: it is the test set."""
    yield from vqa(root, drop, "quilt_vqa", lambda name: "test", lambda r: {"answer_type": str(r.get("answer_type"))})


def choice(options, answer):
    """Lettered options and an answer -> (options without letters, letter of the answer or None).

    Only an option's own leading letter is cut: "B) Cytomegalovirus (CMV) infection" keeps its inner brackets. An answer
    may be a bare letter, a lettered option or an option's text; a letter and a text that disagree are no answer.

    >>> choice(["A) fat", "B) mucin (pool)"], "B")
    (['fat', 'mucin (pool)'], 'B')
    """
    texts = [re.sub(rf"^\s*{letter}\s*[).:]\s*", "", str(o), flags=re.I).strip() for o, letter in zip(options, LETTERS)]
    same = lambda text: [letter for letter, t in zip(LETTERS, texts) if t.lower() == text.strip().lower()]
    lettered = re.fullmatch(r"\s*([A-J])\s*(?:[).:]\s*(.*))?", str(answer or ""), re.I | re.S)
    if lettered and lettered[1].upper() in LETTERS[:len(texts)]:
        letter = lettered[1].upper()
        return texts, letter if not lettered[2] or letter in same(lettered[2]) else None
    found = same(str(answer or ""))
    return texts, found[0] if len(found) == 1 else None


def pathmmu(root, drop):
    """data[Subset][split]; "ALL" of the papers is test + test_tiny: facts.pool tells them apart. Atlas and PathCLS have
    their picture under source_img, in the set they were made from."""
    find = finder(root)
    for where, subset, pool, n, r in pathmmu_items(Path(root) / "data.json", drop):
        options, letter = choice(listed(r.get("options")), r.get("answer"))
        if letter is None:
            drop(where, "the answer is no option, or its letter and text disagree", r.get("answer"))
            continue
        source = str(r.get("source_img") or "")
        book, image = re.match(r"books_set/images/(.+)\.", source), pick(find, r.get("img"), source)
        group = f"tweet-{r['tw_id']}" if r.get("tw_id") else f"arch-{book[1]}" if book else group_of(image)
        yield {"id": f"pathmmu-{subset}-{pool}-{n}", "split": "val" if pool == "val" else "test", "group": group,
               "image": image, "question": r.get("question"), "options": options, "answer": letter, "task": "mcq",
               "facts": {"subset": subset, "pool": pool, "source_img": source, "explanation": r.get("explanation")}}


def pathmmu_items(path, drop):
    """-> generator of (where, subset, pool, number, item)."""
    for key, pools in items(path, drop):
        for pool, rows in pools.items():
            if not isinstance(rows, list):
                drop(f"{key}.{pool}", "not a list of questions")
            for n, item in enumerate(listed(rows)):
                for where, r in kept(f"{key}.{pool}[{n}]", item, drop):
                    yield where, key.rpartition(": ")[2], pool, n, r


def pick(find, *names):
    """The first of the names that has a file, else the first name."""
    names = [n for n in names if isinstance(n, str) and n]
    for name in names:
        try:
            if find(name):
                return name
        except ValueError:                                               # told by convert, if no other name has a file
            continue
    return names[0] if names else ""


def medxpertqa_mm(root, drop):
    """MM/{dev,test}.jsonl. The stem repeats its options behind "Answer Choices:"; options are a list or an object, the
    label a letter or a list of one; up to six images a question."""
    paths = [p for p in sorted((Path(root) / "MM").glob("*.jsonl")) if p.stem in ("dev", "test")]
    for path in paths or [Path(root) / "MM" / "test.jsonl"]:
        for where, r in items(path, drop):
            options, label = r.get("options"), r.get("label")
            label = label[0] if isinstance(label, list) and len(label) == 1 else label
            try:
                pairs = dict(options if isinstance(options, dict) else ((o["letter"], o["content"]) for o in options))
                images = [i if isinstance(i, str) else i["image_path"] for i in r["images"]]
                letters = sorted(pairs)
                answer = LETTERS[letters.index(label)]
            except (KeyError, TypeError, ValueError):
                drop(where, "options, label or images are not in the published form", f"{options}, {label}")
                continue
            stem, _, rest = str(r.get("question") or "").rpartition("\nAnswer Choices:")
            yield {"id": f"medxpertqa-{r.get('id')}", "split": "val" if path.stem == "dev" else "test",
                   "group": f"medxpertqa-{r.get('id')}", "image": images if len(images) > 1 else (images or [""])[0],
                   "question": (stem or rest).strip(), "options": [pairs[k] for k in letters], "answer": answer,
                   "task": "mcq", "facts": {k: r.get(k) for k in ("medical_task", "body_system", "question_type")}}


def omnimedvqa(root, drop):
    """QA_information/*/*.json; microscopy only. Keys vary in case, one entry says modality for modality_type."""
    base = next((d for d in (Path(root) / "OmniMedVQA", Path(root)) if (d / "QA_information").is_dir()), Path(root))
    files = sorted((base / "QA_information").glob("*/*.json")) or [base / "QA_information" / "Open-access" / "*.json"]
    for path in files:
        for where, raw in items(path, drop):
            r = {str(k).lower(): v for k, v in raw.items()}
            if "microscop" not in str(r.get("modality_type") or r.get("modality") or "").lower():
                drop(where, "not microscopy")
                continue
            options = [str(r[k]) for k in ("option_a", "option_b", "option_c", "option_d") if r.get(k)]
            same = [i for i, o in enumerate(options) if o.strip().lower() == str(r.get("gt_answer")).strip().lower()]
            if len(same) != 1:
                drop(where, "the answer is not exactly one of the options", r.get("gt_answer"))
                continue
            image = str(r.get("image_path") or "")
            yield {"id": f"omnimedvqa-{r.get('dataset')}-{r.get('question_id')}", "split": "test",
                   "group": f"omnimedvqa-{image}", "image": image, "question": r.get("question"), "options": options,
                   "answer": LETTERS[same[0]], "task": "mcq", "license": path.parent.name,
                   "facts": {"dataset": r.get("dataset"), "question_type": r.get("question_type")}}
