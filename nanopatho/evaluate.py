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

qa answers a whole benchmark, resumable and over several processes: benchmark.py.
"""
import argparse
import collections
import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, rewards
from .chat import IMAGE, PROMPTS, ChatTokenizer
from .data import LETTERS, Images, check_images, image_paths, question_text, read_records, vlm_batch
from .faithful import MAX_PIXELS, caption_claims, check_facts, faithfulness, heatmap, read_lexicon     # noqa: F401
from .generate import generate
from .grpo import group_advantages
from .log import run_main, write_json
from .metrics import blind, interval, paired_gain                    # noqa: F401  (names that others import from here)
from .vlm import PathoVLM

ELSEWHERE = {"clip": "nanopatho.evaluate_clip", "judge": "nanopatho.judge", "page": "nanopatho.eval_page"}


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
        from .benchmark import qa
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
