"""Records on disk: write them, check them, and make them from a folder of real images.

The rules of the format stand in nanopatho/data.py (check_record), because training applies them too; here they are
applied to a whole file with its images, and every problem is told with file, line, id, field, value and fix.

folder(): images sorted into one folder a class (ImageFolder) -> the record files that the four scripts read. What is
made from a label alone is poor: captions are one sentence, the reasoning names the label. It shows the way for real
data; it is no teacher. """

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

from data_prep.archives import SUFFIXES
from nanopatho.chat import ChatTokenizer, render, train_tokenizer
from nanopatho.data import LETTERS, DataError, check_record, question_text, read_records
from nanopatho.image import ImageError, open_image


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
    """What the record can be used for, judged by its fields: "sft", "question" (a choice), "caption", "any" (an open
    question, or a picture with its class in facts), or None."""
    if "question" in record and "options" not in record and "messages" not in record:
        return "any"
    for field, use in (("messages", "sft"), ("options", "question"), ("caption", "caption"), ("facts", "any")):
        if field in record:
            return use
    return None


def lines(path, problem):
    """JSONL -> generator of (where, record, byte offset of the line), in constant memory but for the ids.

    A record that is not in order goes to problem(where, why, value), and the rest goes on.
    """
    path, seen, at = Path(path), {}, 0
    if not path.is_file():
        problem(str(path), "no such file; give the path of a .jsonl file")
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where, start, at = f"{path}:{number}", at, at + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                problem(where, f"not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8")
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                problem(where, f"not valid JSON ({error}); one object a line is needed")
                continue
            if not isinstance(record, dict):
                problem(where, "one JSON object a line is needed", str(record))
                continue
            faults = faults_of(record)
            where, ident = f"{where} id={record.get('id')}", str(record.get("id"))
            if ident in seen:
                faults.append(("", f"field 'id' was already used on line {seen[ident]}; make ids unique"))
            seen[ident] = number
            for value, fault in faults:
                problem(where, fault, value)
            if not faults:
                yield where, record, start
    if not seen:
        problem(str(path), "holds no records; was it written to the end?")


def strings(value):
    """Every text inside a value of JSON."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def faults_of(record):
    """-> list of (value, what is wrong with a field), by the rules of nanopatho.data and of plain text."""
    use, faults = use_of(record), []
    if use is None:
        faults.append(("", "has none of the fields caption, messages, question, facts; add the one you train on"))
    for name in ("image", "answer") if use == "any" and "question" in record else ("image",) if use == "any" else ():
        if not record.get(name):
            faults.append(("", f"field '{name}' is missing"))
    for name, fault in check_record(record, use or "any"):
        faults.append((str(record.get(name))[:80], f"field '{name}' {fault}"))
    for name, value in record.items():
        for text in strings(value):
            if "\0" in text or text.encode("utf-8", "replace").decode() != text:  # lone surrogate: bytes of no UTF-8
                faults.append(("", f"field '{name}' holds a NUL byte or bytes that are no UTF-8; make it plain text"))
                break
    return faults


def with_images(path, problem):
    """JSONL file or shard folder -> generator of (where, record, paths of its images); those of a shard are temporary
    files that last until the next record."""
    if not (path / "index.json").is_file():
        for where, record, _ in lines(path, problem):
            yield where, record, [path.parent / name for name in names_of(record)]
        return
    from data_prep import shards
    with tempfile.TemporaryDirectory() as folder:
        for _, where, record, members in shards.read(path, lambda text: problem(path, text)):
            for value, fault in faults_of(record):
                problem(where, fault, value)
            for name, data in members.items():
                (Path(folder) / name).write_bytes(data)
            yield where, record, [Path(folder) / Path(name).name for name in names_of(record)]
            for name in members:
                (Path(folder) / name).unlink()


def validate(path, groups=None):
    """Check every line and every image of a JSONL file or shard folder -> list of problems as text, [] if in order.

    groups: {group: split}, kept over several files, so that a group in two splits (leakage) is found.
    """
    problems, groups, path = [], {} if groups is None else groups, Path(path)

    def problem(where, why, value=""):
        problems.append(f"{where}: {why}" + (f"; it is {value!r}" if value else ""))
    for where, record, images in with_images(path, problem):
        for name in images:
            try:
                open_image(name)
            except ImageError as error:
                problem(where, f"field 'image': {error}")
        if record.get("group") and record.get("split"):
            other = groups.setdefault(record["group"], record["split"])
            if other != record["split"]:
                problem(where, f"field 'group' {record['group']!r} is in {other} and in {record['split']}: that leaks; "
                               "split by group (python -m data_prep split)")
    return problems


def show(record, tokenizer, mark=("\033[32m", "\033[0m")):
    """A record as the model reads it, trained tokens between `mark` (green): the rule is nanopatho.chat.render's."""
    marks = "<image>" * len(names_of(record))
    if "messages" in record:
        messages, kind = record["messages"], "chat"
    elif "question" in record:
        text = question_text(record) if "options" in record else marks + record["question"]
        messages, kind = [{"role": "user", "content": text}], "prompt"
    else:
        messages, kind = [{"role": "user", "content": marks},
                          {"role": "assistant", "content": record.get("caption", "")}], "text"
    images = sum(m["content"].count("<image>") for m in messages)
    ids, trained = render(messages, tokenizer, [1] * images, kind=kind, where=record["id"])
    out = []
    for keep, run in itertools.groupby(zip(ids, trained), key=lambda pair: pair[1]):
        text = tokenizer.tokenizer.decode([i for i, _ in run], skip_special_tokens=False)
        out.append(f"{mark[0]}{text}{mark[1]}" if keep else text)
    return "".join(out)


def samples(path, count, model=""):
    """The first `count` records of a JSONL file as show() writes them; without colour where the output is no terminal.

    model: folder with a tokenizer.json; without one, a tokenizer is trained on the texts of the first records.
    """
    path, found = Path(path), []
    if count and path.is_file():
        found = [r for _, r, _ in itertools.islice(lines(path, lambda *_: None), max(count, 100))]
    if not found:
        return []
    texts = (t for r in found for t in strings({k: v for k, v in r.items() if k != "facts"}))
    tokenizer = ChatTokenizer.load(model) if model else train_tokenizer(texts, 400)
    mark = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[trained: ", "]")
    return [show(r, tokenizer, mark) for r in found[:count]]


# ---------------------------------------------------------------- an output with a card beside it

class Card:
    """Counts what is kept and dropped while an output is written -> FOLDER/card.json, dropped.jsonl.

    files: what it is made from; the cards beside them are kept under "funnel", so the last card tells the whole way.
    """

    def __init__(self, folder, files=(), **more):
        for file in files:
            if not Path(file).is_file():
                raise DataError(f"{file}: no such file; give the path of a .jsonl file")
        cards = dict.fromkeys(Path(f).parent / "card.json" for f in files)
        self.folder, self.seen = Path(folder), {"images": set(), "groups": set()}
        self.data = {**more, "made_from": [str(f) for f in files], "records": 0, "images": 0, "groups": 0,
                     "sources": {}, "licenses": {}, "splits": {}, "uses": {}, "cells": {}, "dropped": {},
                     "funnel": [json.loads(c.read_text(encoding="utf-8")) for c in cards if c.is_file()]}

    def __enter__(self):
        self.file = open(self.folder / "dropped.jsonl", "w", encoding="utf-8")
        return self

    def __exit__(self, kind, error, trace):
        self.file.close()
        if kind is None:
            text = json.dumps(self.data, indent=1, ensure_ascii=False)
            (self.folder / "card.json").write_text(text, encoding="utf-8")

    def drop(self, where, why, value=""):
        kind = re.sub(r"(?<![-\w])\d+(?:,\d+)*", "N", why.split(" (")[0])   # counted by kind, told in full
        self.data["dropped"][kind] = self.data["dropped"].get(kind, 0) + 1
        self.file.write(json.dumps({"where": str(where), "why": why, "value": str(value)[:200]}) + "\n")

    def count(self, record):
        cell = " | ".join(str(record.get(k, "-")) for k in ("subfield", "level", "task"))
        for name, value in (("sources", record.get("source")), ("licenses", record.get("license")), ("cells", cell),
                            ("splits", record.get("split")), ("uses", use_of(record))):
            self.data[name][value or "not told"] = self.data[name].get(value or "not told", 0) + 1
        self.seen["images"].update(map(hash, names_of(record)))
        self.seen["groups"].add(hash(record.get("group")))
        self.data.update(records=self.data["records"] + 1, **{k: len(v) for k, v in self.seen.items()})

    def told(self):
        """-> the card in a few lines of text."""
        d = self.data
        line = lambda name: ", ".join(f"{k} {v:,}" for k, v in sorted(d[name].items(), key=lambda kv: -kv[1]))
        return (f"{d['records']:,} records, {d['images']:,} images, {d['groups']:,} groups; splits: {line('splits')}\n"
                f"  subfield | level | task: {line('cells')}\n  licenses: {line('licenses')}"
                + (f"\n  dropped, each told in dropped.jsonl: {line('dropped')}" if d["dropped"] else ""))


@contextlib.contextmanager
def new_folder(out, begun=None):
    """-> a folder beside `out` to write into, renamed to `out` when all is done: there is no half output. DataError if
    something is there already. begun: what the output follows from; the folder of a call that was killed is then kept,
    and given again to a call with the same."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty; remove it or choose another --out")
    part = out.parent / f".{out.name}.part"
    mark, text = part / "begun.json", json.dumps(begun)
    if begun is None or not mark.is_file() or mark.read_text() != text:
        shutil.rmtree(part, ignore_errors=True)                          # of a call that was killed
    part.mkdir(parents=True, exist_ok=True)
    mark.write_text(text)
    try:
        yield part
    except BaseException:
        if begun is None:
            shutil.rmtree(part)
        raise
    mark.unlink()
    if out.exists():
        out.rmdir()
    os.replace(part, out)


def names_of(record):
    """The images of a record as a list."""
    return [record["image"]] if isinstance(record.get("image"), str) else record.get("image") or []


def renamed(record, names):
    """The record with other names for its images, in the form it had."""
    return {**record, "image": names[0] if isinstance(record["image"], str) else names} if names else record


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
