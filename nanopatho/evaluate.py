"""Evaluation of question answering: accuracy with intervals, claims inside <think>, blind baselines, samples to see.

    python -m nanopatho.evaluate --model runs/demo/dapo --data data/tiny --pool test      # one JSON on the screen
    python -m nanopatho.evaluate qa --model runs/demo/dapo --data data/tiny --samples 8 --loglik text --out runs/demo/qa
    python -m nanopatho.evaluate qa … --compare runs/other/qa        # paired tests against another run
    python -m nanopatho.evaluate clip|faithful|judge|page --help

Greedy accuracy is one answer a question, sampled accuracy the mean over k answers at temperature 1. An answer that
cannot be read counts as wrong, is never guessed, and its rate is told. Intervals are 95 % bootstrap intervals over questions
(2,000 resamples, fixed seed): the k samples of a question stay together, since they are not independent. Claims are
findings named in <think>, compared with the facts of the drawn image: precision = true claims / all claims, recall =
share of the image's findings that were named correctly, contradiction = share of answers whose reasoning concludes with
another option than the one answered.

qa writes OUT/journal-RANK.jsonl while it works, one line a batch. Batches are made by length over all questions, and
each has a random state of its own, so neither a kill nor the number of processes (RANK, WORLD_SIZE, as torchrun sets
them) changes a digit: the same command goes on, and the last to finish writes results.json, items.jsonl, report.html.
"""
import argparse
import collections
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import checkpoint, metrics, rewards
from .chat import IMAGE, PROMPTS, ChatTokenizer
from .data import LETTERS, DataError, Images, check_images, image_paths, question_text, read_records, vlm_batch
from .faithful import MAX_PIXELS, caption_claims, check_facts, faithfulness, heatmap, read_lexicon     # noqa: F401
from .generate import generate
from .grpo import group_advantages
from .log import ConfigError, run_main, write_json
from .metrics import blind, interval, paired_gain                    # noqa: F401  (names that others import from here)
from .packed import answer_logps, training_rows
from .vlm import PathoVLM

ELSEWHERE = {"clip": "nanopatho.evaluate_clip", "judge": "nanopatho.judge", "page": "nanopatho.eval_page"}
GROUPS = ("subset", "pool", "level", "subfield", "topic", "kind")


def ask(record, prompt="cot"):
    """Record -> the row vlm_batch turns into a prompt. prompt: a name in PROMPTS, or the system turn's own text."""
    if record.get("image") and record.get("options"):
        text = question_text(record)
    else:                                                            # an open question, or no image to look at
        lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(record.get("options") or ())]
        text = IMAGE * len(image_paths(record) if record.get("image") else ()) + "\n".join([record["question"], *lines])
    return record, [{"role": "system", "content": PROMPTS.get(prompt, prompt)},
                    {"role": "user", "content": text}], "prompt"


def prompts(model, tokenizer, records, prompt, images, max_pixels):
    """Records -> the tensors of their prompts, left-padded, on the model's device."""
    batch = vlm_batch([ask(r, prompt) for r in records], tokenizer, model.config, images=images, max_pixels=max_pixels)
    batch.pop("labels")
    return {name: v.to(next(model.parameters()).device) for name, v in batch.items() if v is not None}


def say(model, tokenizer, batch, k=1, **more):
    """k answers to each prompt -> list of lists (k) of (text, was it cut off at the limit?)."""
    made = generate(model, **batch, group_size=k, eos_token_ids=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id,
                    banned_token_ids=tokenizer.banned_ids, **more)
    ended = (torch.isin(made.ids, torch.tensor(tokenizer.eos_ids, device=made.ids.device)) & made.mask).any(1).tolist()
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(made.ids.cpu(), made.mask.cpu())]
    texts = [(text, not end) for text, end in zip(texts, ended)]
    return [texts[i:i + k] for i in range(0, len(texts), k)]


@torch.no_grad()
def answers(model, tokenizer, records, *, k=1, temperature=0.0, max_new_tokens=96, prompt="cot", rows=128, seed=0,
            images=None, max_pixels=MAX_PIXELS, title="evaluate"):
    """k answers to each record -> list (records) of lists (k) of text. Questions of one size are batched, `rows` answers
    at a time; the image and the prompt are computed once for their k answers."""
    images = images or Images()
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    was_training, out, per_batch = model.training, [], max(1, rows // k)
    model.eval()
    for at in tqdm(range(0, len(records), per_batch), desc=title, unit="batch", leave=False):
        batch = prompts(model, tokenizer, records[at:at + per_batch], prompt, images, max_pixels)
        out += [[text for text, _ in group] for group in say(model, tokenizer, batch, k, max_new_tokens=max_new_tokens,
                                                             temperature=temperature, generator=generator)]
    model.train(was_training)
    return out


def judge(text, record, lexicon, bare=False):
    """One answer -> dict: correct, format, length (words), claims [(attribute, value, start, end, true)], recall, …

    bare: no reasoning was asked for, so an <answer> block alone is in order too.
    """
    response = rewards.parse_response(text)
    if bare and not response.format_ok:                              # the same strict reading, with a reasoning put before
        response = rewards.parse_response("<think>none</think>" + text)._replace(thinking="")
    chosen = rewards.choice(response.answer, record["options"]) if response.format_ok else None
    out = dict(correct=chosen is not None and LETTERS[chosen] == record["answer"], format=bool(response.format_ok),
               words=len(text.split()), claims=[], true=0, recall=None, contradiction=None, chosen=chosen)
    phrases = lexicon.get(record.get("subfield"))
    if phrases and record.get("facts"):
        think = text.find("</think>")
        found = rewards.claims(text[:think] if think >= 0 else text, phrases)
        verdicts = rewards.judge_claims(found, record["facts"])
        out["claims"] = [(*claim, verdict) for claim, verdict in zip(found, verdicts)]
        out["true"] = sum(verdicts)
        named = {claim[0] for claim, verdict in zip(found, verdicts) if verdict and not claim[1].startswith("!")}
        out["recall"] = len(named) / len(phrases)
    if chosen is not None and response.thinking:
        out["contradiction"] = bool(rewards.contradicts(response.thinking, chosen, record["options"]))
    return out


def table(records, texts, lexicon, bare=False):
    """Texts (list of lists) of `records` -> numbers with intervals, and per-question accuracies for paired tests."""
    judged = [[judge(t, r, lexicon, bare) for t in group] for r, group in zip(records, texts)]
    accuracy = [float(np.mean([j["correct"] for j in group])) for group in judged]
    flat = [j for group in judged for j in group]
    out = {"accuracy": interval(accuracy), "n": len(records), "k": len(texts[0]) if texts else 0,
           "format": float(np.mean([j["format"] for j in flat])), "words": float(np.mean([j["words"] for j in flat]))}
    named = [(sum(j["true"] for j in g), sum(len(j["claims"]) for j in g)) for g in judged]
    if any(n for _, n in named):
        # A ratio of sums (not a mean of ratios), so the bootstrap resamples questions and divides afterwards.
        pair = np.array(named, dtype=np.float64)
        draw = pair[np.random.default_rng(0).integers(len(pair), size=(2000, len(pair)))].sum(1)
        low, high = np.quantile(draw[:, 0] / np.maximum(draw[:, 1], 1), [0.025, 0.975])
        out["claims"] = (float(pair[:, 0].sum() / pair[:, 1].sum()), [float(low), float(high)])
        out["claims_per_answer"] = float(pair[:, 1].sum() / len(flat))
        out["claim_recall"] = float(np.mean([j["recall"] for j in flat if j["recall"] is not None]))
    clashes = [j["contradiction"] for j in flat if j["contradiction"] is not None]
    out["contradiction"] = float(np.mean(clashes)) if clashes else 0.0
    for name in ("level", "subfield", "topic"):
        groups = collections.defaultdict(list)
        for r, a in zip(records, accuracy):
            groups[r.get(name) or "?"].append(a)
        out[f"by_{name}"] = {key: dict(zip(("accuracy", "ci"), interval(v)), n=len(v)) for key, v in sorted(groups.items())}
    return out, accuracy, judged


def evaluate(model, tokenizer, data, *, pool="test", items=0, samples=8, sample_items=0, max_new_tokens=96, prompt="cot",
             images=None, max_pixels=MAX_PIXELS):
    """The numbers of one stage on one pool -> (dict for results.json, dict of per-question accuracies).

    items / sample_items: number of questions for the greedy / sampled part, 0 = all (the first ones: pools are shuffled).
    """
    records = read_records(f"{data}/{pool}.jsonl", use="question")
    records, lexicon, images = records[:items or None], read_lexicon(data), images or Images()
    options = dict(max_new_tokens=max_new_tokens, prompt=prompt, images=images, max_pixels=max_pixels)
    greedy, greedy_each, _ = table(records, answers(model, tokenizer, records, title=f"{pool} greedy", **options), lexicon,
                                   bare=prompt == "bare")
    out = {"n": len(records), "greedy_accuracy": greedy["accuracy"][0], "greedy_accuracy_ci": greedy["accuracy"][1],
           "format": greedy["format"], "mean_length": greedy["words"]}
    for name in ("by_level", "by_subfield", "by_topic"):
        out[name] = {k: {"greedy_accuracy": v["accuracy"], "ci": v["ci"], "n": v["n"]} for k, v in greedy[name].items()}
    each = {"ids": [r["id"] for r in records], "greedy": greedy_each}
    main = greedy
    if samples:
        some = records[:sample_items or None]
        main, each["sampled"], judged = table(some, answers(
            model, tokenizer, some, k=samples, temperature=1.0, title=f"{pool} x{samples}", **options), lexicon,
            bare=prompt == "bare")
        out.update(sampled_accuracy=main["accuracy"][0], sampled_accuracy_ci=main["accuracy"][1], samples=samples,
                   sampled_n=len(some), sampled_length=main["words"], sampled_format=main["format"],
                   pass_at_k=float(np.mean([any(j["correct"] for j in g) for g in judged])))
    if "claims" in main:                                             # over the sampled answers: what it says, not its best
        out.update(claim_accuracy=main["claims"][0], claim_accuracy_ci=main["claims"][1],
                   claim_recall=main["claim_recall"], claims_per_answer=main["claims_per_answer"],
                   greedy_claim_accuracy=greedy.get("claims", (None,))[0])
    out["contradiction"] = main["contradiction"]
    return out, each


def show_samples(model, tokenizer, data, out, *, questions=6, k=8, max_new_tokens=96, score=None, prompt="cot",
                 images=None, max_pixels=MAX_PIXELS):
    """Write out/samples/questions.json (and .txt): some questions with k answers, reward parts, advantages and claims.

    The same questions in every stage (the first of each level of the validation pool), so that stages compare.
    """
    records, lexicon, images = read_records(f"{data}/val.jsonl", use="question"), read_lexicon(data), images or Images()
    levels = collections.defaultdict(list)
    for r in records:
        levels[r.get("level") or "medium"].append(r)
    chosen = [r for group in zip(*[v[:math.ceil(questions / len(levels))] for _, v in sorted(levels.items())]) for r in group]
    texts = answers(model, tokenizer, chosen, k=k, temperature=1.0, max_new_tokens=max_new_tokens, prompt=prompt,
                    images=images, max_pixels=max_pixels, title="samples")
    out, pages, lines = Path(out), [], []
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for record, group in zip(chosen, texts):
        parts = [score(t, record) for t in group]
        total = torch.tensor([p["reward"] for p in parts])
        advantages = group_advantages(total, k).tolist() if k > 1 else [0.0]
        picture = Path(image_paths(record)[0])
        copy = out / "samples" / f"{record['id'].replace('/', '_')}{picture.suffix}"
        shutil.copyfile(picture, copy)
        rows = []
        for text, part, advantage in zip(group, parts, advantages):
            j = judge(text, record, lexicon)
            rows.append({"text": text, "reward": part["reward"], "parts": {n: v for n, v in part.items() if n != "reward"},
                         "advantage": advantage, "correct": j["correct"],
                         "claims": [dict(zip(("attribute", "value", "start", "end", "true"), c)) for c in j["claims"]]})
        pages.append({key: record.get(key) for key in ("id", "question", "options", "answer", "level", "subfield")}
                     | {"image": f"{out.name}/samples/{copy.name}", "answers": rows,
                        "heatmap": heatmap(model, tokenizer, record, group[0], images, max_pixels=max_pixels)})
        lines += [f"[{record['id']}] {record['question']}  {record['options']}  -> {record['answer']}"]
        lines += [f"   {r['reward']:+.2f} adv {r['advantage']:+.2f}  {r['text']}" for r in rows] + [""]
    (out / "samples" / "questions.json").write_text(json.dumps(pages, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "samples" / "questions.txt").write_text("\n".join(lines), encoding="utf-8")


# --- a benchmark ------------------------------------------------------------------------------------------------------


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


def load(c):
    """Model and tokenizer of --model."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() and c.command else "cpu"
    with checkpoint.reading(c.model, "--model"):
        model = PathoVLM.from_pretrained(c.model, dtype=getattr(torch, c.dtype), device=device)
        return model, ChatTokenizer.load(c.model)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ELSEWHERE:
        return importlib.import_module(ELSEWHERE[argv[0]]).main(argv[1:])
    command = argv.pop(0) if argv and argv[0] in ("qa", "faithful") else ""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of weights (any stage's run folder)")
    add("--data", required=True, help="data folder with the pool; qa also takes a JSONL file")
    add("--pool", default="test", help="name of the JSONL file without its ending")
    add("--items", type=int, default=200 if command == "faithful" else 0, help="first so many questions, 0 = all")
    add("--samples", type=int, default=0 if command else 8, help="answers a question beside the greedy one")
    add("--max_new_tokens", type=int, default=96, help="longest answer")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="bigger images are scaled down")
    add("--prompt", default="cot", help=f"{', '.join(PROMPTS)}, or the text of the system turn")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--out", help="qa, faithful: folder of the results")
    add("--benchmark", default="", help="qa: name of a table in reference.json to print beside")
    add("--train", help="qa: JSONL file of training questions for the blind guessers")
    add("--compare", help="qa: folder of another run's results on the same questions")
    add("--temperature", type=float, default=1.0, help="qa: of the samples")
    add("--loglik", default="", choices=("", "letter", "text"), help="qa: score every option, written so")
    add("--without_image", action="store_true", help="qa: ask again with the image withheld")
    add("--rows", type=int, default=128, help="qa: answers computed at a time")
    add("--seed", type=int, default=0, help="qa: of the samples")
    c = parser.parse_args(argv)
    c.command = command
    for name, least in (("items", 0), ("samples", 0), ("max_new_tokens", 1), ("max_pixels", 3136), ("rows", 1)):
        if getattr(c, name) < least:
            parser.error(f"--{name} {getattr(c, name)}: must be {least} or more")
    if c.prompt not in PROMPTS and " " not in c.prompt:
        parser.error(f"--prompt {c.prompt}: choose from {', '.join(PROMPTS)}, or give a whole sentence")
    if command == "qa":
        return qa(c)
    records = read_records(f"{c.data}/{c.pool}.jsonl", use="question")
    check_images(records), check_facts(records, read_lexicon(c.data))
    model, tokenizer = load(c)
    options = {name: getattr(c, name) for name in ("pool", "items", "max_new_tokens", "prompt", "max_pixels")}
    if command == "faithful":
        results = faithfulness(model, tokenizer, c.data, **options)
        if c.out:
            Path(c.out).mkdir(parents=True, exist_ok=True)
            write_json(Path(c.out) / "faithful.json", results)
    else:
        results, _ = evaluate(model, tokenizer, c.data, samples=c.samples, **options)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_main(main)
