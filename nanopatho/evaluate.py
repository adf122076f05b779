"""Evaluation of question answering: accuracy with intervals, claims inside <think>, blind baselines, samples to look at.

    python -m nanopatho.evaluate --model runs/demo/dapo --data data/tiny --pool test

Greedy accuracy is one answer a question, sampled accuracy the mean over k answers at temperature 1. An answer that cannot be
read counts as wrong. Intervals are 95 % bootstrap intervals over questions (2,000 resamples, fixed seed): the k samples of a
question stay together, since they are not independent. Claims are findings named in <think>, compared with the facts of the
drawn image: precision = true claims / all claims, recall = share of the image's findings that were named correctly,
contradiction = share of answers whose reasoning concludes with another option than the one answered.
"""
import argparse
import collections
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, rewards
from .chat import IMAGE, PROMPTS, ChatTokenizer
from .data import LETTERS, DataError, Images, check_images, image_paths, question_text, read_records, vlm_batch
from .generate import generate
from .grpo import group_advantages
from .log import run_main
from .vlm import PathoVLM


def interval(values, resamples=2000, seed=0):
    """Mean of per-question values and its 95 % bootstrap interval -> (mean, [low, high]); NaN-free list of floats."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return float("nan"), [float("nan")] * 2
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    return float(values.mean()), [float(x) for x in np.quantile(means, [0.025, 0.975])]


def paired_gain(before, after, resamples=2000, seed=0):
    """Mean of after - before over the same questions and its 95 % bootstrap interval."""
    return interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), resamples, seed)


def ask(record, prompt="cot"):
    """Record -> the row vlm_batch turns into a prompt."""
    return record, [{"role": "system", "content": PROMPTS[prompt]},
                    {"role": "user", "content": question_text(record)}], "prompt"


@torch.no_grad()
def answers(model, tokenizer, records, *, k=1, temperature=0.0, max_new_tokens=96, prompt="cot", rows=128, seed=0,
            images=None, title="evaluate"):
    """k answers to each record -> list (records) of lists (k) of text. Questions of one size are batched, `rows` answers
    at a time; the image and the prompt are computed once for their k answers."""
    images, device = images or Images(), next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    was_training, out, per_batch = model.training, [], max(1, rows // k)
    model.eval()
    for at in tqdm(range(0, len(records), per_batch), desc=title, unit="batch", leave=False):
        batch = vlm_batch([ask(r, prompt) for r in records[at:at + per_batch]], tokenizer, model.config, images=images)
        batch.pop("labels")
        batch = {name: v.to(device) for name, v in batch.items() if v is not None}
        made = generate(model, **batch, group_size=k, max_new_tokens=max_new_tokens, temperature=temperature,
                        eos_token_ids=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id,
                        banned_token_ids=tokenizer.banned_ids, generator=generator)
        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(made.ids.cpu(), made.mask.cpu())]
        out += [texts[i:i + k] for i in range(0, len(texts), k)]
    model.train(was_training)
    return out


def read_lexicon(data):
    """The phrases by which findings are named, written by data_prep; {} for a data folder without one."""
    path = Path(data) / "lexicon.json"
    if not path.is_file():
        return {}
    try:
        lexicon = json.loads(path.read_text(encoding="utf-8"))
        phrases = [p for attributes in lexicon.values() for values in attributes.values() for p in values.values()]
    except (ValueError, AttributeError) as error:                    # not JSON; a list or a text where an object belongs
        raise DataError(f'{path}: must be {{subfield: {{attribute: {{value: [phrases]}}}}}} ({error}); mend it, or remove '
                        'it to go without claims') from error
    wrong = [p for p in phrases if not (isinstance(p, list) and p and all(isinstance(x, str) and x for x in p))]
    if wrong:
        raise DataError(f"{path}: {str(wrong[0])[:80]!r} stands where a list of phrases belongs")
    return lexicon


def check_facts(records, lexicon):
    """Facts must know every attribute that the lexicon of their subfield names, else a claim about it cannot be judged."""
    for r in records:
        missing = set(lexicon.get(r.get("subfield"), ())) - set(r.get("facts") or lexicon.get(r.get("subfield"), ()))
        if missing:
            raise DataError(f"{r['_where']}: field 'facts' lacks {', '.join(sorted(missing))}, which lexicon.json names for "
                            f"subfield {r['subfield']}; add the value, or leave 'facts' out of the record")


def judge(text, record, lexicon, bare=False):
    """One answer -> dict: correct, format, length (words), claims [(attribute, value, start, end, true)], recall, …

    bare: no reasoning was asked for, so an <answer> block alone is in order too.
    """
    response = rewards.parse_response(text)
    if bare and not response.format_ok:                              # the same strict reading, with a reasoning put before
        response = rewards.parse_response("<think>none</think>" + text)._replace(thinking="")
    chosen = rewards.choice(response.answer, record["options"]) if response.format_ok else None
    out = dict(correct=chosen is not None and LETTERS[chosen] == record["answer"], format=bool(response.format_ok),
               words=len(text.split()), claims=[], true=0, recall=None, contradiction=None)
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
             images=None):
    """The numbers of one stage on one pool -> (dict for results.json, dict of per-question accuracies).

    items / sample_items: number of questions for the greedy / sampled part, 0 = all (the first ones: pools are shuffled).
    """
    records = read_records(f"{data}/{pool}.jsonl", use="question")
    records, lexicon, images = records[:items or None], read_lexicon(data), images or Images()
    options = dict(max_new_tokens=max_new_tokens, prompt=prompt, images=images)
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


@torch.no_grad()
def caption_claims(model, tokenizer, data, items, images=None):
    """Stage 1's yardstick: captions written for held-out images, their findings checked -> dict for results.json."""
    path, lexicon = Path(data) / "test.jsonl", read_lexicon(data)
    if not path.is_file() or not lexicon:
        return {}
    records, images, texts = read_records(path)[:items], images or Images(), []
    records = [r for r in records if r.get("image") and r.get("facts") and r.get("subfield") in lexicon]
    if not records:                                                  # n in the results tells how many could be judged
        return {}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    for at in range(0, len(records), 64):
        rows = [(r, [{"role": "user", "content": IMAGE * len(image_paths(r))}], "text") for r in records[at:at + 64]]
        batch = vlm_batch(rows, tokenizer, model.config, images=images)
        batch.pop("labels")
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
        batch = {name: v.to(device) for name, v in batch.items()}
        made = generate(model, **batch, max_new_tokens=64, temperature=0.0, eos_token_ids=tokenizer.eos_ids,
                        pad_token_id=tokenizer.pad_id, banned_token_ids=tokenizer.banned_ids)
        texts += [tokenizer.decode(ids[mask]) for ids, mask in zip(made.ids.cpu(), made.mask.cpu())]
    model.train(was_training)
    precision, recall, per_finding = [], [], collections.defaultdict(list)
    for record, text in zip(records, texts):
        found = rewards.claims(text, lexicon[record["subfield"]])
        verdicts = rewards.judge_claims(found, record["facts"])
        precision += verdicts
        named = {c[0] for c, v in zip(found, verdicts) if v}
        for attribute in lexicon[record["subfield"]]:
            recall.append(attribute in named)
            per_finding[f"{record['subfield']} {attribute}"].append(attribute in named)
    value, ci = interval(precision) if precision else (None, None)  # no finding named: no number, and JSON knows no NaN
    return {"claim_accuracy": value, "claim_accuracy_ci": ci, "claim_recall": float(np.mean(recall)), "n": len(records),
            "by_finding": {k: float(np.mean(v)) for k, v in sorted(per_finding.items())},
            "examples": [{"id": r["id"], "caption": t, "facts": r["facts"]} for r, t in zip(records[:4], texts)]}


def blind(train, test):
    """What a guesser without eyes gets on `test` -> {"random", "most_frequent_letter", "longest_option", "text_only"}.

    text_only is a naive Bayes over (word of question, word of option) pairs, fitted on the training questions `train`:
    the strongest cheap cue a text-only model could pick up.
    """
    letters = collections.Counter(r["answer"] for r in train).most_common(1)
    frequent = letters[0][0] if letters else "A"
    counts = collections.defaultdict(lambda: np.ones(2))
    words = lambda r, i: {(f"{r['question']}", w) for w in r["options"][i].lower().split()} | {("", f"at{i}")}
    for r in train:
        for i in range(len(r["options"])):
            for pair in words(r, i):
                counts[pair][int(LETTERS[i] == r["answer"])] += 1
    total = np.array([1.0, 1.0]) + sum((np.array([len(r["options"]) - 1, 1.0]) for r in train), np.zeros(2))
    guess = lambda r: LETTERS[int(np.argmax([sum(math.log(c[1] / total[1]) - math.log(c[0] / total[0]) for c in (
        counts[p] for p in words(r, i) if p in counts)) for i in range(len(r["options"]))]))]
    share = lambda f: float(np.mean([f(r) == r["answer"] for r in test]))
    return {"random": float(np.mean([1 / len(r["options"]) for r in test])),
            "most_frequent_letter": share(lambda r: frequent),
            "longest_option": share(lambda r: LETTERS[int(np.argmax([len(o) for o in r["options"]]))]),
            "text_only": share(guess)}


def heatmap(model, tokenizer, record, text, images):
    """Where the answer looked: |gradient x input| of the answer's log-probability over the image tokens -> rows x cols, 0..1.

    Saliency, not attention weights: it follows the whole network. It shows influence, not proof of a reason.
    """
    messages = [{"role": "system", "content": PROMPTS["cot"]}, {"role": "user", "content": question_text(record)},
                {"role": "assistant", "content": text.replace(IMAGE, "")}]           # a model may spell the mark
    batch = vlm_batch([(record, messages, "chat")], tokenizer, model.config, images=images)
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    with torch.no_grad():
        seen = model.visual(batch["pixel_values"], batch["image_grid_thw"])
    seen = seen.detach().requires_grad_(True)
    hidden = model.hidden_states(batch["input_ids"], image_embeds=seen, image_grid_thw=batch["image_grid_thw"],
                                 attention_mask=batch["attention_mask"])
    labels = batch["labels"].clone()
    labels[:, :-8] = -100                                            # the tail "<answer>B</answer><|im_end|>" of the reply
    gradient, = torch.autograd.grad(model.loss(hidden, labels), seen)
    _, rows, cols = (batch["image_grid_thw"][0] // 2).tolist()
    heat = (gradient * seen).sum(-1).abs().view(-1)[:rows * cols].view(rows, cols)
    return (heat / heat.max().clamp_min(1e-12)).detach().cpu().round(decimals=3).tolist()


def show_samples(model, tokenizer, data, out, *, questions=6, k=8, max_new_tokens=96, score=None, prompt="cot",
                 images=None):
    """Write out/samples/questions.json (and .txt): some questions with k answers, reward parts, advantages and claims.

    The same questions in every stage (the first of each level of the validation pool), so that stages compare.
    """
    records, lexicon, images = read_records(f"{data}/val.jsonl", use="question"), read_lexicon(data), images or Images()
    levels = collections.defaultdict(list)
    for r in records:
        levels[r.get("level") or "medium"].append(r)
    chosen = [r for group in zip(*[v[:math.ceil(questions / len(levels))] for _, v in sorted(levels.items())]) for r in group]
    texts = answers(model, tokenizer, chosen, k=k, temperature=1.0, max_new_tokens=max_new_tokens, prompt=prompt,
                    images=images, title="samples")
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
                        "heatmap": heatmap(model, tokenizer, record, group[0], images)})
        lines += [f"[{record['id']}] {record['question']}  {record['options']}  -> {record['answer']}"]
        lines += [f"   {r['reward']:+.2f} adv {r['advantage']:+.2f}  {r['text']}" for r in rows] + [""]
    (out / "samples" / "questions.json").write_text(json.dumps(pages, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "samples" / "questions.txt").write_text("\n".join(lines), encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of weights (any stage's run folder)")
    parser.add_argument("--data", required=True, help="data folder with the pool")
    parser.add_argument("--pool", default="test", help="name of the JSONL file without its ending")
    parser.add_argument("--items", type=int, default=0, help="questions, 0 = all")
    parser.add_argument("--samples", type=int, default=8, help="answers a question for sampled accuracy, 0 = greedy only")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--prompt", default="cot", choices=sorted(PROMPTS))
    c = parser.parse_args(argv)
    for name, least in (("items", 0), ("samples", 0), ("max_new_tokens", 1)):
        if getattr(c, name) < least:
            parser.error(f"--{name} {getattr(c, name)}: must be {least} or more")
    records = read_records(f"{c.data}/{c.pool}.jsonl", use="question")
    check_images(records), check_facts(records, read_lexicon(c.data))
    with checkpoint.reading(c.model, "--model"):
        model, tokenizer = PathoVLM.from_pretrained(c.model, dtype=torch.float32), ChatTokenizer.load(c.model)
    results, _ = evaluate(model, tokenizer, c.data, pool=c.pool, items=c.items, samples=c.samples,
                          max_new_tokens=c.max_new_tokens, prompt=c.prompt)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_main(main)
