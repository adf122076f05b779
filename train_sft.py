"""Stage 2, chain-of-thought fine-tuning by level and topic: look, think in <think>, answer in <answer> (Patho-R1, "SFT").

    python train_sft.py --preset tiny --data data/tiny --init runs/demo/pretrain --out runs/demo/sft
    python train_sft.py --preset 7b --data data/cot --init runs/cpt --out runs/sft

Departures from the paper, which publishes the grid (5 subfields x 3 levels x 4 tasks) but no hyper-parameters:
 1. The curriculum moves from mostly easy to mostly hard within one run; the paper names levels, not an order. From shards
    the shares of the levels are the same, but inside a level records come as they were packed, not by subfield and topic.
 2. `--style bare` removes the reasoning from the same records: the ablation that shows what it buys.
 3. `tiny` learns from a teacher that errs on purpose, as a text-only teacher does (data_prep/writer.py says how).
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                  # spinning threads are 10x slower on shared cores
import functools
import itertools
import math
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from nanopatho import checkpoint, distributed, lora, presets, rewards
from nanopatho.chat import PROMPTS, ChatTokenizer, train_tokenizer
from nanopatho.data import CHOICES, Images, check_images, check_pools, curriculum, pack_rows, read_records, vlm_batch
from nanopatho.evaluate import check_facts, evaluate, read_lexicon, show_samples
from nanopatho.log import Run, check_finite, speed, vlm_flops, write_json
from nanopatho.optim import Optimizers, lr_factors
from nanopatho.stream import agreed, ahead, images_of, mixture, shard_folders, stream
from nanopatho.vlm import PathoVLM, trainable

START, END = map(np.array, curriculum.__defaults__)                  # shares of easy, medium, hard at first and at last


def say(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    preset: str = say("tiny", "size of the model and its training fields: smoke, tiny, small, 3b, 7b")
    data: str = say("data/tiny", "folder with sft.jsonl, the question pools and the images; sft.jsonl may be tar shards, with "
                                 "pools sft_easy, sft_medium, sft_hard for the curriculum, or sft for an even order")
    mix: str = say("", "more folders of shards, FOLDER=WEIGHT joined by commas: 2 = their records come twice as often as --data's")
    init: str = say("", "folder of weights to start from; empty: random weights (the no-pretraining ablation)")
    out: str = say("runs/sft", "run folder: weights, metrics.jsonl, samples, results.json")
    seed: int = say(0, "seed of order and augmentation")
    train: str = say("vision,projector,decoder", "parts that are trained", parts=("vision", "projector", "decoder"))
    lora: int = say(0, "rank of low-rank adapters: the decoder's are trained, all else is frozen whatever --train says; 0 = off")
    style: str = say("cot", "cot: as written; bare: the reasoning removed", choices=("cot", "bare"))
    steps: int = say(1000, "optimizer steps")
    batch_size: int = say(64, "conversations per step", least=1)
    lr: float = say(1e-5, "peak learning rate, cosine to a tenth")
    vision_lr: float = say(0.0, "peak learning rate of the vision tower, 0 = as --lr")
    projector_lr: float = say(0.0, "peak learning rate of the projector, 0 = as --lr")
    warmup: int = say(20, "steps of linear warm-up")
    optimizer: str = say("adamw", "adamw, or muon: Muon for the matrices of the layers, AdamW for the rest",
                         choices=("adamw", "muon"))
    weight_decay: float = say(0.05, "AdamW weight decay on matrices")
    clip_norm: float = say(1.0, "largest gradient norm")
    max_pixels: int = say(1280 * 28 * 28, "largest image in pixels; bigger ones are scaled down", least=1)
    augment: bool = say(True, "turn and mirror images (tissue has no up)")
    max_new_tokens: int = say(96, "longest answer in evaluation", least=1)
    eval_items: int = say(0, "test questions, 0 = all")
    eval_samples: int = say(8, "answers per question for sampled accuracy")
    eval_sample_items: int = say(0, "test questions that are sampled, 0 = all")
    save_every: int = say(500, "steps between checkpoints, 0 = only at the end")
    micro_batch: int = say(0, "rows per pass of one process, 0 = its whole share; does not change the result")
    pack: int = say(0, "tokens of a row that holds several samples end to end, instead of padded rows (--micro_batch); 0 = off")
    recompute: bool = say(False, "keep only each block's inputs for the backward pass: less memory, a third more work")
    offload: bool = say(False, "on GPUs: weights, gradients and moments stay in host memory")
    compile: bool = say(False, "torch.compile for each block")
    max_skipped: int = say(0, "steps with a loss or gradient that is not finite, passed over before the run stops")
    workers: int = say(4, "processes that open images and make batches ahead of the GPU, 0 = none")
    max_damaged: int = say(100, "records of shards that cannot be used, passed over before the run stops")
    log: str = say("off", "also log to tensorboard or wandb", choices=("off", "tensorboard", "wandb"), extra="log")
    profile: int = say(0, "steps to trace into trace.json, after three to warm up")
    threads: int = say(0, "CPU threads, 0 = all")


def conversation(record, style):
    """Record -> row of vlm_batch: the system prompt of the style, then the record's own turns."""
    turns = [m for m in record["messages"] if m["role"] != "system"]
    if style == "bare":
        turns = [dict(m, content=re.sub(r"<think>.*?</think>", "", m["content"], flags=re.DOTALL)) for m in turns]
    return record, [{"role": "system", "content": PROMPTS[style]}, *turns], "chat"


def moving_weights(p, sources, levels):
    """The curriculum over shards: weight of each source when the share p of the steps is over. levels: of each source 0 to 2, or
    -1 where it has none. Sources without levels keep their share; among the others levels move as data.curriculum moves
    them, and inside a level sources keep theirs."""
    size, level = np.array([s["weight"] for s in sources]), np.array(levels)
    inside = np.array([size[level == i].sum() for i in levels])
    moved = np.where(level < 0, 0, size / inside * (START + (END - START) * p)[level])
    return np.where(level < 0, size, moved * size[level >= 0].sum() / max(moved.sum(), 1e-9))


def main(argv=None):
    # ------------------------------------------------------------------------------------------------ config, device
    c = presets.parse(Config, "sft", argv)
    checkpoint.check_out(c, "sft")
    device, rank, world = distributed.start()                        # torchrun or not: see nanopatho/distributed.py
    mine = distributed.share(c.batch_size)                           # which rows of each batch this process computes
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    rng = np.random.default_rng(c.seed)

    # ------------------------------------------------------------------------------------------------ data
    streamed = shard_folders(c.data, c.init, c.mix)                  # tar shards: read while training, nanopatho/stream.py
    if streamed:
        shards, levels = [], []                                      # the level of each source; -1: its folder has none
        for name, held in streamed.items():
            own = [i for i, level in enumerate(CHOICES["level"]) if f"sft_{level}" in held[1]]
            for pool in [f"sft_{CHOICES['level'][i]}" for i in own] or ["sft"]:
                shards += mixture({name: held}, pool)
            levels += own or [-1]
    else:
        records = read_records(f"{c.data}/sft.jsonl", use="sft")
        check_images(records)
    pools = check_pools(c.data)
    for pool in pools:
        check_facts(read_records(f"{c.data}/{pool}.jsonl"), read_lexicon(c.data))
    images = images_of if streamed else Images(workers=c.workers)

    # ------------------------------------------------------------------------------------------------ model
    dtype = torch.bfloat16 if c.lora and device.type == "cuda" else torch.float32     # what LoRA freezes needs no fp32
    if c.init:
        with checkpoint.reading(c.init):
            model, tokenizer = PathoVLM.from_pretrained(c.init, dtype=dtype), ChatTokenizer.load(c.init)
    else:
        tokenizer = train_tokenizer([m["content"] for r in records for m in r["messages"]], presets.TINY_BPE)
        model = PathoVLM(presets.VLM[c.preset])
    model.train()
    lora.add(model, c.lora) if c.lora else trainable(model, c.train.split(","))
    model.visual.recompute = model.model.recompute = c.recompute
    distributed.shard(model, [*model.visual.blocks, *model.model.layers], device, c.offload, c.compile)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if rank == 0:
        print(f"sft: {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, "
              f"{sum(s['records'] for s in shards) if streamed else len(records)} conversations, {world} x {device.type}")

    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = Optimizers(model, c.lr, c.weight_decay, c.optimizer, factors=lr_factors(c.lr, c.vision_lr, c.projector_lr))
    state = checkpoint.resume(c.out, model, optimizer) or {}
    first, skipped, position = state.get("step", 0), state.get("skipped", []), state.get("stream")

    def prepare(rows, step):
        """-> this process's records without pictures, and its micro-batches. Worker processes call it, ahead of the GPU."""
        turn = None
        if not streamed:                                             # from shards: its own rows alone, turned already
            rows = [records[i] for i in rows]
            if c.augment:
                turn = np.random.default_rng([c.seed, step])         # by step, so that resuming needs no replay
                distributed.skip_augmentation(rows[:mine.start], turn)
            rows = rows[mine]
        parts = distributed.pieces([conversation(r, c.style) for r in rows], 1 if c.pack else c.micro_batch)
        return [{k: v for k, v in r.items() if k != "_images"} for r in rows], [
            vlm_batch(part, tokenizer, model.config, images=images, rng=turn, max_pixels=c.max_pixels) for part in parts]

    if streamed:
        batches_of = stream(shards, c.batch_size, mine=mine, use="sft", seed=c.seed, workers=c.workers, turn=c.augment,
                            make=prepare, max_damaged=c.max_damaged, state=position,
                            weights=lambda step: moving_weights(step / max(1, c.steps - 1), shards, levels))
    else:
        jobs = zip(curriculum(records, c.steps, c.batch_size, rng), range(c.steps))
        batches_of = ((made, None) for made in ahead(prepare, itertools.islice(jobs, first, None), c.workers))
    run = Run(c.out, c, c.steps, "sft", first, c.profile)

    # ------------------------------------------------------------------------------------------------ loop
    for step in range(first, c.steps):
        lr = c.lr * min((step + 1) / max(1, c.warmup),
                        0.1 + 0.45 * (1 + math.cos(math.pi * step / c.steps)))
        (rows, batches), position = next(batches_of)
        if step == 0:                                                # assistant tokens and their <|im_end|> only
            run.text("trained", trained_tokens(tokenizer, batches[0]["input_ids"][0], batches[0]["labels"][0]))
        # One divisor for the whole batch: the parts of all micro-batches and processes add up to exactly one mean.
        if c.pack:
            batches = pack_rows(batches, c.pack, lambda rows: max(distributed.everyone([rows])))
        tokens, seen, patches = distributed.counts(batches)
        loss = torch.zeros((), device=device)
        for batch in batches:
            part = distributed.call(model, distributed.token_loss, distributed.to(batch, device)) / tokens
            (part * world).backward()                                # FSDP takes the mean over processes
            loss += part.detach()
        norm = distributed.clip_gradients(parameters, c.clip_norm)
        loss, norm = distributed.read(loss, norm)
        if check_finite(step, rows, skipped, c.max_skipped, loss=loss, grad_norm=norm):
            optimizer.step(lr)
            numbers = dict(loss=loss, grad_norm=norm)
        else:
            optimizer.zero_grad()
            numbers = dict(skipped=len(skipped))
        note = speed(run.lap(), seen, vlm_flops(model, tokens, seen, patches), world)
        hard = distributed.total(sum(r.get("level") == "hard" for r in rows)) / c.batch_size
        run.step(step, note=note, **numbers, lr=lr, hard=hard, tokens=tokens)
        stopped = distributed.asked_to_stop()
        if stopped or (c.save_every and (step + 1) % c.save_every == 0) or step + 1 == c.steps:
            position = agreed(position)
            checkpoint.save(c.out, model, optimizer, {"step": step + 1, "skipped": skipped, "stream": position}, tokenizer)
        if stopped:
            distributed.stop(step + 1)

    # ------------------------------------------------------------------------------------------------ evaluate, save
    seconds = run.seconds()
    run.close()
    del optimizer, parameters, batches_of
    model = distributed.whole(model)                                 # on the first process, which alone goes on
    distributed.leave()
    if rank:
        return
    fast = distributed.for_evaluation(model, device)
    ask = dict(max_new_tokens=c.max_new_tokens, prompt=c.style, images=Images(), max_pixels=c.max_pixels)
    results = {}
    if "test" in pools:
        results, each = evaluate(fast, tokenizer, c.data, items=c.eval_items, samples=c.eval_samples,
                                 sample_items=c.eval_sample_items, **ask)
        write_json(f"{c.out}/each.json", each)
    results["pools"] = {pool: evaluate(fast, tokenizer, c.data, pool=pool, items=c.eval_items, samples=0, **ask)[0]
                        for pool in ("test_combo", "test_stain") if pool in pools}
    if c.style == "cot" and "val" in pools:
        show_samples(fast, tokenizer, c.data, c.out, score=score, **ask)
    checkpoint.finish(c.out, model, tokenizer)
    damaged = {"damaged": position["damaged"]} if streamed else {}
    write_json(f"{c.out}/results.json", {"seconds": round(seconds, 1), **damaged, **results})    # last: it says the stage is done
    print(f"sft: {seconds:.0f} s" + "".join(f", {k} {results[k]:.3f}" for k in ("greedy_accuracy", "sampled_accuracy")
                                             if k in results))


def score(text, record):
    """The reward the RL stage would give (GRPO's reading), for the samples on the page."""
    parts = rewards.score_answer(text, record)
    return {**parts, "reward": rewards.combine(parts, "grpo_sum")}


def trained_tokens(tokenizer, ids, labels):
    """One training row as text, what is trained in [brackets]: look at it before a long run."""
    text = ""
    for trained, group in functools.reduce(
            lambda acc, pair: acc[:-1] + [(pair[1], acc[-1][1] + [pair[0]])] if acc and acc[-1][0] == pair[1]
            else acc + [(pair[1], [pair[0]])], zip(ids.tolist(), (labels >= 0).tolist()), []):
        piece = tokenizer.tokenizer.decode(group, skip_special_tokens=False)
        text += f"[{piece}]" if trained else piece
    return text


if __name__ == "__main__":
    distributed.launch(main)
