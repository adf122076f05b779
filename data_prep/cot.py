"""Chains of thought for SFT, and questions for RL: one request for each record and cell of the grid, then gates.

    python -m data_prep write clean/captions.jsonl --out data/cot --teacher http://localhost:8000/v1 --name MODEL \\
        --total 500000 --max_cost 200 --price_in 1 --price_out 4 --shard 0/8
    python -m data_prep write clean/captions.jsonl --out data/rl --pool rl --total 10000 --teacher … --name MODEL

The grid is the paper's: 5 subfields x 3 levels (short to long reasoning) x 4 tasks. --total spreads requests evenly
over the subfields, or for --pool rl (multiple choice without reasoning) over the tissue systems, as far as there are
records; levels and tasks are drawn evenly. What is known about an image is its caption and in-line references, or its
facts beside a lexicon.json. teacher.py tells what --teacher can be.

DIR/sft.jsonl or rl.jsonl holds what passed, dropped.jsonl every other reply with its gate, failed.jsonl requests
without an answer (the same command asks them again), card.json the counts, journal.jsonl all answers. A killed command
goes on when it is given again; the other files are written anew when it ends. --shard i/n writes DIR/shard-i-of-n with
a journal of its own and 1/n of the budget; `data_prep split DIR/shard-*/sft.jsonl` joins them.
"""
import argparse
import collections
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
from pathlib import Path

from tqdm import tqdm

from data_prep import records, shards
from data_prep.gates import BANDS, Job, guess_problem, option_problem, read_reply, reply_problem
from data_prep.teacher import BUDGET, SECRET, NoReply, open_teacher, parts, writing_prompt
from nanopatho.chat import IMAGE
from nanopatho.data import CHOICES, LETTERS, DataError, question_text
from nanopatho.endpoint import add_options, count, windowed
from nanopatho.rewards import choice

OURS = {"sft.jsonl", "rl.jsonl", "dropped.jsonl", "failed.jsonl", "card.json", "journal.jsonl", "lexicon.json",
        "zero_shot.json", ".part"}


# --- which records and cells ------------------------------------------------------------------------------------------

def system_of(record):
    """-> the tissue system that topic (counted three times), caption and question name most often, or "other"."""
    text = " ".join([record.get("topic") or ""] * 3 + [record.get("caption") or "", record.get("question") or ""])
    counts = {name: len(re.findall(f"(?<![a-z])(?:{words})", text, re.I)) for name, words in parts("systems").items()}
    return max(counts, key=counts.get) if any(counts.values()) else "other"


def even_shares(counts, total):
    """{class: cells} -> {class: share of them to ask for}, equally many of each class and `total` in all; what a class
    is too small for is left to the others."""
    shares, left = {}, total
    for i, (name, n) in enumerate(sorted(counts.items(), key=lambda item: item[1])):
        part = min(left / (len(counts) - i), n)
        shares[name], left = part / n, left - part
    return shares


def cells_of(record, tasks):
    """-> [(level, task)] that a record can be asked for; a question that it brings along fixes both."""
    if "question" not in record:
        return list(itertools.product(CHOICES["level"], tasks))
    task = "mcq" if "options" in record else "reasoning"
    return [(level, task) for level in ([record["level"]] if "level" in record else CHOICES["level"]) if task in tasks]


def usable(c, problem):
    """Records of all files -> generator of (class, job without a cell)."""
    from nanopatho.faithful import read_lexicon
    for file in map(Path, c.files):
        whole = read_lexicon(file.parent)
        for where, r, _ in records.lines(file, problem):
            lexicon = whole.get(r.get("subfield"), {})
            lexicon = lexicon if set(lexicon) <= set(r.get("facts") or ()) else {}
            source = ". ".join([r.get("caption") or "", *(r.get("inline_ref") or ())]).strip(". ") or "; ".join(
                phrases[r["facts"][a]][0] for a, phrases in lexicon.items() if r["facts"][a] in phrases)
            if r.get("split") in ("val", "test"):
                problem(where, f"is held out ({r['split']})")
            elif not r.get("subfield"):
                problem(where, "has no subfield; data_prep filter finds it")
            elif not source:
                problem(where, "has neither a caption, nor facts beside a lexicon.json, to write from")
            elif not cells_of(r, c.tasks):
                problem(where, "has a question of a kind that --tasks leaves out")
            else:
                yield system_of(r) if c.pool == "rl" else r["subfield"], Job(where, file.parent, r, source, lexicon)


def jobs_of(c, problem, shares):
    """-> generator of the jobs of this shard. shares: of the cells of each class; None: one cell a record."""
    i, n = c.shard
    for kind, job in usable(c, problem if i == 0 else lambda *_: None):  # faults are told once
        cells = cells_of(job.record, c.tasks)
        if int(hashlib.sha256(job.record["id"].encode()).hexdigest()[:8], 16) % n == i:
            rng = random.Random(f"{c.seed}/{job.record['id']}")
            rng.shuffle(cells)
            count = shares[kind] * len(cells) if shares else 1
            yield from (job._replace(cell=cell) for cell in cells[:int(count) + (rng.random() < count % 1)])


# --- from records to records ------------------------------------------------------------------------------------------

def work(job, ask, c):
    """A job -> (job, "kept", turns, "") or (job, "dropped" | "failed" | "left", why, reply)."""
    r, (level, task) = job.record, job.cell
    given = {name: r[name] for name in ("question", "options") if name in r}
    images = [job.root / name for name in records.names_of(r)] if c.images else []
    prompt = writing_prompt(r, job.source, level, task, BANDS[level], sight=c.images, rl=c.pool == "rl")
    try:
        for n in range(c.tries):
            if c.pool == "rl" and "options" in r:                        # nothing is to be written
                right = LETTERS.index(r["answer"])
                reply, turns = "", [{**given, "answer": r["options"][right]}]
                why = option_problem(r["question"], r["options"], right)
            else:
                reply = ask(prompt, images=images, n=n, record=r, level=level, task=task)
                turns, why = read_reply(reply, task, given)
                why = why or reply_problem(turns, job)
            if not why and task == "mcq":
                turn = turns[0]
                right = choice(turn["answer"], turn["options"])
                why = guess_problem(turn["question"], turn["options"], right, ask, c.guesses)
            if not why:
                return job, "kept", turns, ""
    except NoReply as none:
        return job, "left" if str(none) == BUDGET else "failed", str(none), ""
    return job, "dropped", why, reply


def finished(job, turns, c, out):
    """Turns that passed -> a record for train_sft or train_rl; a teacher's options are shuffled."""
    r, (level, task), turn = job.record, job.cell, turns[0]
    image = [os.path.relpath(job.root / name, out) for name in records.names_of(r)]
    kept = ("source", "split", "group", "image", "subfield", "topic", "kind", "license", "facts")
    new = {"id": f"{r['id']}/{level}-{task}", **{k: r[k] for k in kept if k in r}, "level": level, "task": task,
           "written_by": c.name or c.teacher, "question": turn["question"], "answer": turns[-1]["answer"]}
    new = records.renamed(new, image)
    if task == "mcq":
        options = list(turn["options"])
        right = options[choice(turn["answer"], options)]
        if "options" not in r:
            random.Random(f"{c.seed}/{new['id']}").shuffle(options)
        turn["answer"] = new["answer"] = LETTERS[options.index(right)]
        new["options"] = options
    if c.pool == "rl":
        return {**new, "system": system_of(r)}
    asked = [question_text({**new, "image": []}) if task == "mcq" else t["question"] for t in turns]
    said = [f"<think>{t['think'].strip()}</think><answer>{t['answer'].strip()}</answer>" for t in turns]
    messages = [{"role": role, "content": text} for pair in zip(asked, said)
                for role, text in zip(("user", "assistant"), pair)]
    messages[0]["content"] = IMAGE * len(image) + messages[0]["content"]
    return {**new, "messages": messages}


def run(c):
    """The command `write` -> its Card, which is also written to the folder."""
    i, n = c.shard
    out, counts, found = Path(c.out) / f"shard-{i}-of-{n}" if n > 1 else Path(c.out), collections.Counter(), 0
    if out.exists() and set(os.listdir(out)) - OURS:
        raise DataError(f"{out}: holds other files; choose another --out")
    part = out / ".part"
    part.mkdir(parents=True, exist_ok=True)
    for kind, job in usable(c, lambda *_: None):
        counts[kind] += len(cells_of(job.record, c.tasks))
        found += 1
    shares, number = even_shares(counts, c.total) if c.total else None, min(c.total or found, counts.total())
    about = {"pool": c.pool, "teacher": c.teacher, "name": c.name, "cells there": counts, "share asked for": shares,
             "failed": 0, "left": 0}
    with open_teacher(c, out, 1 / n) as (ask, journal), records.Card(part, c.files, **about) as card, \
            open(part / f"{c.pool}.jsonl", "w", encoding="utf-8") as kept, \
            open(part / "failed.jsonl", "w", encoding="utf-8") as failed:
        done = windowed(functools.partial(work, ask=ask, c=c), jobs_of(c, card.drop, shares), c.parallel)
        for job, state, what, reply in tqdm(done, total=round(number / n), desc="write", unit="request"):
            where = " ".join([job.where, *job.cell])
            if state == "kept":
                record = finished(job, what, c, out)
                kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                card.count(record)
            elif state == "dropped":
                card.drop(where, what, reply)
            else:
                card.data[state] += 1
                if state == "failed":
                    failed.write(json.dumps({"where": where, "why": what}) + "\n")
        card.data["spent"] = dict(zip(("requests", "tokens read", "tokens written"), journal.spent if journal else ()))
    for path in part.iterdir():
        os.replace(path, out / path.name)
    part.rmdir()
    for root in {Path(file).parent for file in c.files}:
        shards.copy_beside(root, out)
    return card


def settings(argv=None):
    """Command line -> settings, checked."""
    parser = argparse.ArgumentParser(prog="python -m data_prep write", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", help=".jsonl files of records with a subfield, and a caption or facts")
    add("--out", required=True)
    add("--pool", choices=("sft", "rl"), default="sft", help="reasoning for SFT, or questions for RL")
    add("--teacher", required=True, help="rules, the address of an endpoint up to /v1, or a journal to replay. Texts, "
                                         f"and pictures with --images, leave this machine for it; its key: ${SECRET}")
    add("--name", default="", help="the model's name at the endpoint")
    add("--images", action="store_true", help="send the pictures, too")
    add("--tasks", nargs="+", choices=CHOICES["task"], default=CHOICES["task"], help="for --pool sft")
    add("--total", type=int, default=0, help="requests in all, about (default: one a record)")
    add("--tries", type=count, default=1, help="replies to ask for until one passes the gates")
    add("--guesses", type=int, default=0, help="drop a choice that is guessed so many times without the picture")
    add("--shard", default="0/1", help="i/n: the i-th of n parts, from 0")
    add("--seed", type=int, default=0)
    add("--temperature", type=float, default=0.6)
    add("--max_requests", type=float, default=math.inf, help="budget of all shards together, failures included")
    add("--max_total_tokens", type=float, default=math.inf, help="the same in tokens read and written")
    add_options(parser, max_tokens=4000, max_cost=math.inf, parallel=8)
    add("--attempts", type=count, default=5, help="tries of a request that fails")
    add("--timeout", type=float, default=300.0, help="seconds to wait for the endpoint")
    c = parser.parse_args(argv)
    if not (m := re.fullmatch(r"(\d+)/(\d+)", c.shard)) or int(m[1]) >= int(m[2]):
        raise DataError(f"--shard {c.shard}: write i/n with i from 0 to n - 1")
    if c.teacher != "rules" and not c.name:
        raise DataError("--name: give the model's name at the endpoint (for a replay: that of the recorded run)")
    if c.max_cost < math.inf and not c.price_in + c.price_out > 0:
        raise DataError(f"--max_cost {c.max_cost:g} stops nothing without --price_in and --price_out, the prices of a "
                        "million tokens; give them, or limit --max_requests or --max_total_tokens")
    c.shard, c.tasks = (int(m[1]), int(m[2])), ("mcq",) if c.pool == "rl" else tuple(c.tasks)
    return c


def main(argv=None):
    c = settings(argv)
    card = run(c)
    print(f"{card.folder.parent}: {card.told()}\n  failed: {card.data['failed']:,}, left when the budget was out: "
          f"{card.data['left']:,}, spent: {card.data['spent']}")
