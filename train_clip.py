"""Stage 0, Patho-CLIP: an image tower and a text tower learn which caption belongs to which picture.

    python train_clip.py --preset tiny --data data/tiny --out runs/demo/clip
    python train_clip.py --preset clip-l14 --data data/pairs --init weights/clip-vit-large-patch14 --out runs/patho-clip

Two steps as in the paper: captions of morphology alone first (there: PathGen-1.6M; here: the field `morphology`), then
all pairs jointly (each record's `morphology` or `caption`, at even chance). One loss: symmetric InfoNCE over the batch.
What the paper leaves open, and departures:
 1. Learning rate, batch and schedule are not published. Ours: AdamW, one warm-up and one cosine over both steps; from
    scratch (`tiny`) Muon for the matrices of the towers, which was far ahead after 200 steps (docs/LOG.md).
 2. Pictures are turned and mirrored (8 symmetries; tissue has no up), and `--stain` varies their colours as another
    laboratory would. Unknown in the paper.
 3. `--partial 0.7` shows most texts in part, a random choice of their phrases. A text that names one finding asks for
    just this finding, so each is learned sooner, and short prompts mean something (docs/LOG.md).
 4. A text that is also true of another picture of the batch, since that one's caption says the same, is not counted as
    wrong there (clip.clip_loss, also_true). In a drawn world such pairs are common.
 5. `tiny` starts from random weights and its own small tokenizer, the paper from OpenAI's CLIP.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                  # spinning threads are 10x slower on shared cores
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nanopatho import checkpoint, distributed, presets
from nanopatho.chat import clip_ids, clip_tokenizer, read_tokenizer
from nanopatho.clip import CLIP, clip_loss
from nanopatho.data import DataError, Images, augment, check_images, read_records, shuffled
from nanopatho.evaluate import read_lexicon
from nanopatho.evaluate_clip import evaluate_pool, read_prompts, text_of
from nanopatho.image import clip_pixels, normalised
from nanopatho.optim import Optimizers
from nanopatho.stream import agreed, ahead, images_of, mixture, shard_folders, stream
from nanopatho.log import Run, check_finite, flops, speed, write_json


def say(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    preset: str = say("tiny", "size of the model and its training fields: smoke, tiny, small, clip-b16, clip-l14")
    data: str = say("data/tiny", "folder with captions.jsonl (and test.jsonl for the evaluation) and the images; or of tar shards "
                                 "with pools morphology (step 1, then beside the other) and captions (step 2)")
    mix: str = say("", "more folders of shards, FOLDER=WEIGHT joined by commas: 2 = their records come twice as often as --data's")
    init: str = say("", "weights to start from: HF folder, or .pt with a tokenizer.json beside it; empty: random")
    out: str = say("runs/clip", "run folder: weights, tokenizer.json, metrics.jsonl, results.json")
    seed: int = say(0, "seed of weights, order and augmentation")
    steps_morphology: int = say(6000, "optimizer steps of step 1, on the field morphology")
    steps_all: int = say(14000, "optimizer steps of step 2, on morphology or caption of all records")
    batch_size: int = say(256, "pairs per step; each has batch_size - 1 wrong texts to be told from", least=1)
    optimizer: str = say("adamw", "adamw, or muon: Muon for the towers' matrices, AdamW for the rest",
                         choices=("adamw", "muon"))
    lr: float = say(1e-5, "peak learning rate, cosine to zero over both steps")
    warmup: int = say(500, "steps of linear warm-up")
    weight_decay: float = say(0.1, "AdamW weight decay on matrices")
    clip_norm: float = say(1.0, "largest gradient norm")
    max_logit_scale: float = say(100.0, "largest inverse temperature (OpenAI's limit, for stability)")
    augment: bool = say(True, "turn and mirror pictures")
    stain: float = say(0.0, "stain augmentation: each channel's optical density times exp(u), |u| <= stain")
    partial: float = say(0.0, "share of texts shown in part: a random choice of their phrases")
    eval_items: int = say(1000, "held-out records used by the evaluation at the end, 0 = none")
    save_every: int = say(500, "steps between checkpoints, 0 = only at the end")
    micro_batch: int = say(0, "pairs per pass of one process, 0 = its whole share; does not change the result, but smaller "
                              "ones are encoded twice: every loss needs all features of the batch")
    recompute: bool = say(False, "keep only each block's inputs for the backward pass: less memory, a third more work")
    compile: bool = say(False, "torch.compile for each block")
    max_skipped: int = say(0, "steps with a loss or gradient that is not finite, passed over before the run stops")
    workers: int = say(4, "processes that open images and make batches ahead of the GPU, 0 = none")
    max_damaged: int = say(100, "records of shards that cannot be used, passed over before the run stops")
    log: str = say("off", "also log to tensorboard or wandb", choices=("off", "tensorboard", "wandb"), extra="log")
    profile: int = say(0, "steps to trace into trace.json, after three to warm up")
    threads: int = say(0, "CPU threads, 0 = all")


def phrases(text):
    """"Fat, no mitoses. This fits adenoma." -> ["Fat", "no mitoses", "This fits adenoma"]"""
    return [p for p in re.split(r"\s*[.,:;](?:\s+|$)", text.strip()) if p]


def shorten(text, rng):
    """A random choice of the text's phrases, in order, one at least; how many is drawn uniformly."""
    parts = phrases(text)
    keep = rng.random(len(parts)) < rng.random()
    keep[rng.integers(len(parts))] = True
    return ", ".join(p for p, k in zip(parts, keep) if k)


def draw_texts(rows, joint, partial, rng):
    """Records of a batch -> B texts, and (B, B) bool: every phrase of text j stands in a caption of record i.

    joint: step 2, morphology or caption; step 1 has morphology alone.
    """
    texts, known = [], []
    for r in rows:
        text = r["caption"] if joint and (not r.get("morphology") or rng.random() < 0.5) else r["morphology"]
        known.append({*phrases(r["caption"]), *phrases(r.get("morphology") or "")})
        texts.append(shorten(text, rng) if phrases(text) and rng.random() < partial else text)
    known_by, also_true = {}, torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for i, said in enumerate(known):
        for phrase in said:
            known_by.setdefault(phrase, set()).add(i)
    for j, text in enumerate(texts):                                 # by phrase, not by pair: pairs are many, twins few
        having = [known_by.get(phrase, set()) for phrase in phrases(text)]
        also_true[list(min(having, key=len).intersection(*having)) if having else slice(None), j] = True
    return texts, also_true


NOTHING = np.zeros((1, 1, 3), np.uint8)                              # in place of another process's picture


def restain(picture, strength, rng):
    """uint8 (H, W, 3) -> the same, each channel's optical density -log(I/255) scaled at random; white stays white."""
    scale = np.exp(rng.uniform(-strength, strength, 3))
    table = np.round(255 * (np.arange(256)[:, None] / 255) ** scale).astype(np.uint8)         # (256, 3): OD*s is I^s
    return np.stack([table[picture[..., channel], channel] for channel in range(3)], axis=-1)


def main(argv=None):
    # ------------------------------------------------------------------------------------------------ config, device
    c = presets.parse(Config, "clip", argv)
    checkpoint.check_out(c, "clip")
    device, rank, world = distributed.start()                        # torchrun or not: see nanopatho/distributed.py
    mine = distributed.share(c.batch_size)                           # which pairs of each batch this process encodes
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    total = c.steps_morphology + c.steps_all

    # ------------------------------------------------------------------------------------------------ data
    streamed, images = shard_folders(c.data, c.init, c.mix), Images(workers=c.workers)     # tar shards: nanopatho/stream.py
    if streamed:                                                     # step 1 reads the first pool, step 2 both
        have = {name: held for name, held in streamed.items() if "morphology" in held[1]} or streamed
        form = mixture(have, "morphology", also=("morphology",)) if c.steps_morphology else []
        sources = form + mixture(streamed, "captions")
        shares = np.array([s["weight"] for s in sources])
        sizes = [s["records"] for s in sources]
    else:
        records = read_records(f"{c.data}/captions.jsonl", use="caption")
        check_images(records)
        with_morphology = [r for r in records if r.get("morphology")]
        if c.steps_morphology and not with_morphology:
            raise DataError(f"{c.data}/captions.jsonl: no record has the field 'morphology' that step 1 reads; add it (a "
                            "caption of form alone, without a diagnosis), or set --steps_morphology 0")
        pools = with_morphology, records                             # of step 1 and step 2, each with an endless order
        orders = [shuffled(len(p), c.batch_size, np.random.default_rng([c.seed, i])) for i, p in enumerate(pools)]
        sizes = [*map(len, pools)]
    evaluated = c.eval_items and os.path.isfile(f"{c.data}/test.jsonl")
    if evaluated:                                                    # a fault there should not wait for the end
        held_out, lexicon = read_records(f"{c.data}/test.jsonl")[:c.eval_items], read_lexicon(c.data)
        check_images(held_out), [text_of(r, lexicon) for r in held_out]
        if os.path.isfile(f"{c.data}/zero_shot.json"):
            read_prompts(f"{c.data}/zero_shot.json")

    # ------------------------------------------------------------------------------------------------ model
    begun = checkpoint.begun(c.out)                                  # a run to be resumed
    with checkpoint.reading(c.init):
        model = CLIP.from_pretrained(c.init) if c.init else CLIP(presets.CLIP[c.preset])
    if begun or c.init:                                              # a .pt carries no vocabulary: it lies beside
        where = Path(c.out if begun else c.init)
        with checkpoint.reading(where, "--out" if begun else "--init"):
            tokenizer = read_tokenizer((where if where.is_dir() else where.parent) / "tokenizer.json")
            if tokenizer.get_vocab_size() > model.config["text_config"]["vocab_size"]:
                raise ValueError(f"{where}: tokenizer.json knows {tokenizer.get_vocab_size()} tokens, the weights "
                                 f"{model.config['text_config']['vocab_size']}: they belong to different models")
    else:
        tokenizer = clip_tokenizer([t for r in records for t in (r["caption"], r.get("morphology")) if t],
                                   model.config["text_config"]["vocab_size"])
    model.to(device).train()                                         # whole on every process: the gradients are added up
    towers = model.vision_model.encoder, model.text_model.encoder
    for tower in towers:
        tower.recompute = c.recompute
        for block in tower.layers if c.compile else []:
            block.forward = torch.compile(block.forward)
    context, size = model.config["text_config"]["max_position_embeddings"], model.config["vision_config"]["image_size"]
    if rank == 0:
        print(f"clip: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
              f"{' + '.join(map(str, sizes))} pairs, {device}")

    # ------------------------------------------------------------------------------------------------ optimizer
    parameters = list(model.parameters())
    optimizer = Optimizers(model, c.lr, c.weight_decay, c.optimizer, betas=(0.9, 0.98), eps=1e-6)  # OpenAI's values
    state = checkpoint.resume(c.out, model, optimizer) or {}
    first, skipped, position = state.get("step", 0), state.get("skipped", []), state.get("stream")

    def prepare(rows, step):
        """-> records without pictures (of this process's pairs, if streamed), the pixels of its micro-batches, and what draws
        on. Worker processes call it, ahead of the GPU. Every process draws for the whole batch, so that a pair looks the
        same whoever encodes it, but opens its own only."""
        rng, pictures = np.random.default_rng([c.seed, 2, step]), [NOTHING] * c.batch_size
        if streamed:                                                 # turned where they were read
            pictures[mine] = [images_of(r)[0] for r in rows]
        else:
            rows = [pools[step >= c.steps_morphology][i] for i in rows]
            pictures[mine] = [images(r)[0] for r in rows[mine]]
            if c.augment:
                pictures = [augment(p, rng) for p in pictures]
        if c.stain:
            pictures = [restain(p, c.stain, rng) for p in pictures]
        pixels = [clip_pixels(part, size, raw=True) for part in distributed.pieces(pictures[mine], c.micro_batch)]
        return [{k: v for k, v in r.items() if k != "_images"} for r in rows], pixels, rng

    if streamed:
        batches_of = stream(sources, c.batch_size, mine=mine, seed=c.seed, workers=c.workers, turn=c.augment, make=prepare,
                            max_damaged=c.max_damaged, state=position,
                            weights=lambda step: shares * (1 if step >= c.steps_morphology else np.arange(len(shares)) < len(form)))
    else:                                                            # a run that goes on draws again what is behind it
        jobs = ((next(orders[step >= c.steps_morphology]), step) for step in range(total))
        batches_of = ((made, None) for made in ahead(prepare, itertools.islice(jobs, first, None), c.workers))
    run = Run(c.out, c, total, "clip", first, c.profile)
    if rank == 0:
        tokenizer.save(f"{c.out}/tokenizer.json")

    def encode(pixels, texts):
        """-> image and text features (b, E) each, tokens. Equal texts are encoded once, and the batch is cut to its longest
        text: both change nothing but the time."""
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = clip_ids(tokenizer, list(unique), context)                      # (unique texts, T)
        ids = ids[:, :int(ids.argmax(1).max()) + 1].to(device)                # the end token has the highest id
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            image_features = model.encode_image(normalised(pixels.to(device, non_blocking=True)))   # (b, E)
            text_features = model.encode_text(ids)[[unique[t] for t in texts]]             # (b, E)
        return image_features, text_features, ids.numel()

    # ------------------------------------------------------------------------------------------------ loop
    for step in range(first, total):
        lr = c.lr * min((step + 1) / max(1, c.warmup), 0.5 * (1 + math.cos(math.pi * step / total)))
        joint = step >= c.steps_morphology
        (rows, pixels, rng), position = next(batches_of)
        rows = distributed.everyone(rows) if streamed else rows      # the texts of all processes are needed
        texts, also_true = draw_texts(rows, joint, c.partial, rng)            # also_true (B, B)
        parts = list(zip(pixels, distributed.pieces(texts[mine], c.micro_batch)))

        # 1. The features of this process's pairs; of several micro-batches without a graph, which is made again in step 3.
        with torch.set_grad_enabled(len(parts) == 1):
            found = [encode(*part) for part in parts]
        # 2. The loss compares all pairs of all processes: its gradient with respect to every feature.
        features = [distributed.gather(torch.cat(f).float()).requires_grad_() for f in list(zip(*found))[:2]]  # (B, E)
        loss = clip_loss(*features, model.logit_scale, also_true, mine if world > 1 else None)
        loss.backward()
        gradients = [g[mine] for g in distributed.add_up([f.grad for f in features])]
        # 3. From the features on into the towers.
        at = 0
        for part, f in zip(parts, found):
            n = len(part[0])
            f = encode(*part) if len(parts) > 1 else f
            torch.autograd.backward(f[:2], [g[at:at + n].to(f[0].dtype) for g in gradients])
            at += n
        distributed.add_up([p.grad for p in parameters])
        loss, norm = distributed.read(loss.detach(), distributed.clip_gradients(parameters, c.clip_norm))
        if check_finite(step, rows, skipped, c.max_skipped, loss=loss, grad_norm=norm):
            optimizer.step(lr)
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(c.max_logit_scale))
            numbers = dict(loss=loss, grad_norm=norm)
        else:
            optimizer.zero_grad()
            numbers = dict(skipped=len(skipped))
        tokens = distributed.total(sum(f[2] for f in found))
        patches = c.batch_size * model.vision_model.embeddings.position_embedding.num_embeddings
        note = speed(run.lap(), tokens + patches, flops((towers[0], patches), (towers[1], tokens)), world)
        run.step(step, note=note, **numbers, lr=lr, logit_scale=model.logit_scale.exp().item(),
                 unique_texts=len(set(texts)), phase=1 + joint)
        stopped = distributed.asked_to_stop()
        if stopped or (c.save_every and (step + 1) % c.save_every == 0) or step + 1 == total:
            position = agreed(position)
            checkpoint.save(c.out, model, optimizer, {"step": step + 1, "skipped": skipped, "stream": position})
        if stopped:
            distributed.stop(step + 1)

    # ------------------------------------------------------------------------------------------------ evaluate, save
    seconds = run.seconds()
    run.close()
    batches_of = None                                                # ends the workers of a stream
    distributed.leave()
    if rank:                                                         # the first process alone goes on
        return
    results = {"seconds": round(seconds, 1)} | ({"damaged": position["damaged"]} if streamed else {})
    if evaluated:
        for name, value in evaluate_pool(model, tokenizer, c.data, items=c.eval_items, images=images).items():
            results[name] = value
            if isinstance(value, dict) and "value" in value:         # one form in all stages: x, x_ci, x_n
                results |= {name: value["value"], f"{name}_ci": [value["low"], value["high"]], f"{name}_n": value["n"]}
    checkpoint.finish(c.out, model)
    write_json(f"{c.out}/results.json", results)
    print(f"clip: {seconds:.0f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in results.items() if isinstance(v, float)))


if __name__ == "__main__":
    distributed.launch(main)
