"""A benchmark: every question of a file answered, scored and put into tables, with a journal that survives kills.

    python -m nanopatho.evaluate qa --model runs/demo/dapo --data data/tiny --samples 8 --loglik text --out runs/demo/qa

writes OUT/journal-RANK.jsonl while it works, one line a batch. Batches are made by length over all questions, and
each has a random state of its own, so neither a kill nor the number of processes (RANK, WORLD_SIZE, as torchrun sets
them) changes a digit: the same command goes on, and the last to finish writes results.json, items.jsonl, report.html.
Options and what the numbers mean: evaluate.py.
"""
import collections
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import checkpoint, metrics, rewards
from .chat import IMAGE
from .data import LETTERS, DataError, Images, check_images, image_paths, read_records
from .evaluate import judge, load, prompts, say
from .faithful import check_facts, read_lexicon
from .log import ConfigError
from .metrics import interval
from .packed import answer_logps, training_rows

GROUPS = ("subset", "pool", "level", "subfield", "topic", "kind")


def read_benchmark(path):
    """A JSONL file of questions -> records with "_kind": "choice" (options and a letter), "closed" (yes or no, with or
    without options) or "open" (no options). DataError names what cannot be asked."""
    records, problems = read_records(path), []
    for r in records:
        for field in ("question", "answer"):
            if not r.get(field):
                problems.append(f"{r['_where']}: field '{field}' is missing (needed for a question)")
        said = r.get("options") or [str(r.get("answer")).strip().rstrip(".")]
        closed = {str(x).lower() for x in said} <= {"yes", "no"}
        r["_kind"] = "closed" if closed else "choice" if r.get("options") else "open"
    if problems:
        raise DataError(f"{len(problems)} problem(s) in {path}:\n" + "\n".join(problems[:20]))
    return records


def as_choice(record):
    """A question that one of several options answers, with its options; None for an open one."""
    if record["_kind"] == "closed" and not record.get("options"):
        no = record["answer"].strip().lower().startswith("no")
        return {**record, "options": ["yes", "no"], "answer": "AB"[no]}
    return record if record.get("options") else None


@torch.no_grad()
def option_logps(model, tokenizer, records, replies, form, prompt, images, max_pixels):
    """log p of every option inside <answer>, after the reasoning of `replies` -> for each record [(log p, tokens), …].

    form "letter" or "text": what stands for an option. Nothing is parsed: also a reply that was cut off gets a choice.
    What the options have in common (the reasoning, "<answer>") is not counted. The prompt is computed once for all.
    """
    batch, groups, starts = prompts(model, tokenizer, records, prompt, images, max_pixels), [], []
    G = max(len(r["options"]) for r in records)
    for b, (record, reply) in enumerate(zip(records, replies)):
        head = reply.partition("<answer>")[0].replace(IMAGE, "")
        head += "</think>" * ("<think>" in head and "</think>" not in head)
        shown = LETTERS[:len(record["options"])] if form == "letter" else record["options"]
        said = [(*tokenizer.encode(f"{head}<answer>{x}</answer>"), tokenizer.end_id) for x in shown]
        starts.append(len(os.path.commonprefix(said)))
        ids = torch.full((G, max(map(len, said))), tokenizer.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, tokens in enumerate(said):
            ids[i, :len(tokens)], mask[i, :len(tokens)] = torch.tensor(tokens), True
        groups.append(dict(prompt=batch["input_ids"][b][batch["attention_mask"][b].bool()].cpu(), ids=ids, mask=mask,
                           logps=torch.zeros(mask.shape), advantages=torch.zeros(G)))
    if "pixel_values" in batch:                                      # all pictures stand with the first group
        groups[0] |= {"pixels": batch["pixel_values"], "grid": batch["image_grid_thw"]}
    row = {name: v.to(batch["input_ids"].device) for name, v in training_rows(groups, tokenizer.pad_id, G).items()}
    logps = answer_logps(model, row, banned=tokenizer.banned_ids).double().cpu().view(len(records), G, -1)
    return [[(float(lp[i, start:].sum()), int(g["mask"][i].sum()) - start) for i in range(len(r["options"]))]
            for r, lp, g, start in zip(records, logps, groups, starts)]


@torch.no_grad()
def answer_batch(model, tokenizer, records, c, images, seed):
    """All that a model says to some questions -> journal entries {"id", "greedy", "samples", "loglik", "blind"}."""
    batch = prompts(model, tokenizer, records, c.prompt, images, c.max_pixels)
    if "pixel_values" in batch:                                      # once for the greedy and the sampled answers
        batch["image_embeds"] = model.visual(batch.pop("pixel_values"), batch["image_grid_thw"])
    limit = dict(max_new_tokens=c.max_new_tokens)
    greedy = say(model, tokenizer, batch, temperature=0.0, **limit)
    entries = [{"id": r["id"], "greedy": g[0]} for r, g in zip(records, greedy)]
    if c.samples:
        generator = torch.Generator(device=batch["input_ids"].device).manual_seed(seed)
        for entry, group in zip(entries, say(model, tokenizer, batch, c.samples, temperature=c.temperature,
                                             generator=generator, **limit)):
            entry["samples"] = group
    some = [(e, as_choice(r)) for e, r in zip(entries, records) if c.loglik and as_choice(r)]
    if some:
        found = option_logps(model, tokenizer, [r for _, r in some], [e["greedy"][0] for e, _ in some], c.loglik,
                             c.prompt, images, c.max_pixels)
        for (entry, _), scores in zip(some, found):
            entry["loglik"] = scores
    if c.without_image:
        batch = prompts(model, tokenizer, [{**r, "image": None} for r in records], c.prompt, images, c.max_pixels)
        for entry, group in zip(entries, say(model, tokenizer, batch, temperature=0.0, **limit)):
            entry["blind"] = group[0]
    return entries


def unreadable(text, cut, bare=False):
    """Why no answer could be read from a text."""
    if cut:
        return "cut off at --max_new_tokens"
    n = text.count("<answer>")
    if n != 1 or text.count("</answer>") != 1:
        return ("no <answer> block", "an <answer> block that is not closed", "several <answer> blocks")[min(n, 2)]
    if not bare and text.count("<think>") != 1:
        return "no <think> block, or several"
    if not rewards.parse_response(text).format_ok and not bare:
        return "an empty block, or text outside the blocks"
    return "the answer names no option, or more than one"


def lenient(text, options):
    """The option that a text names if tags may lack: behind the last <answer>, else </think>, else in all of it."""
    tail = text.rpartition("<answer>" if "<answer>" in text else "</think>")[2]
    return rewards.choice(tail.partition("</answer>")[0].strip(), options)


def score_item(record, entry, blind_points, lexicon, bare=False):
    """Record and journal entry -> a line of items.jsonl; "numbers" holds what is averaged, all in 0..1."""
    asked, numbers, (text, cut) = as_choice(record), {}, entry["greedy"]
    row = {name: record.get(name) for name in ("id", "source", "question", "options", "answer")}
    row |= {name: record.get(name) or (record.get("facts") or {}).get(name) for name in GROUPS}  # subset, pool
    row |= {"kind": record["_kind"], "image": image_paths(record) if record.get("image") else [], "text": text,
            "why": None, "numbers": numbers}
    if not asked:
        response = rewards.parse_response("<think>none</think>" * bare + text)
        given = response.answer if response.format_ok else None
        overlap = metrics.token_scores(given or "", record["answer"])
        numbers |= {"f1": overlap["f1"], "recall": overlap["recall"], "open_unreadable": float(given is None)}
        return {**row, "why": unreadable(text, cut, bare) if given is None else None, "given": given}
    right, options = LETTERS.index(asked["answer"]), asked["options"]
    judged = judge(text, asked, lexicon, bare)
    row |= {"chosen": judged["chosen"], "claims": [dict(zip(("attribute", "value", "start", "end", "true"), x))
                                                   for x in judged["claims"]]}
    if judged["chosen"] is None:
        row["why"] = unreadable(text, cut, bare)
    numbers |= {"accuracy": float(judged["correct"]), "unreadable": float(judged["chosen"] is None),
                "lenient": float(lenient(text, options) == right)}
    if entry.get("samples"):
        chosen = [judge(t, asked, {}, bare)["chosen"] for t, _ in entry["samples"]]
        k, hits = len(chosen), chosen.count(right)
        vote, share = metrics.majority(chosen, right)
        row |= {"samples": [t for t, _ in entry["samples"]], "sampled_choices": chosen, "share": share}
        numbers |= {"sampled": hits / k, "sampled_unreadable": chosen.count(None) / k, "majority": vote}
        numbers |= {f"pass@{n}": metrics.pass_at_k(hits, k, n) for n in (2, 4, 8, 16, 32, 64) if n <= k}
    if "loglik" in entry:
        for name, values in (("loglik", [lp for lp, _ in entry["loglik"]]),
                             ("loglik_per_token", [lp / n for lp, n in entry["loglik"]])):
            numbers[name] = float(int(np.argmax(values)) == right)
    if "blind" in entry:
        numbers["without_image"] = float(judge(entry["blind"][0], asked, {}, bare)["correct"])
    return {**row, "numbers": numbers | {f"blind: {name}": float(v) for name, v in blind_points.items()}}


def tabulate(items, sizes=None):
    """Lines of items.jsonl -> {"overall": {number: {"value", "ci", "n"}}, "by_subset": {name: the same}, …,
    "size_weighted", "calibration", "why"}. sizes: published number of items a subset, see metrics.size_weighted."""
    def cell(rows):
        names = dict.fromkeys(name for r in rows for name in r["numbers"])
        columns = {name: [r["numbers"][name] for r in rows if name in r["numbers"]] for name in names}
        return {name: dict(zip(("value", "ci"), interval(v)), n=len(v)) for name, v in columns.items()}

    out = {"n": len(items), "overall": cell(items)}
    for name in GROUPS:
        parts = collections.defaultdict(list)
        for r in items:
            parts[str(r.get(name) or "?")].append(r)
        if len(parts) > 1:
            out[f"by_{name}"] = {key: cell(rows) for key, rows in sorted(parts.items())}
    for name in ("accuracy", "sampled", "loglik") if "by_subset" in out else ():
        parts = collections.defaultdict(list)
        for r in items:
            if name in r["numbers"]:
                parts[str(r["subset"] or "?")].append(r["numbers"][name])
        known = sizes if sizes and parts.keys() <= sizes.keys() else None
        if parts:
            value, ci = metrics.size_weighted(parts, known)
            out.setdefault("size_weighted", {})[name] = {"value": value, "ci": ci, "weights": known or "items here"}
    shares = [(r["share"], r["numbers"]["majority"]) for r in items if "share" in r]
    if shares:
        out["calibration"] = metrics.calibration(*zip(*shares))
    out["why"] = dict(collections.Counter(r["why"] for r in items if r["why"]).most_common())
    return out


def compare(before, after):
    """Lines of items.jsonl of two runs on the same questions -> {number: paired test}, for accuracy also by subset."""
    one, two = ({r["id"]: r for r in rows} for rows in (before, after))
    differ = [i for i in one.keys() | two.keys() if i not in one or i not in two or any(
        one[i][f] != two[i][f] for f in ("question", "options", "answer"))]
    if differ:
        raise ConfigError(f"--compare: {len(differ)} of {len(one | two)} questions are not the same in both runs "
                          f"(first {sorted(differ)[:3]}); run both on the same file")

    def test(name, ids):
        ids = [i for i in ids if name in one[i]["numbers"] and name in two[i]["numbers"]]
        return metrics.paired_test(*([x[i]["numbers"][name] for i in ids] for x in (one, two))) if ids else None

    out = {name: test(name, one) for name in ("accuracy", "sampled", "majority", "loglik", "f1", "recall")}
    subsets = sorted({r["subset"] for r in before if r["subset"]})
    out |= {f"accuracy, {s}": test("accuracy", [i for i in one if one[i]["subset"] == s]) for s in subsets}
    return {name: t for name, t in out.items() if t}


# --- the journal: killed at any moment, resumed to the same digit -----------------------------------------------------


def fingerprint(folder):
    """What tells one model's weights from another's without reading 16 GB: names, sizes, last 1 MB of each file."""
    from .weights import find_folder
    digest = hashlib.sha256()
    for path in sorted([*find_folder(folder).glob("config.json"), *find_folder(folder).glob("*.safetensors")]):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def read_journal(out, settings):
    """All journals in OUT -> {number of the batch: entries}; ConfigError where one was written with other settings."""
    done = {}
    for path in sorted(Path(out).glob("journal-*.jsonl")):
        for n, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):        # the rest was cut off by a kill
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {n}: not JSON ({error}); remove the file to go on") from error
            old = row.get("settings", settings)
            differ = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in settings.items() if old.get(k) != v]
            if differ:
                raise ConfigError(f"{path} holds answers with other settings: {'; '.join(differ)}. Give the old ones "
                                  f"to go on, choose another --out, or remove {out}.")
            if "batch" in row:
                done[row["batch"]] = row["entries"]
    return done


def journal_file(out, rank, settings):
    """Journal of one process, open for appending behind its last complete line."""
    file = open(Path(out) / f"journal-{rank}.jsonl", "ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    if not os.path.getsize(file.name):
        file.write(json.dumps({"settings": settings}).encode() + b"\n")
        file.flush()
    return file


def answer_all(load, records, c, out, settings, images=None, rank=0, world=1):
    """Answer this process's share of the batches that no journal holds yet -> {id: entry}, or None while another
    process is not finished. load() -> (model, tokenizer), called only if there is something to do."""
    def length(r):                                                   # letters and pixels: near enough to tokens
        sides = [math.prod(Image.open(path).size) for path in (image_paths(r) if r.get("image") else ())]
        letters = len("".join([r["question"], *(r.get("options") or ())]))
        return letters + sum(min(n, c.max_pixels) // 200 for n in sides)

    images, lengths = images or Images(), list(map(length, records))
    order = sorted(range(len(records)), key=lambda i: (lengths[i], i))
    size = max(1, c.rows // max(1, c.samples))
    batches = [[records[i] for i in order[at:at + size]] for at in range(0, len(order), size)]
    done = read_journal(out, settings)
    todo = [b for b in range(rank, len(batches), world) if b not in done]
    if todo:
        model, tokenizer = load()
        model.eval()
        with journal_file(out, rank, settings) as file:
            for b in tqdm(todo, desc="answers", unit="batch", dynamic_ncols=True):
                entries = answer_batch(model, tokenizer, batches[b], c, images, seed=c.seed * 1_000_003 + b)
                file.write(json.dumps({"batch": b, "entries": entries}, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        done = read_journal(out, settings)
    missing = len(batches) - len(done)
    if missing:
        print(f"process {rank} of {world} has finished; {missing} batches are still with others. The last to finish "
              "writes the tables, or a later call of the same command without RANK.")
        return None
    return {e["id"]: e for entries in done.values() for e in entries}


def read_items(folder):
    """OUT/items.jsonl of an evaluation -> list of its lines."""
    path = Path(folder) / "items.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `python -m nanopatho.evaluate qa --out {folder}` writes it")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reference(benchmark):
    """The published table of a benchmark from reference.json, or None. Not run here: to be read beside."""
    tables = json.loads((Path(__file__).parent / "reference.json").read_text(encoding="utf-8"))["tables"]
    return next((t for t in tables if t["benchmark"] == benchmark), None)


def qa(c):
    """The command `qa`: answer, judge, count, write OUT; c: the parsed command line."""
    path = Path(c.data) if c.data.endswith(".jsonl") else Path(c.data) / f"{c.pool}.jsonl"
    records, out = read_benchmark(path)[:c.items or None], Path(c.out or Path(c.model) / f"qa-{path.stem}")
    lexicon = read_lexicon(path.parent)
    check_images(records), check_facts(records, lexicon)
    source = reference(c.benchmark)
    if c.benchmark and not source:
        raise ConfigError(f"--benchmark {c.benchmark}: not in nanopatho/reference.json; look there for the names")
    other = read_items(c.compare) if c.compare else None
    clean = [{k: v for k, v in r.items() if k not in ("_root", "_where")} for r in records]
    with checkpoint.reading(c.model, "--model"):
        settings = {name: getattr(c, name) for name in ("prompt", "samples", "temperature", "loglik", "without_image",
                                                        "max_new_tokens", "max_pixels", "rows", "seed", "dtype")}
        settings |= {"model": fingerprint(c.model),
                     "questions": hashlib.sha256(json.dumps(clean, sort_keys=True).encode()).hexdigest()[:16]}
    out.mkdir(parents=True, exist_ok=True)
    entries = answer_all(lambda: load(c), records, c, out, settings, rank=int(os.environ.get("RANK", 0)),
                         world=int(os.environ.get("WORLD_SIZE", 1)))
    if entries is None:
        return
    asked = [as_choice(r) for r in records if as_choice(r)]
    train = [as_choice(r) for r in read_benchmark(c.train) if as_choice(r)] if c.train else None
    guesses = (metrics.blind_each(train, asked) if train else metrics.blind_without_training(asked)) if asked else {}
    points = {r["id"]: {name: v[i] for name, v in guesses.items()} for i, r in enumerate(asked)}
    items = [score_item(r, entries[r["id"]], points.get(r["id"], {}), lexicon, c.prompt == "bare") for r in records]
    results = {"model": str(c.model), "questions": str(path), "settings": settings, "reference": source,
               **tabulate(items, (source or {}).get("sizes"))}
    if other:
        results["compare"] = {"with": str(c.compare), **compare(other, items)}
    for name, text in (("items.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items)),
                       ("results.json", json.dumps(results, indent=1, ensure_ascii=False))):
        part = out / f"{name}.{os.getpid()}"                         # two processes may finish at the same moment
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)
    from . import eval_page
    print(eval_page.as_text(results), f"the page: {eval_page.write(out, c.compare)}", sep="\n")
