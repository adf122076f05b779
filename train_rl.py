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
    (equal to the training pass to 1e-5 in fp32; the gap is logged) unless --tis corrects for their difference.
 2. The token mean runs over the optimizer step's groups (as in verl), not over one question's answers.
 3. Where too few groups teach within max_rounds, the step goes on with those it has: the rest are there, masked.
 4. A question whose answers were all right sits out the next 1, 3, then 7 passes over the data (DAPO; --max_rest).

metrics.jsonl has a line a step. Means are over all answers sampled, also those of groups that were then dropped:
 format, accuracy, length_ok   the parts of the reward; length_ok: not overlong
 claims         are the findings it names true of the image? -1 to 1; only for records with facts
 reward         what is maximised; the scales of GRPO and DAPO differ
 pass_at_k      share of questions with at least one right answer
 length, length_std, truncated tokens an answer: mean, standard deviation; share cut off at max_new_tokens
 entropy        of the policy in nats a token, estimated by its own samples; near 0 nothing new is tried
 mixed          share of groups with right and wrong answers: only these teach accuracy
 zero_variance  share of groups whose rewards are all equal: these teach nothing
 rounds, groups, filled        rollout rounds, groups that enter the update, masked ones in place of missing ones
 skipped        1 where no group taught: nothing was updated
 clip_high, clip_low           share of tokens that may not become likelier, rarer for now; 0 in a first update
 old_kl         KL(old || now) in nats a token: how far the updates of this step went
 kl             KL(now || start) in nats a token, only where it is in the loss
 sampler_gap    mean |log-probability of the training pass - of the sampler|, before the first update
 loss, grad_norm, lr           about 0 by construction: it says nothing; before clipping; of the last update
 rollout_tokens, update_tokens answer tokens sampled, and passed through the updates; speed.jsonl has them a second
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                  # spinning threads are 10x slower on shared cores
import copy
import json
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from nanopatho import checkpoint, distributed, grpo, lora, presets, rewards
from nanopatho.chat import ChatTokenizer
from nanopatho.data import Images, check_images, check_pools, read_records, shuffled
from nanopatho.evaluate import check_facts, evaluate, read_lexicon, show_samples
from nanopatho.log import ConfigError, Run, check_finite, speed, write_json
from nanopatho.optim import Optimizers, lr_factors
from nanopatho.packed import answer_logps, micro_batches, score_again
from nanopatho.rollout import collect, deal, rollout
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
    lora: int = say(0, "rank of low-rank adapters: the decoder's are trained, all else is frozen whatever --train says; 0 = off")
    steps: int = say(200, "rollout steps")
    prompts: int = say(128, "questions per rollout step that enter the update", least=1)
    group_size: int = say(8, "answers to each question", least=2)
    updates: int = say(2, "optimizer steps per rollout, each on its share of the groups", least=1)
    epochs: int = say(1, "passes over each rollout; 2 or more lets the clip act on the same answers", least=1)
    lr: float = say(1e-6, "learning rate, constant between warm-up and decay")
    vision_lr: float = say(0.0, "peak learning rate of the vision tower, 0 = as --lr")
    projector_lr: float = say(0.0, "peak learning rate of the projector, 0 = as --lr")
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
    overlong_penalty: float = say(0.0, "weight of DAPO's soft length penalty (0 to -1), added to the reward")
    overlong_mask: bool = say(False, "answers that were cut off leave the loss; their rewards stay in the group")
    group_std: bool = say(True, "divide advantages by the group's standard deviation; off: Dr. GRPO")
    variant: str = say("clip", "ratio of a token (clip), of an answer (gspo; clips near 3e-4) or cispo", choices=grpo.VARIANTS)
    dual_clip: float = say(0.0, "bound on the ratio of worse answers, 3 in verl; 0 = none, as in both papers")
    tis: float = say(0.0, "score the rollout again before the update and weigh tokens by min(that / sampled, this); 0 = off")
    kl_gradient: str = say("k3", "k3 (GRPO), or unbiased: the gradient of the true KL", choices=("k3", "unbiased"))
    dynamic: str = say("algo", "replace groups without a signal: on (dapo), off (grpo)", choices=("algo", "on", "off"))
    signal: str = say("accuracy", "what must differ inside a group: accuracy, or reward", choices=("accuracy", "reward"))
    max_rounds: int = say(4, "rollout rounds a step at most, when groups are replaced", least=1)
    max_rest: int = say(7, "passes over the data an always-right question sits out at most, when groups are replaced")
    guard: int = say(10, "collapsed steps in a row (grpo.collapsed) that end the run; 0 = never")
    graph: bool = say(False, "CUDA: replay decoding steps as a graph (not measured yet)")
    max_pixels: int = say(1280 * 28 * 28, "largest image in pixels; bigger ones are scaled down", least=1)
    micro_batch: int = say(64, "answers per forward and backward pass; does not change the result", least=1)
    eval_items: int = say(0, "test questions, 0 = all")
    eval_samples: int = say(8, "answers per question for sampled accuracy")
    eval_sample_items: int = say(0, "test questions that are sampled, 0 = all")
    save_every: int = say(50, "steps between checkpoints, 0 = only at the end")
    recompute: bool = say(False, "keep only each block's inputs for the backward pass: less memory, a third more work")
    compile: bool = say(False, "torch.compile for each block")
    max_skipped: int = say(0, "updates with a gradient that is not finite, passed over before the run stops")
    log: str = say("off", "also log to tensorboard or wandb", choices=("off", "tensorboard", "wandb"), extra="log")
    profile: int = say(0, "steps to trace into trace.json, after three to warm up")
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
    device, rank, world = distributed.start()                        # torchrun or not: see nanopatho/distributed.py
    mine = distributed.share(c.prompts, "prompts")                   # which questions of each rollout this process answers
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
    dtype = torch.bfloat16 if c.lora and device.type == "cuda" else torch.float32     # what LoRA freezes needs no fp32
    if not c.init:
        raise ConfigError("--init is empty. RL starts from a model that can answer: give the SFT run folder.")
    with checkpoint.reading(c.init):
        model, tokenizer = PathoVLM.from_pretrained(c.init, dtype=dtype), ChatTokenizer.load(c.init)
    reference = (model if c.lora else copy.deepcopy(model).requires_grad_(False)) if c.kl > 0 else None
    lora.add(model, c.lora) if c.lora else trainable(model, c.train.split(","))
    for m in [model] + [reference] * (c.kl > 0 and not c.lora):
        m.visual.recompute = m.model.recompute = c.recompute
        distributed.shard(m, [*m.visual.blocks, *m.model.layers], device, compile=c.compile)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if rank == 0:
        print(f"{c.algo}: {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, {len(records)} questions, {device}")

    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = Optimizers(model, c.lr, c.weight_decay, c.optimizer, factors=lr_factors(c.lr, c.vision_lr, c.projector_lr))
    order, best, bad, skipped = shuffled(len(records), 1, rng), {}, 0, []
    easy = torch.zeros(2, len(records), dtype=torch.long)            # times in a row all right; passes it still sits out
    first = drawn = done = 0                                         # steps, questions drawn, optimizer steps
    state = checkpoint.resume(c.out, model, optimizer)
    if state:
        first, drawn, done, easy, best, bad = (state[k] for k in ("step", "drawn", "done", "easy", "best", "bad"))
        skipped = state.get("skipped", [])
        for _ in range(drawn):
            next(order)
    run, saved = Run(c.out, c, c.steps, c.algo, first, c.profile), first

    def score(text, record, n_tokens=None):
        """Named reward parts and their sum; claims are measured always and paid only with claim_weight > 0."""
        parts = rewards.score_answer(text, record, n_tokens=n_tokens, length_limit=c.max_new_tokens - c.cache_length,
                                     lexicon=lexicon.get(record.get("subfield")) if record.get("facts") else None)
        reward = rewards.combine(parts, c.reward, c.claim_weight)
        if c.overlong_penalty and n_tokens is not None:
            over = grpo.soft_overlong_penalty(torch.tensor(n_tokens), c.max_new_tokens, c.cache_length)
            reward += c.overlong_penalty * over.item()
        return {**parts, "reward": reward}

    def questions():
        """The next c.prompts questions -> [(number in the stream, index)]; the number seeds the answers."""
        nonlocal drawn
        chosen = []
        while len(chosen) < c.prompts:
            i, drawn = int(next(order)[0]), drawn + 1
            if easy[1, i]:
                easy[1, i] -= 1
            else:
                chosen.append((drawn, i))
        return chosen

    # ------------------------------------------------------------------------------------------------ loop
    def state_at(step):
        return dict(step=step, drawn=drawn, done=done, easy=easy.clone(), best=dict(best), bad=bad, skipped=[*skipped])

    for step in range(first, c.steps):
        state = state_at(step)
        # 1. Eight answers to each question, until enough groups hold both right and wrong ones (DAPO) or once (GRPO).
        began = time.time()
        groups, seen, dull, rounds = [], [], [], 0
        sampler = distributed.whole(model, True, device, torch.bfloat16 if device.type == "cuda" else None)
        while len(groups) < c.prompts and rounds < (c.max_rounds if c.dynamic == "on" else 1):
            chosen = questions()
            fresh = collect(rollout(sampler, tokenizer, chosen[mine], records, c, images, score))
            rounds, seen = rounds + 1, seen + fresh
            if c.dynamic == "on":                                     # on accuracy, not on the shaped reward
                keep = grpo.keep_groups(torch.tensor([p[c.signal] for g in fresh for p in g["parts"]]), c.group_size)
                for g, teaches, (_, i) in zip(fresh, keep, chosen):
                    (groups if teaches else dull).append(g)
                    easy[0, i] = easy[0, i] + 1 if all(p["accuracy"] == 1 for p in g["parts"]) else 0
                    easy[1, i] = min(2 ** min(int(easy[0, i]), 9) - 1, c.max_rest)
            else:
                groups = fresh
        groups = groups[:c.prompts]                                   # arrival order; the surplus is dropped
        numbers = grpo.describe(seen, c.group_size) | dict(rounds=rounds, groups=len(groups), filled=0)
        if groups and len(groups) < c.prompts:                        # the cap was met: the others are there, without a loss
            numbers["filled"] = c.prompts - len(groups)
            rank or run.bar.write(f"step {step + 1}: only {len(groups)} of {c.prompts} groups hold right and wrong answers after "
                          f"{rounds} rounds (--max_rounds); {numbers['filled']} enter masked")
            groups += [dict(g, mask=torch.zeros_like(g["mask"])) for g in dull[:numbers["filled"]]]
        del sampler                                                   # a second copy of the weights, if they are sharded
        sampled = time.time()
        why = grpo.collapsed(numbers, best)
        bad = bad + 1 if why else 0
        if c.save_every and step - saved >= c.save_every and not bad:    # only weights whose answers were seen to be sane
            checkpoint.save(c.out, model, optimizer, state, tokenizer)
            saved = step
        if bad >= c.guard > 0:
            run.close()
            good = f"{c.out}/last, of step {saved}" + " (the adapter alone)" * (c.lora > 0) if saved else f"{c.init}: none were saved yet"
            raise ConfigError(f"step {step + 1}: the policy has collapsed: {why}, and so for {bad} steps. The last good weights "
                              f"are in {good}. Start from them in another --out with a lower --lr, or set --guard 0.")

        # 2. Advantage: how much better than its siblings. One number an answer, the same on all its tokens.
        for g in groups:
            g["advantages"] = grpo.group_advantages(torch.tensor([p["reward"] for p in g["parts"]]), c.group_size,
                                                    std=c.group_std)
            if c.overlong_mask:
                g["mask"] = grpo.drop_truncated(g["mask"], torch.tensor(g["truncated"]))

        # 3. Updates. Each takes its share of the groups; inside it, processes and micro-batches add up to exactly one loss.
        updates = [groups[u::c.updates] for u in range(c.updates)]
        own = [deal(part, tokenizer, model, c, images) for part in updates]     # what this process computes of each
        if c.tis:
            distributed.call(model, score_again, [g for part in own for g in part], c, tokenizer.pad_id, tokenizer.banned_ids)
        stats = []
        for _ in range(c.epochs):
            for part, mine_of in zip(updates, own):
                lr = c.lr * min(1.0, (done + 1) / max(1, c.warmup), (c.steps - step) / max(1.0, c.decay * c.steps))
                found = update(model, reference, tokenizer, part, parameters, optimizer, lr, c, step, mine_of, skipped)
                if found:
                    stats, done = stats + [found], done + 1
        if stats:
            numbers |= {k: float(np.mean([s[k] for s in stats])) for k in stats[0]} | dict(lr=lr)
            numbers["sampler_gap"] = stats[0]["sampler_gap"]
        numbers |= dict(update_tokens=sum(s["update_tokens"] for s in stats), skipped=float(not stats))
        note = speed(run.lap(), numbers["rollout_tokens"] + numbers["update_tokens"])
        run.step(step, show=("accuracy", "length", "mixed", "entropy"), note=note, **numbers)
        with open(os.devnull if rank else f"{c.out}/speed.jsonl", "a") as file:     # apart: resumed runs repeat all but this
            file.write(json.dumps({"step": step, "rollout_tokens_s": round(numbers["rollout_tokens"] / (sampled - began)),
                                   "update_tokens_s": round(numbers["update_tokens"] / (time.time() - sampled))}) + "\n")
        if distributed.asked_to_stop():
            checkpoint.save(c.out, model, optimizer, state_at(step + 1), tokenizer)
            distributed.stop(step + 1)
        if stats and (step == 0 or (step + 1) % 50 == 0):
            run.text(f"step{step + 1:04d}", "\n\n".join(
                f"{g['record']['question']} -> {g['record']['answer']}\n" + "\n".join(
                    f"  {p['reward']:+.2f} adv {a:+.2f} {t}" for p, a, t in zip(g["parts"], g["advantages"], g["texts"]))
                for g in groups[:4]))

    # ------------------------------------------------------------------------------------------------ evaluate, save
    checkpoint.save(c.out, model, optimizer, state_at(c.steps), tokenizer)     # the weights are safe before the evaluation
    seconds = run.seconds()
    run.close()
    del optimizer, parameters, reference
    model = distributed.whole(model)                                 # on the first process, which alone goes on
    distributed.leave()
    if rank:
        return
    fast = distributed.for_evaluation(model, device)
    options = dict(max_new_tokens=c.max_new_tokens, images=images, max_pixels=c.max_pixels)
    results = {}
    if "test" in pools:
        results, each = evaluate(fast, tokenizer, c.data, items=c.eval_items, samples=c.eval_samples,
                                 sample_items=c.eval_sample_items, **options)
        write_json(f"{c.out}/each.json", each)
    results["pools"] = {pool: evaluate(fast, tokenizer, c.data, pool=pool, items=c.eval_items, samples=0, **options)[0]
                        for pool in ("test_combo", "test_stain") if pool in pools}
    if "val" in pools:
        show_samples(fast, tokenizer, c.data, c.out, k=c.group_size, score=score, **options)
    checkpoint.finish(c.out, model, tokenizer)
    write_json(f"{c.out}/results.json", {"seconds": round(seconds, 1), **results})    # last: it says the stage is done
    print(f"{c.algo}: {seconds:.0f} s" + "".join(f", {k} {results[k]:.3f}" for k in ("greedy_accuracy", "sampled_accuracy")
                                             if k in results))


def update(model, reference, tokenizer, groups, parameters, optimizer, lr, c, step=0, own=None, skipped=None):
    """One optimizer step on `groups`, of which this process computes `own` (None: all) -> dict of numbers. Micro-batches of
    whole groups; the divisor counts the whole step. Without a single loss token nothing moves (AdamW would move weights even
    on zero gradients), nor where the gradient is not finite: {}."""
    model.train()
    n = sum(int(grpo.loss_count(g["mask"], c.aggregation)) for g in groups)
    tokens = sum(int(g["mask"].sum()) for g in groups)
    if not tokens:
        return {}
    totals, options = {}, dict(aggregation=c.aggregation, n_global=n, max_length=c.max_new_tokens)
    for _, row in micro_batches(groups if own is None else own, c, tokenizer.pad_id, parameters[0].device):
        mask, scored = row["mask"], (row, c.temperature, tokenizer.banned_ids)
        if reference is not None:
            with lora.off(reference), torch.no_grad():               # with --lora it is the model itself, as it started
                ref = distributed.call(reference, answer_logps, *scored)
        logp = distributed.call(model, answer_logps, *scored)                                                      # (R, N)
        weights = grpo.sampler_weights(row["old"], row["logps"], mask, c.tis) if c.tis else None
        loss, metrics = grpo.policy_loss(logp, row["old"], row["advantages"], mask, clip_low=c.clip_low,
                                         clip_high=c.clip_high, variant=c.variant, dual_clip=c.dual_clip or None,
                                         weights=weights, **options)
        here = mask.sum().double() / tokens                          # what is a mean over tokens is weighted by them
        numbers = {k: v.double() * here for k, v in metrics.items() if k in ("clip_high", "clip_low", "old_kl")}
        numbers["sampler_gap"] = (logp.detach() - row["logps"])[mask].abs().sum().double() / tokens
        if reference is not None:
            old = row["old"] if c.kl_gradient == "unbiased" else None
            kl = grpo.aggregate(grpo.kl_k3(logp, ref, mask=mask, old_logp=old), mask, **options)
            loss, numbers["kl"] = loss + c.kl * kl, kl.detach().double()
        (loss * distributed.world()).backward()                      # FSDP takes the mean over processes
        numbers["loss"] = loss.detach().double()
        for name, value in numbers.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = distributed.clip_gradients(parameters, c.clip_norm).item()
    if not check_finite(step, [g["record"] for g in groups], skipped, c.max_skipped if skipped is not None else 0, grad_norm=norm):
        optimizer.zero_grad()
        return {}
    optimizer.step(lr)
    values, = distributed.add_up([torch.stack(list(totals.values()))])
    return {"update_tokens": tokens, **dict(zip(totals, values.tolist())), "grad_norm": norm}


if __name__ == "__main__":
    distributed.launch(main)
