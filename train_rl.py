"""Stage 3, reinforcement learning: eight answers to each question, each compared with its siblings (Patho-R1, "RL").

    python train_rl.py --preset tiny --algo dapo --data data/tiny --init runs/demo/sft --out runs/demo/dapo
    python train_rl.py --preset 7b --algo grpo --data data/rl --init runs/sft --out runs/grpo

The loop: sample eight answers a question -> reward each by rule -> advantage = how much better than its siblings -> raise
the probability of the better ones, clipped. GRPO and DAPO are two branches from the same SFT model, as in the paper:
          clip          loss mean over       KL to the start   groups that are all right or all wrong   reward
 grpo     0.2 / 0.2     tokens, then answers   0.01 (k3)       kept (they teach nothing)                0.1 format + 0.9 accuracy
 dapo     0.2 / 0.28    all tokens             none            replaced by new questions                +1 right and not overlong, else -1

Departures from the paper (its hyper-parameters are unpublished; the defaults follow its neighbours, see the README):
 1. Two updates a rollout on halves of the groups, so that the clip acts; sampler log-probabilities serve as `old`
    (equal to the training pass to 1e-5 in fp32; the gap is logged).
 2. The token mean runs over the optimizer step's groups (as in verl), not over one question's answers.
Reading the log: the loss is about 0 by construction and says nothing; watch accuracy, length, entropy, mixed (share of
groups with both right and wrong answers: only these teach) and claims (are the findings it names true?).
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                  # spinning threads are 10x slower on shared cores
import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from nanopatho import checkpoint, grpo, presets, rewards
from nanopatho.chat import ChatTokenizer
from nanopatho.data import Images, check_images, check_pools, read_records, shuffled, vlm_batch
from nanopatho.evaluate import ask, check_facts, evaluate, read_lexicon, show_samples
from nanopatho.generate import generate
from nanopatho.log import ConfigError, Run, check_finite, run_main, write_json
from nanopatho.optim import Optimizers
from nanopatho.packed import answer_logps, training_rows
from nanopatho.vlm import PathoVLM, trainable


def say(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    preset: str = say("tiny", "size of the model and its training fields: smoke, tiny, small, 3b, 7b")
    algo: str = say("dapo", "grpo or dapo: sets every field below that is left at 'algo'", choices=("grpo", "dapo"))
    data: str = say("data/tiny", "folder with rl.jsonl, the question pools and the images")
    init: str = say("", "folder of weights to start from (the SFT run)")
    out: str = say("runs/rl", "run folder: weights, metrics.jsonl, samples, results.json")
    seed: int = say(0, "seed of sampling and order")
    train: str = say("vision,projector,decoder", "parts that are trained", parts=("vision", "projector", "decoder"))
    steps: int = say(200, "rollout steps")
    prompts: int = say(128, "questions per rollout step that enter the update", least=1)
    group_size: int = say(8, "answers to each question", least=2)
    updates: int = say(2, "optimizer steps per rollout, each on its share of the groups", least=1)
    epochs: int = say(1, "passes over each rollout; 2 or more lets the clip act on the same answers", least=1)
    lr: float = say(1e-6, "learning rate, constant between warm-up and decay")
    warmup: int = say(10, "optimizer steps of linear warm-up")
    decay: float = say(0.0, "last share of the rollout steps over which the learning rate falls linearly to zero")
    optimizer: str = say("adamw", "adamw, or muon: Muon for the matrices of the layers, AdamW for the rest",
                         choices=("adamw", "muon"))
    weight_decay: float = say(0.1, "AdamW weight decay on matrices")
    clip_norm: float = say(1.0, "largest gradient norm")
    temperature: float = say(1.0, "sampling temperature; divides the logits in every log-probability")
    max_new_tokens: int = say(2048, "longest answer", least=1)
    cache_length: int = say(0, "tokens before the longest answer from which an answer counts as overlong, 0 = a fifth")
    clip_low: float = say(0.2, "the ratio may fall to 1 - this")
    clip_high: str = say("algo", "the ratio may grow to 1 + this; algo: 0.2 (grpo), 0.28 (dapo)")
    aggregation: str = say("algo", "sequence-mean (grpo), token-mean (dapo) or constant-length",
                           choices=("algo", *grpo.AGGREGATIONS))
    kl: str = say("algo", "weight of the KL to the start; algo: 0.01 (grpo), 0 (dapo: no reference model is loaded)")
    reward: str = say("algo", "how parts combine: grpo_sum, grpo_gated, dapo_gated, dapo_sum",
                      choices=("algo", *rewards.READINGS))
    claim_weight: float = say(0.0, "weight of the claim reward (an experiment: a gentle no to made-up findings)")
    dynamic: str = say("algo", "replace groups without a signal: on (dapo), off (grpo)", choices=("algo", "on", "off"))
    max_rounds: int = say(4, "rollout rounds a step at most, when groups are replaced", least=1)
    max_pixels: int = say(1280 * 28 * 28, "largest image in pixels; bigger ones are scaled down", least=1)
    micro_batch: int = say(64, "answers per forward and backward pass; does not change the result", least=1)
    eval_items: int = say(0, "test questions, 0 = all")
    eval_samples: int = say(8, "answers per question for sampled accuracy")
    eval_sample_items: int = say(0, "test questions that are sampled, 0 = all")
    save_every: int = say(50, "steps between checkpoints, 0 = only at the end")
    threads: int = say(0, "CPU threads, 0 = all")


ALGO = {"grpo": dict(clip_high=0.2, aggregation="sequence-mean", kl=0.01, reward="grpo_sum", dynamic="off"),
        "dapo": dict(clip_high=0.28, aggregation="token-mean", kl=0.0, reward="dapo_gated", dynamic="on")}


def main(argv=None):
    # ------------------------------------------------------------------------------------------------ config, device
    c = presets.parse(Config, "rl", argv)
    for name, value in ALGO[c.algo].items():
        if getattr(c, name) == "algo":
            setattr(c, name, value)
    for name in ("clip_high", "kl"):
        try:
            setattr(c, name, float(getattr(c, name)))
        except ValueError:
            raise ConfigError(f"--{name} {getattr(c, name)}: write a number, or algo") from None
    c.cache_length = c.cache_length or c.max_new_tokens // 5
    checkpoint.check_out(c, c.algo)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    rng = np.random.default_rng(c.seed)

    # ------------------------------------------------------------------------------------------------ data
    records = read_records(f"{c.data}/rl.jsonl", use="question")
    check_images(records)
    pools = check_pools(c.data)
    images, lexicon = Images(), read_lexicon(c.data)
    check_facts(records, lexicon)
    if c.claim_weight and not any(r.get("facts") and r.get("subfield") in lexicon for r in records):
        raise ConfigError(f"--claim_weight {c.claim_weight}: no record of {c.data}/rl.jsonl has facts that {c.data}/lexicon.json "
                          "names, so no claim can be judged; add them, or leave the option out")
    for pool in pools:
        check_facts(read_records(f"{c.data}/{pool}.jsonl"), lexicon)

    # ------------------------------------------------------------------------------------------------ model
    if not c.init:
        raise ConfigError("--init is empty. RL starts from a model that can answer: give the SFT run folder.")
    with checkpoint.reading(c.init):
        model, tokenizer = PathoVLM.from_pretrained(c.init, dtype=torch.float32).to(device), ChatTokenizer.load(c.init)
    reference = copy.deepcopy(model).requires_grad_(False) if c.kl > 0 else None
    parameters = trainable(model, c.train.split(","))
    print(f"{c.algo}: {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, {len(records)} questions, {device}")

    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = Optimizers(model, c.lr, c.weight_decay, c.optimizer)
    order, first, drawn, done = shuffled(len(records), c.prompts, rng), 0, 0, 0
    generator = torch.Generator(device=device).manual_seed(c.seed)
    state = checkpoint.resume(c.out, model, optimizer)
    if state:
        first, drawn, done = state["step"], state["drawn"], state["done"]
        generator.set_state(state["generator"])
        for _ in range(drawn):
            next(order)
    run = Run(c.out, c, c.steps, c.algo, first)

    def score(text, record, n_tokens=None):
        """Named reward parts and their sum; claims are measured always and paid only with claim_weight > 0."""
        parts = rewards.score_answer(text, record, n_tokens=n_tokens, length_limit=c.max_new_tokens - c.cache_length,
                                     lexicon=lexicon.get(record.get("subfield")) if record.get("facts") else None)
        return {**parts, "reward": rewards.combine(parts, c.reward, c.claim_weight)}

    # ------------------------------------------------------------------------------------------------ loop
    def save(step):
        checkpoint.save(c.out, model, optimizer, {"step": step, "drawn": drawn, "done": done,
                                                  "generator": generator.get_state()}, tokenizer)

    for step in range(first, c.steps):
        if c.save_every and step % c.save_every == 0 and step > first:
            save(step)

        # 1. Eight answers to each question, until enough groups hold both right and wrong ones (DAPO) or once (GRPO).
        groups, seen, mixed, rounds = [], [], 0, 0
        while len(groups) < c.prompts and rounds < (c.max_rounds if c.dynamic == "on" else 1):
            chosen = [records[i] for i in next(order)]
            fresh = rollout(model, tokenizer, chosen, c, images, generator, score)
            drawn, rounds, seen = drawn + 1, rounds + 1, seen + fresh
            accuracy = torch.tensor([p["accuracy"] for g in fresh for p in g["parts"]])
            keep = grpo.keep_groups(accuracy, c.group_size)           # on accuracy, not on the shaped reward
            mixed += int(keep.sum())
            groups += [g for g, k in zip(fresh, keep) if k] if c.dynamic == "on" else fresh
        groups = groups[:c.prompts]                                   # arrival order; the surplus is dropped
        parts = [p for g in seen for p in g["parts"]]                 # statistics over everything sampled, kept or not
        names = dict.fromkeys(name for p in parts for name in p)      # claims: only where the facts are known
        mean = {name: float(np.mean([p[name] for p in parts if name in p])) for name in names}
        lengths = torch.cat([g["mask"].sum(1) for g in seen]).float()
        numbers = dict(mean, length=lengths.mean().item(), mixed=mixed / len(seen), rounds=rounds, groups=len(groups),
                       truncated=float(np.mean([x for g in seen for x in g["truncated"]])),
                       pass_at_k=float(np.mean([max(p["accuracy"] for p in g["parts"]) for g in seen])),
                       entropy=-(torch.cat([g["logps"][g["mask"]] for g in seen])).mean().item())
        if not groups:                                                # AdamW would move weights even on zero gradients
            run.step(step, show=("accuracy", "length", "mixed"), **numbers, skipped=1)
            continue

        # 2. Advantage: how much better than its siblings. One number an answer, the same on all its tokens.
        for g in groups:
            g["advantages"] = grpo.group_advantages(torch.tensor([p["reward"] for p in g["parts"]]), c.group_size)

        # 3. Updates. Each takes its share of the groups; inside it, micro-batches add up to exactly one loss.
        share, stats = max(1, -(-len(groups) // c.updates)), []
        for _ in range(c.epochs):
            for at in range(0, len(groups), share):
                lr = c.lr * min(1.0, (done + 1) / max(1, c.warmup), (c.steps - step) / max(1.0, c.decay * c.steps))
                stats.append(update(model, reference, tokenizer, groups[at:at + share], parameters, optimizer, lr, c, step))
                done += 1
        numbers.update({k: float(np.mean([s[k] for s in stats])) for k in stats[0]}, lr=lr)
        run.step(step, show=("accuracy", "length", "mixed", "entropy"), **numbers)
        if step == 0 or (step + 1) % 50 == 0:
            run.text(f"step{step + 1:04d}", "\n\n".join(
                f"{g['record']['question']} -> {g['record']['answer']}\n" + "\n".join(
                    f"  {p['reward']:+.2f} adv {a:+.2f} {t}" for p, a, t in zip(g["parts"], g["advantages"], g["texts"]))
                for g in groups[:4]))

    # ------------------------------------------------------------------------------------------------ evaluate, save
    save(c.steps)                                                    # the weights are safe before the evaluation
    seconds = run.seconds()
    run.close()
    options = dict(max_new_tokens=c.max_new_tokens, images=images)
    results = {}
    if "test" in pools:
        results, each = evaluate(model, tokenizer, c.data, items=c.eval_items, samples=c.eval_samples,
                                 sample_items=c.eval_sample_items, **options)
        write_json(f"{c.out}/each.json", each)
    results["pools"] = {pool: evaluate(model, tokenizer, c.data, pool=pool, items=c.eval_items, samples=0, **options)[0]
                        for pool in ("test_combo", "test_stain") if pool in pools}
    if "val" in pools:
        show_samples(model, tokenizer, c.data, c.out, k=c.group_size, score=score, **options)
    checkpoint.finish(c.out, model, tokenizer)
    write_json(f"{c.out}/results.json", {"seconds": round(seconds, 1), **results})    # last: it says the stage is done
    print(f"{c.algo}: {seconds:.0f} s" + "".join(f", {k} {results[k]:.3f}" for k in ("greedy_accuracy", "sampled_accuracy")
                                             if k in results))


def rollout(model, tokenizer, records, c, images, generator, score):
    """Sample c.group_size answers to each record -> one dict a group: record, batch (its prompt), ids, logps, mask (G, N),
    texts, parts (list of dicts), truncated. The image and the prompt are computed once for their eight answers."""
    model.eval()
    rows = [ask(r) for r in records]
    device = next(model.parameters()).device
    batch = vlm_batch(rows, tokenizer, model.config, images=images, max_pixels=c.max_pixels)
    batch.pop("labels")
    with torch.no_grad():
        made = generate(model, **{k: v.to(device) for k, v in batch.items()}, group_size=c.group_size,
                        max_new_tokens=c.max_new_tokens, temperature=c.temperature, eos_token_ids=tokenizer.eos_ids,
                        pad_token_id=tokenizer.pad_id, banned_token_ids=tokenizer.banned_ids, generator=generator)
    groups, patches = [], batch["image_grid_thw"].prod(1).tolist()
    at = 0
    for i, record in enumerate(records):
        rows_of = slice(i * c.group_size, (i + 1) * c.group_size)
        ids, logps, mask = (x[rows_of].cpu() for x in (made.ids, made.logps, made.mask))
        texts = [tokenizer.decode(t[m]) for t, m in zip(ids, mask)]
        n_images = 1 if isinstance(record["image"], str) else len(record["image"])
        grid = batch["image_grid_thw"][at:at + n_images]
        pixels = batch["pixel_values"][sum(patches[:at]):sum(patches[:at + n_images])]
        at += n_images
        groups.append(dict(record=record, prompt=batch["input_ids"][i][batch["attention_mask"][i] > 0], grid=grid,
                           pixels=pixels, ids=ids, logps=logps, mask=mask, texts=texts,
                           parts=[score(t, record, int(m.sum())) for t, m in zip(texts, mask)],
                           truncated=[bool(m.all()) and int(t[m][-1]) not in tokenizer.eos_ids for t, m in zip(ids, mask)]))
    return groups


def update(model, reference, tokenizer, groups, parameters, optimizer, lr, c, step=0):
    """One optimizer step on `groups` -> dict of numbers. Micro-batches of whole groups; the divisor counts the whole step."""
    model.train()
    device = next(model.parameters()).device
    n = sum(int(grpo.loss_count(g["mask"], c.aggregation)) for g in groups)
    tokens = sum(int(g["mask"].sum()) for g in groups)
    per, totals = max(1, c.micro_batch // c.group_size), {}
    for at in range(0, len(groups), per):
        part = groups[at:at + per]
        row = {k: v.to(device) for k, v in training_rows(part, tokenizer.pad_id, c.group_size).items()}
        logp = answer_logps(model, row, c.temperature, tokenizer.banned_ids)                                       # (R, N)
        loss, metrics = grpo.policy_loss(logp, row["logps"], row["advantages"], row["mask"], clip_low=c.clip_low,
                                         clip_high=c.clip_high, aggregation=c.aggregation, n_global=n,
                                         max_length=c.max_new_tokens)
        here = int(row["mask"].sum()) / tokens                       # what is a mean over tokens is weighted by them
        numbers = {k: v.item() * here for k, v in metrics.items() if k in ("clip_high", "clip_low", "old_kl")}
        numbers["sampler_gap"] = (logp.detach() - row["logps"])[row["mask"]].abs().mean().item() * here
        if reference is not None:
            with torch.no_grad():
                ref = answer_logps(reference, row, c.temperature, tokenizer.banned_ids)
            kl = grpo.aggregate(grpo.kl_k3(logp, ref, mask=row["mask"]), row["mask"], c.aggregation, n_global=n,
                                max_length=c.max_new_tokens)
            loss, numbers["kl"] = loss + c.kl * kl, kl.item()
        loss.backward()
        numbers["loss"] = loss.item()
        for name, value in numbers.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(parameters, c.clip_norm)
    check_finite(step, [g["record"] for g in groups], grad_norm=norm.item())
    optimizer.step(lr)
    return {**totals, "grad_norm": norm.item()}


if __name__ == "__main__":
    run_main(main)
