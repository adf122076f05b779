"""Records on disk: write them, check them, and make them from a folder of real images.

The rules of the format stand in nanopatho/data.py (check_record), because training applies them too; here they are
applied to a whole file with its images, and every problem is told with file, line, id, field, value and fix.

folder(): images sorted into one folder a class (ImageFolder) -> the record files that the four scripts read. What is
made from a label alone is poor: captions are one sentence, the reasoning names the label. It shows the way for real
data; it is no teacher. """

import json
import os
import random
import shutil
from pathlib import Path

from nanopatho.data import check_record, image_paths, read_records
from nanopatho.image import ImageError, open_image

LETTERS = "ABCDEFGHIJ"
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


def read(path):
    """A JSONL file -> list of records; nanopatho.data.DataError lists what is wrong."""
    return read_records(path, "any")


def write(path, records):
    """Records -> JSONL, complete or not at all."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(part, path)


def use_of(record):
    """What the record can be used for, judged by the fields it has: "sft", "question", "caption", or None."""
    for field, use in (("messages", "sft"), ("question", "question"), ("options", "question"), ("caption", "caption")):
        if field in record:
            return use
    return None


def validate(path):
    """Check every line and every image of a JSONL file -> list of problems as text, [] if it is in order."""
    path, problems, seen, groups = Path(path), [], {}, 0
    if not path.is_file():
        return [f"{path}: no such file; give the path of a .jsonl file"]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        groups += 1
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                            f"one object a line is needed")
            continue
        if not isinstance(record, dict):
            problems.append(f"{path}:{number}: holds {line[:40]!r}; one JSON object a line is needed")
            continue
        where, use = f"{path}:{number} id={record.get('id')}", use_of(record)
        if use is None:
            problems.append(f"{where}: has none of the fields caption, messages, question; add the one you train on")
        for field, problem in check_record(record, use or "any"):
            problems.append(f"{where}: field '{field}' {problem}; it is {str(record.get(field))[:80]!r}")
        if record.get("id") in seen:
            problems.append(f"{where}: field 'id' was already used on line {seen[record['id']]}; make ids unique")
        seen[record.get("id")] = number
        names = [record.get("image")] if isinstance(record.get("image"), str) else record.get("image")
        if isinstance(names, list) and all(isinstance(n, str) for n in names):
            for name in image_paths({**record, "_root": str(path.parent)}):
                try:
                    open_image(name)
                except ImageError as error:
                    problems.append(f"{where}: field 'image': {error}")
    return problems if groups else [f"{path}: holds no records; was it written to the end?"]


# ---------------------------------------------------------------- a folder of real images

CAPTIONS = ["{subfield} image of {label}.", "{label}, {subfield}.", "{subfield}: this tile shows {label}.",
            "{label} in a {subfield} image."]
DISTRACTORS = ["bone marrow", "brain tissue", "retina", "placenta"]     # give your own if a class may hold one of these


def split_groups(groups, seed, shares=(0.15, 0.15)):
    """Whole groups to val and test, never single images (neighbouring tiles leak): {group: "train"|"val"|"test"}.

    groups: {group: number of images}. Test is filled first, then val, with random groups until each has its share of
    the images; with two groups there is no val, with one only train.
    """
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    split, total = {}, sum(groups.values())
    for name, share in zip(("test", "val"), shares):
        held = 0
        while order and len(order) > 1 and held < share * total:
            group = order.pop()
            split[group], held = name, held + groups[group]
    return {**{g: "train" for g in order}, **split}


def folder(images, out, *, labels=None, subfield="H&E", topic="", distractors=None, seed=0, copy=True):
    """images/<class>/<group>_….jpg -> out/{captions,sft,rl,val,test}.jsonl, images/, lexicon.json, card.json.

    labels: {class folder: what to call it}; distractors: names for wrong options where there are fewer than four
    classes (they are never right, so a blind guess among two classes is right every second time). ValueError names
    what is wrong, before anything is written.
    """
    images, out, rng = Path(images), Path(out), random.Random(seed)
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; it should hold one folder of images a class")
    found = {d.name: sorted(p for p in d.iterdir() if p.suffix.lower() in SUFFIXES)
             for d in sorted(images.iterdir()) if d.is_dir()}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise ValueError(f"{images}: holds no folder with images ({', '.join(sorted(SUFFIXES))}); "
                         f"sort them into one folder a class")
    unknown = set(labels or {}) - set(found)
    if unknown:
        raise ValueError(f"labels names {', '.join(sorted(unknown))}, but the class folders are {', '.join(found)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; remove it or choose another --out")
    called = {name: (labels or {}).get(name, name.replace("_", " ")) for name in found}
    if len(set(called.values())) < len(called):
        raise ValueError(f"labels: two classes have the same name: {called}")
    problems = []
    for path in (p for files in found.values() for p in files):
        try:
            open_image(path)
        except ImageError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} image(s) cannot be used:\n" + "\n".join(problems))

    counts = {}
    for path in (p for files in found.values() for p in files):
        counts[path.name.split("_")[0]] = counts.get(path.name.split("_")[0], 0) + 1
    split = split_groups(counts, seed)
    pools = {name: [] for name in ("captions", "sft", "rl", "val", "test")}
    extra = [d for d in (distractors or DISTRACTORS) if d not in called.values()]
    out.mkdir(parents=True, exist_ok=True)
    for name, files in found.items():
        (out / "images" / name).mkdir(parents=True, exist_ok=copy)
        for path in files:
            if copy:
                shutil.copy2(path, out / "images" / name / path.name)
            label, group = called[name], path.name.split("_")[0]
            base = {"id": f"{name}/{path.stem}", "source": images.name, "split": split[group], "group": group,
                    "image": f"images/{name}/{path.name}" if copy else os.path.relpath(path, out), "subfield": subfield,
                    **({"topic": topic} if topic else {}), "facts": {"tissue": label}}
            caption = rng.choice(CAPTIONS).format(label=label, subfield=subfield)
            question = f"{subfield}{', ' + topic if topic else ''}. Which tissue?"
            wrong = [c for c in called.values() if c != label]
            others = rng.sample(wrong, min(3, len(wrong)))
            options = [label, *others, *rng.sample(extra, min(len(extra), 3 - len(others)))]
            rng.shuffle(options)
            answer = LETTERS[options.index(label)]
            asked = {**base, "question": question, "options": options, "answer": answer, "level": "easy", "task": "mcq"}
            if split[group] != "train":
                pools[split[group]].append({**(asked if len(called) > 1 else base), "caption": caption})
                continue
            pools["captions"].append({**base, "caption": caption, "morphology": label})
            if len(called) > 1:
                lines = "\n".join([question, *(f"{LETTERS[i]}. {o}" for i, o in enumerate(options))])
                pools["rl"].append(asked)
                pools["sft"].append({**asked, "messages": [
                    {"role": "user", "content": "<image>" + lines},
                    {"role": "assistant", "content": f"<think>I see {label}.</think><answer>{answer}</answer>"}]})
    for name, records in pools.items():
        rng.shuffle(records)
        if records:
            write(out / f"{name}.jsonl", records)
    (out / "lexicon.json").write_text(json.dumps({subfield: {"tissue": {c: [c] for c in called.values()}}}, indent=1))
    card = {"source": str(images), "labels": called, "groups": {g: [split[g], n] for g, n in sorted(counts.items())},
            "pools": {name: len(records) for name, records in pools.items()}}
    (out / "card.json").write_text(json.dumps(card, indent=1))
    return card
