"""The one record format: reading, checking, images, batches. Training code meets data only through this file.

A data folder holds JSONL files, one record a line, and the images beside them (README, "Your own data"). Which fields are
needed depends on the use: stages 0 and 1 read `image` + `caption`, stage 2 `messages`, stage 3 and evaluation `question`,
`options`, `answer`. Every problem is collected and reported with file, line, id, field, value and fix before a step is run.

Letters: B batch, T tokens (padded), P patches over all images of the batch, N images.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch

from .chat import IMAGE, image_tokens, render
from .image import ImageError, open_image, qwen_pixels

LETTERS = "ABCDEFGHIJ"
CHOICES = {"split": ("train", "val", "test"), "level": ("easy", "medium", "hard"),
           "subfield": ("H&E", "IHC", "cytology", "FISH", "gross"),
           "task": ("mcq", "description", "reasoning", "conversation")}
NEEDED = {"caption": ("id", "image", "caption"), "sft": ("id", "image", "messages"),
          "question": ("id", "image", "question", "options", "answer"), "any": ("id",)}


class DataError(ValueError):
    """A data set that cannot be trained on as it is; the message lists what to mend."""


def _kind_problem(name, value):
    """Why `value` cannot be field `name`, or None."""
    text = lambda v: isinstance(v, str) and v.strip()
    if name in ("id", "caption", "question", "answer", "morphology", "topic", "group") and not text(value):
        return "must be a non-empty string"
    if name in CHOICES and value not in CHOICES[name]:
        return f"must be one of {', '.join(CHOICES[name])}"
    if name == "image" and not (text(value) or (isinstance(value, list) and value and all(map(text, value)))):
        return "must be a path, or a list of paths, relative to the folder of the file"
    if name == "facts" and not isinstance(value, dict):
        return "must be an object"
    if name == "options":
        if not (isinstance(value, list) and 2 <= len(value) <= len(LETTERS) and all(map(text, value))):
            return f"must be a list of 2 to {len(LETTERS)} non-empty strings"
        if len({v.strip().lower() for v in value}) < len(value):
            return "holds the same option twice"
    if name == "messages":
        if not (isinstance(value, list) and value and all(
                isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and text(m.get("content"))
                for m in value)):
            return 'must be a list of {"role": "system|user|assistant", "content": "…"}'
        if value[-1]["role"] != "assistant":
            return "must end with an assistant turn (there is nothing to train on otherwise)"
    return None


def check_record(record, use="any"):
    """-> list of (field, problem) for one record. `use`: "caption", "sft", "question" or "any" (whatever is there)."""
    if not isinstance(record, dict):
        return [("", "the line is not a JSON object")]
    problems = [(name, f"is missing (needed for {use})") for name in NEEDED[use] if record.get(name) in (None, "", [])]
    missing = {name for name, _ in problems}
    for name, value in record.items():
        if name not in missing and value is not None:
            problem = _kind_problem(name, value)
            if problem:
                problems.append((name, problem))
    bad = {name for name, _ in problems}
    if "options" in record and "answer" in record and not bad & {"options", "answer"}:
        letters = LETTERS[:len(record["options"])]
        if record["answer"] not in list(letters):                     # a list: "AB" is in "ABCD"
            problems.append(("answer", f"must be one of the letters {', '.join(letters)} of the {len(letters)} options"))
    if "messages" in record and "image" in record and not bad & {"messages", "image"}:
        n = 1 if isinstance(record["image"], str) else len(record["image"])
        marks = sum(m["content"].count(IMAGE) for m in record["messages"])
        if marks != n:
            problems.append(("messages", f"hold {marks} {IMAGE} marks for {n} image(s)"))
    return problems


def read_records(path, use="any", limit=20):
    """Read and check a JSONL file -> list of dicts, each with "_root" (its folder) and "_where" ("file:line id").

    Raises DataError with up to `limit` problems: file, line, id, field, value, and what it must be. Reads nothing lazily:
    a broken last line is found before the first training step.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file. Make one with `python -m data_prep microworld --preset tiny --out "
                        f"{path.parent}` or point --data at a folder with your own records.")
    records, problems, ids = [], [], {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                problems.append(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8")
                continue
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})")
                continue
            where = f"{path}:{number} id={record.get('id') if isinstance(record, dict) else None}"
            for field, problem in check_record(record, use):
                value = record.get(field) if isinstance(record, dict) else record
                problems.append(f"{where}: field '{field}' {problem}; it is {str(value)[:80]!r}")
            if isinstance(record, dict) and isinstance(record.get("id"), str):
                if record["id"] in ids:
                    problems.append(f"{where}: field 'id' was already used on line {ids[record['id']]}; make ids unique")
                ids[record["id"]] = number
                records.append({**record, "_root": str(path.parent), "_where": where})
    if problems:
        more = f"\n… and {len(problems) - limit} more" if len(problems) > limit else ""
        raise DataError(f"{len(problems)} problem(s) in {path}:\n" + "\n".join(problems[:limit]) + more)
    if not records:
        raise DataError(f"{path}: holds no records. Is this the right file, and did writing it finish?")
    return records


def image_paths(record):
    names = [record["image"]] if isinstance(record["image"], str) else record["image"]
    return [os.path.join(record["_root"], name) for name in names]


def check_images(records, limit=20):
    """Open and decode every image once, before training (0.2 ms each at 112 pixels) -> DataError naming all bad ones.

    The header alone would not tell that a file is cut off.
    """
    problems = []
    for r in records:
        for path in image_paths(r) if r.get("image") else []:
            try:
                open_image(path)
            except ImageError as error:
                problems.append(f"{r['_where']}: field 'image': {error}")
    if problems:
        more = f"\n… and {len(problems) - limit} more" if len(problems) > limit else ""
        raise DataError(f"{len(problems)} image(s) cannot be used:\n" + "\n".join(problems[:limit]) + more)


def check_pools(data):
    """Check the question pools that the evaluation after a stage reads: a fault there must not wait for the end.

    All are optional (own data may have none) -> names of those that are there; what that leaves out is printed.
    """
    found = [pool for pool in ("test", "val", "test_combo", "test_stain") if os.path.isfile(f"{data}/{pool}.jsonl")]
    for pool in found:
        check_images(read_records(f"{data}/{pool}.jsonl", use="question"))
    for pool, use in (("test", "accuracy after training"), ("val", "sample answers to look at")):
        if pool not in found:
            print(f"{data}/{pool}.jsonl is not there: no {use}")
    return found


class Images:
    """Decoded images by path, kept in memory up to `keep_bytes`; None: a quarter of what is free, shared out over this
    machine's processes, of which each has `workers`. The tiny world: 16,000 x 112 x 112 x 3 = 0.6 GB; most of the time in
    which a batch is made goes into decoding (0.45 of 0.8 ms for a picture of 224 pixels)."""

    def __init__(self, keep_bytes=None, workers=1):
        if keep_bytes is None:
            known = "SC_AVPHYS_PAGES" in os.sysconf_names                # not on a Mac
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 4 << 30
            keep_bytes = free // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // max(1, workers)
        self.kept, self.room = {}, keep_bytes

    def __call__(self, record):
        """-> list of uint8 arrays (H, W, 3), one per image of the record."""
        out = []
        for path in image_paths(record):
            array = self.kept.get(path)
            if array is None:
                try:
                    array = np.asarray(open_image(path))
                except ImageError as error:
                    raise DataError(f"{record['_where']}: field 'image': {error}") from error
                if self.room >= array.nbytes:
                    self.kept[path], self.room = array, self.room - array.nbytes
            out.append(array)
        return out


def load_images(records, images=None):
    """First image of each record -> uint8 (N, H, W, 3) if all have one size, else a list."""
    images = images or Images(0)
    arrays = [images(r)[0] for r in records]
    return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays


def augment(array, rng):
    """One of the eight symmetries of the square: tissue has no up and no left. uint8 (..., H, W, 3) -> same, H = W kept."""
    k, flip = int(rng.integers(4)), bool(rng.integers(2))
    if array.shape[-3] != array.shape[-2]:
        k = k // 2 * 2                                               # keep the shape of a rectangle: only half turns
    array = np.rot90(array, k, axes=(-3, -2))
    return array[..., ::-1, :] if flip else array


def question_text(record):
    """The user turn of a multiple-choice question: image mark, question, lettered options, one a line."""
    lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(record["options"])]
    n = 1 if isinstance(record["image"], str) else len(record["image"])
    return IMAGE * n + "\n".join([record["question"], *lines])


def vlm_batch(rows, tokenizer, config, *, images, rng=None, min_pixels=3136, max_pixels=1280 * 28 * 28):
    """Rows of one batch -> tensors of the forward pass, right-padded.

    rows: list of (record, messages, kind); kind "text" renders messages as raw text (stage 1), "chat" with the template,
    "prompt" with the template and an open assistant turn (sampling, left-padded so that all prompts end together).
    rng: numpy Generator for augmentation, None = none. Returns dict: input_ids (B, T) long, labels (B, T) long (-100 = not
    trained), attention_mask (B, T) long, pixel_values (P, 588) uint8 or None, image_grid_thw (N, 3) long or None.
    """
    arrays, counts = [], []
    for record, _, _ in rows:
        found = images(record) if record.get("image") else []
        if rng is not None:
            found = [augment(a, rng) for a in found]
        arrays += found
        counts.append(len(found))
    pixels, grid = qwen_pixels(arrays, min_pixels, max_pixels, raw=True) if arrays else (None, None)
    per_image = image_tokens(grid, config["vision_config"]["spatial_merge_size"]) if arrays else []
    sequences, at = [], 0
    for (record, messages, kind), n in zip(rows, counts):
        sequences.append(render(messages, tokenizer, per_image[at:at + n], kind=kind, where=record.get("_where", "")))
        at += n
    left, T = rows[0][2] == "prompt", max(len(ids) for ids, _ in sequences)
    ids = torch.full((len(rows), T), tokenizer.pad_id)
    labels, mask = torch.full((len(rows), T), -100), torch.zeros(len(rows), T, dtype=torch.long)
    for b, (tokens, trained) in enumerate(sequences):
        span = slice(T - len(tokens), T) if left else slice(0, len(tokens))
        ids[b, span], mask[b, span] = torch.tensor(tokens), 1
        labels[b, span] = torch.tensor([t if keep else -100 for t, keep in zip(tokens, trained)])
    return dict(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid)


def pack_rows(batches, length, most=lambda rows: rows):
    """Batches of one sample each (vlm_batch) -> batches of one row each: samples end to end, no padding, none cut.

    First fit, longest first: a sample goes into the first row that then has at most `length` tokens, else into a new
    one (so a longer sample is alone in its row). A further key is documents (n,) long, the samples' lengths.
    Losses and gradients of all rows add up to those of all samples. most: number of rows here -> number on the process
    that has most; every process needs as many, so rows are split.
    """
    size = lambda samples: sum(b["input_ids"].shape[1] for b in samples)
    rows = []
    for sample in sorted(batches, key=lambda b: -size([b])):
        row = next((row for row in rows if size([*row, sample]) <= length), None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    for _ in range(most(len(rows)) - len(rows)):
        row = max(rows, key=len)
        rows.append([row.pop() for _ in range(len(row) // 2)])
    packed = []
    for row in rows:
        parts = {name: [b[name] for b in row if b[name] is not None] for name in row[0]}
        out = {name: torch.cat(p, 0 if name in ("pixel_values", "image_grid_thw") else 1) if p else None
               for name, p in parts.items()}
        out["documents"] = sizes = torch.tensor([size([b]) for b in row])
        out["labels"][0, sizes.cumsum(0) - sizes] = -100                 # nothing before it predicts a first token
        packed.append(out)
    return packed


def caption_row(record, field="caption"):
    """Stage 1: image and caption as raw text, without a chat template (as LLaMA-Factory's pretraining stage does)."""
    return record, [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": record[field]}], "text"


def shuffled(n, batch, rng):
    """Endless index batches: every record once an epoch, order drawn anew each time; n < batch repeats."""
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(n)])
        yield order[:batch]
        order = order[batch:]


def curriculum(records, steps, batch, rng, start=(0.6, 0.3, 0.1), end=(0.25, 0.35, 0.4)):
    """Stage 2's order: for each step the indices of a batch; the mix of levels moves from `start` to `end` (easy, medium,
    hard), and inside a level every (subfield, topic) cell has the same expected share.

    The paper names the three levels and the mix by subfield and topic (Patho-R1, overview figure); the schedule is ours.
    """
    cells = {}
    for i, r in enumerate(records):
        level = CHOICES["level"].index(r.get("level") or "medium")
        cells.setdefault(level, {}).setdefault((r.get("subfield"), r.get("topic")), []).append(i)
    levels = sorted(cells)
    for step in range(steps):
        p = step / max(1, steps - 1)
        weight = np.array([(1 - p) * start[level] + p * end[level] for level in levels])
        picked = rng.choice(len(levels), size=batch, p=weight / weight.sum())
        out = []
        for level in picked:
            groups = list(cells[levels[level]].values())
            group = groups[rng.integers(len(groups))]
            out.append(group[rng.integers(len(group))])
        yield np.array(out)
