"""Stage 1, continued pretraining: figure and caption pairs teach the model to name what it sees (Patho-R1, section "CPT").

    python train_pretrain.py --preset tiny --data data/tiny --out runs/demo/pretrain
    python train_pretrain.py --preset 7b --data data/pairs --init weights/Qwen2.5-VL-7B-Instruct --out runs/cpt

Departures from the paper, which publishes no hyper-parameters for this stage:
 1. The text is raw (image, caption, <|endoftext|>), without chat template; the paper does not say which it used.
 2. Everything is trained by default; `--train projector,decoder` freezes the vision encoder.
 3. `tiny` starts from random weights: no published model is that small. Images are turned and mirrored (8 symmetries).
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                  # spinning threads are 10x slower on shared cores
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch

from nanopatho import checkpoint, distributed, presets
from nanopatho.chat import ChatTokenizer, train_tokenizer
from nanopatho.data import Images, caption_row, check_images, pack_rows, question_text, read_records, shuffled, vlm_batch
from nanopatho.evaluate import caption_claims, check_facts, read_lexicon
from nanopatho.log import Run, check_finite, speed, vlm_flops, write_json
from nanopatho.optim import Optimizers, lr_factors
from nanopatho.stream import agreed, ahead, images_of, mixture, shard_folders, stream
from nanopatho.vlm import PathoVLM, trainable


def say(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    preset: str = say("tiny", "size of the model and its training fields: smoke, tiny, small, 3b, 7b")
    data: str = say("data/tiny", "folder with captions.jsonl and the images, or of tar shards with a pool captions")
    mix: str = say("", "more folders of shards, FOLDER=WEIGHT joined by commas: 2 = their records come twice as often as --data's")
    init: str = say("", "folder of weights to start from (published layout); empty: random weights of the preset")
    out: str = say("runs/pretrain", "run folder: weights, metrics.jsonl, samples")
    seed: int = say(0, "seed of weights, order and augmentation")
    train: str = say("vision,projector,decoder", "parts that are trained", parts=("vision", "projector", "decoder"))
    steps: int = say(1000, "optimizer steps")
    batch_size: int = say(64, "pairs per step", least=1)
    lr: float = say(1e-5, "peak learning rate, cosine to a tenth")
    vision_lr: float = say(0.0, "peak learning rate of the vision tower, 0 = as --lr")
    projector_lr: float = say(0.0, "peak learning rate of the projector, 0 = as --lr")
    warmup: int = say(50, "steps of linear warm-up")
    optimizer: str = say("adamw", "adamw, or muon: Muon for the matrices of the layers, AdamW for the rest",
                         choices=("adamw", "muon"))
    weight_decay: float = say(0.05, "AdamW weight decay on matrices")
    clip_norm: float = say(1.0, "largest gradient norm")
    max_pixels: int = say(1280 * 28 * 28, "largest image in pixels; bigger ones are scaled down", least=1)
    augment: bool = say(True, "turn and mirror images (tissue has no up)")
    eval_items: int = say(128, "held-out captions written and checked at the end")
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


def main(argv=None):
    # ------------------------------------------------------------------------------------------------ config, device
    c = presets.parse(Config, "pretrain", argv)
    checkpoint.check_out(c, "pretrain")
    device, rank, world = distributed.start()                        # torchrun or not: see nanopatho/distributed.py
    mine = distributed.share(c.batch_size)                           # which rows of each batch this process computes
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    rng = np.random.default_rng(c.seed)

    # ------------------------------------------------------------------------------------------------ data
    streamed = shard_folders(c.data, c.init, c.mix)                  # tar shards: read while training, nanopatho/stream.py
    if streamed:
        shards = mixture(streamed, "captions")
    else:
        records = read_records(f"{c.data}/captions.jsonl", use="caption")
        check_images(records)
    if os.path.isfile(f"{c.data}/test.jsonl"):                       # a fault there must not wait for the end
        held_out = read_records(f"{c.data}/test.jsonl")[:c.eval_items]
        check_images(held_out), check_facts(held_out, read_lexicon(c.data))
    images = images_of if streamed else Images(workers=c.workers)

    # ------------------------------------------------------------------------------------------------ model
    if c.init:
        with checkpoint.reading(c.init):
            model, tokenizer = PathoVLM.from_pretrained(c.init, dtype=torch.float32), ChatTokenizer.load(c.init)
    else:
        texts = [r["caption"] for r in records]
        for name in ("sft", "rl"):                                   # the words of the later stages, their texts only
            if os.path.isfile(f"{c.data}/{name}.jsonl"):
                for r in read_records(f"{c.data}/{name}.jsonl"):
                    texts += [m["content"] for m in r.get("messages", [])]
                    texts += [question_text(r)] if "options" in r else []
        tokenizer = train_tokenizer(texts, presets.TINY_BPE)
        model = PathoVLM(presets.VLM[c.preset])
    trainable(model.train(), c.train.split(","))
    model.visual.recompute = model.model.recompute = c.recompute
    distributed.shard(model, [*model.visual.blocks, *model.model.layers], device, c.offload, c.compile)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if rank == 0:
        print(f"pretrain: {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters, "
              f"{sum(s['records'] for s in shards) if streamed else len(records)} pairs, {world} x {device.type}")

    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = Optimizers(model, c.lr, c.weight_decay, c.optimizer, factors=lr_factors(c.lr, c.vision_lr, c.projector_lr))
    state = checkpoint.resume(c.out, model, optimizer) or {}
    first, skipped, position = state.get("step", 0), state.get("skipped", []), state.get("stream")

    def prepare(rows, draw):
        """-> this process's records without pictures, and its micro-batches. Worker processes call it, ahead of the GPU."""
        turn = None
        if not streamed:                                             # from shards: its own rows alone, turned already
            rows = [records[i] for i in rows]
            if c.augment:
                turn = np.random.default_rng(draw)
                distributed.skip_augmentation(rows[:mine.start], turn)
            rows = rows[mine]
        parts = distributed.pieces([caption_row(r) for r in rows], 1 if c.pack else c.micro_batch)
        return [{k: v for k, v in r.items() if k != "_images"} for r in rows], [
            vlm_batch(part, tokenizer, model.config, images=images, rng=turn, max_pixels=c.max_pixels) for part in parts]

    if streamed:
        batches_of = stream(shards, c.batch_size, mine=mine, seed=c.seed, workers=c.workers, turn=c.augment,
                            make=prepare, max_damaged=c.max_damaged, state=position)
    else:                                                            # a run that goes on draws again what is behind it
        order = shuffled(len(records), c.batch_size, rng)
        jobs = ((next(order), rng.integers(1 << 62)) for _ in range(c.steps))
        batches_of = ((made, None) for made in ahead(prepare, itertools.islice(jobs, first, None), c.workers))
    run = Run(c.out, c, c.steps, "pretrain", first, c.profile)

    # ------------------------------------------------------------------------------------------------ loop
    for step in range(first, c.steps):
        lr = c.lr * min((step + 1) / max(1, c.warmup),
                        0.1 + 0.45 * (1 + math.cos(math.pi * step / c.steps)))
        (rows, batches), position = next(batches_of)
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
        run.step(step, note=note, **numbers, lr=lr, tokens=tokens)
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
    results = caption_claims(fast, tokenizer, c.data, c.eval_items, Images(), max_pixels=c.max_pixels)
    checkpoint.finish(c.out, model, tokenizer)
    damaged = {"damaged": position["damaged"]} if streamed else {}
    write_json(f"{c.out}/results.json", {"seconds": round(seconds, 1), **damaged, **results})
    print(f"pretrain: {seconds:.0f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in results.items() if isinstance(v, float)))


if __name__ == "__main__":
    distributed.launch(main)
