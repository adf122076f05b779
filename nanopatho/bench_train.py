"""A training step of this repository beside the same step in the library that people would take: same weights, same batches.

    pip install -e ".[bench]"
    python -m nanopatho.bench_train vlm --preset 3b                # an SFT step, beside transformers with its SDPA; CUDA
    python -m nanopatho.bench_train clip --preset clip-l14         # a Patho-CLIP step, beside open_clip; CUDA
    python -m nanopatho.bench_train vlm --preset tiny --threads 1 --rows 16 --image 16     # on a CPU

Each side is a process of its own, so that its peak of memory is its own; sides take turns, --rounds times over. A step: a
batch of random pictures and words, loss, backward, clipped gradients, AdamW (fused) on fp32 weights; bf16 at work on CUDA,
fp32 on a CPU. Answers have different lengths, from a quarter of --answer to all of it; only real tokens count. Losses of the
first step are compared: sides that do not compute the same are not timed against each other.

 vlm    ours: padded rows, as train_sft.py makes them; packed: the same with --pack; transformers: the padded rows under autocast
 clip   ours: texts cut to the batch's longest, as train_clip.py does it; open_clip: always its full context
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from . import distributed, presets
from .clip import CLIP, clip_loss, from_open_clip
from .data import pack_rows
from .image import normalised, patch_values
from .log import PEAK, ConfigError, flops, run_main, vlm_flops
from .optim import Optimizers
from .vlm import PathoVLM

SIDES = {"vlm": ("ours", "packed", "transformers"), "clip": ("ours", "open_clip")}
BATCHES = 4                                                          # different ones, in turn


def vlm_batches(config, c):
    """-> lists of samples in the form of data.vlm_batch, a row each: picture, question, answer of random length."""
    g = torch.Generator().manual_seed(0)
    rows = max(r for r in range(1, int(c.image ** 0.5) + 1) if c.image % r == 0)       # the squarest picture of c.image cells
    grid = torch.tensor([[1, 2 * rows, 2 * c.image // rows]])
    words = lambda n: torch.randint(min(1000, config["bos_token_id"]), (1, n), generator=g)
    fixed = lambda name, n=1: torch.full((1, n), config[name])
    found = []
    for _ in range(BATCHES):
        found.append([])
        for _ in range(c.rows):
            answer = words(int(torch.randint(max(1, c.answer // 4), c.answer + 1, (1,), generator=g)))
            ids = torch.cat([fixed("vision_start_token_id"), fixed("image_token_id", c.image), fixed("vision_end_token_id"),
                             words(c.prompt), answer], 1)
            labels = torch.full_like(ids, -100)
            labels[:, -answer.shape[1]:] = answer
            pixels = torch.randint(256, (4 * c.image, 588), dtype=torch.uint8, generator=g)
            found[-1].append(dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                                  image_grid_thw=grid))
    return found


def padded(samples):
    """Samples of one row each -> one batch, padded on the right."""
    T, out = max(s["input_ids"].shape[1] for s in samples), {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        out[name] = torch.cat([torch.nn.functional.pad(s[name], (0, T - s[name].shape[1]), value=fill) for s in samples])
    return out | {name: torch.cat([s[name] for s in samples]) for name in ("pixel_values", "image_grid_thw")}


def vlm_side(c, device):
    """-> step(number) -> loss, tokens a step, operations a step: means over the batches."""
    ours = PathoVLM.from_pretrained(c.weights, dtype=torch.float32) if c.side != "transformers" else None
    config = json.load(open(f"{c.weights}/config.json", encoding="utf-8"))
    samples = vlm_batches(config, c)
    trained = [sum(int((s["labels"] >= 0).sum()) for s in batch) for batch in samples]
    seen = [sum(s["input_ids"].shape[1] for s in batch) for batch in samples]
    with torch.device("meta"):
        shape = PathoVLM(config)
    work = statistics.mean(vlm_flops(shape, t, s, 4 * c.image * c.rows) for t, s in zip(trained, seen))
    if ours:
        ours.train()
        ours.visual.recompute = ours.model.recompute = c.recompute
        distributed.shard(ours, [*ours.visual.blocks, *ours.model.layers], device)
        optimizer, parameters = Optimizers(ours, 1e-5, 0.05), list(ours.parameters())
        rows = [pack_rows(batch, c.pack) if c.side == "packed" else [padded(batch)] for batch in samples]

        def step(number):
            loss = torch.zeros((), device=device)
            for batch in rows[number % BATCHES]:
                part = distributed.call(ours, distributed.token_loss, distributed.to(batch, device)) / trained[number % BATCHES]
                part.backward()
                loss += part.detach()
            loss, _ = distributed.read(loss, distributed.clip_gradients(parameters, 1.0))
            optimizer.step(1e-5)
            return loss
    else:
        from transformers import Qwen2_5_VLForConditionalGeneration
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(c.weights, dtype=torch.float32, attn_implementation="sdpa")
        model.to(device).train()
        if c.recompute:
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, (0.9, 0.95), weight_decay=0.05, fused=True)
        rows = [padded(batch) for batch in samples]

        def step(number):
            batch = {k: v.to(device) for k, v in rows[number % BATCHES].items()}
            batch["pixel_values"] = patch_values(batch["pixel_values"])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**batch, mm_token_type_ids=(batch["input_ids"] == config["image_token_id"]).int(), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()
    return step, statistics.mean(seen), work


def clip_side(c, device):
    """The same for Patho-CLIP; tokens are pictures here."""
    config, g = presets.CLIP[c.preset], torch.Generator().manual_seed(0)
    text, size = config["text_config"], config["vision_config"]["image_size"]
    pictures = torch.randint(256, (BATCHES, c.rows, 3, size, size), dtype=torch.uint8, generator=g)
    ids = torch.randint(1, text["bos_token_id"], (BATCHES, c.rows, text["max_position_embeddings"]), generator=g)
    ends = torch.randint(8, min(c.answer, ids.shape[2]), (BATCHES, c.rows, 1), generator=g)
    at = torch.arange(ids.shape[2])
    ids = ids.masked_fill(at > ends, 0).masked_fill(at == ends, text["eos_token_id"])
    ids[..., 0] = text["bos_token_id"]
    if c.side == "ours":
        model = CLIP(config)
        model.load_state_dict(from_open_clip(torch.load(c.weights))[1])
        model.to(device).train()
        patches, longest = model.vision_model.embeddings.position_embedding.num_embeddings, ends.amax((1, 2)) + 1
        work = flops((model.vision_model.encoder, c.rows * patches),
                     (model.text_model.encoder, c.rows * longest.float().mean().item()))
        for tower in (model.vision_model.encoder, model.text_model.encoder):
            tower.recompute = c.recompute
    else:
        model, work = open_clip_model(c.preset), None
        model.load_state_dict(torch.load(c.weights))
        model.set_grad_checkpointing(c.recompute)
        model.to(device).train()
    optimizer = Optimizers(model, 1e-5, 0.1, betas=(0.9, 0.98), eps=1e-6)

    def step(number):
        pixels = normalised(pictures[number % BATCHES].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if c.side == "ours":
                here = ids[number % BATCHES, :, :longest[number % BATCHES]].to(device)
                loss = clip_loss(model.encode_image(pixels).float(), model.encode_text(here).float(), model.logit_scale)
            else:
                from open_clip.loss import ClipLoss
                loss = ClipLoss()(*model(pixels, ids[number % BATCHES].to(device)))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1e-5)
        return torch.stack([loss.detach(), norm]).tolist()[0]
    return step, c.rows, work


def open_clip_model(preset):
    """open_clip's own model of the size of one of our presets."""
    from open_clip.model import CLIP as OpenCLIP, CLIPTextCfg, CLIPVisionCfg
    c = presets.CLIP[preset]
    v, t = c["vision_config"], c["text_config"]
    return OpenCLIP(c["projection_dim"], CLIPVisionCfg(
        layers=v["num_hidden_layers"], width=v["hidden_size"], head_width=v["hidden_size"] // v["num_attention_heads"],
        patch_size=v["patch_size"], image_size=v["image_size"]), CLIPTextCfg(
        context_length=t["max_position_embeddings"], vocab_size=t["vocab_size"], width=t["hidden_size"],
        heads=t["num_attention_heads"], layers=t["num_hidden_layers"]), quick_gelu=True)


def side(c):
    """One side in this process -> dict: losses and seconds of every step, tokens, operations, bytes at most."""
    if c.threads:
        torch.set_num_threads(c.threads)
    device, _, _ = distributed.start()
    torch.manual_seed(0)
    step, tokens, work = (vlm_side if c.what == "vlm" else clip_side)(c, device)
    losses, seconds = [], []
    for number in range(c.warmup + c.steps):
        began, cpu = time.perf_counter(), time.process_time()
        losses.append(step(number))                                  # a float: the device has finished
        seconds.append((time.perf_counter() - began, time.process_time() - cpu))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(losses=losses, seconds=seconds[c.warmup:], tokens=tokens, work=work, bytes=peak)


def begin(c, folder):
    """Write the random weights that all sides start from -> their folder or file."""
    torch.manual_seed(0)
    if c.what == "vlm":
        model = PathoVLM(presets.VLM[c.preset])
        (model.bfloat16() if c.preset in presets.PUBLISHED else model).save_pretrained(folder)
        return folder
    torch.save(open_clip_model(c.preset).state_dict(), f"{folder}/start.pt")
    return f"{folder}/start.pt"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SIDES)
    parser.add_argument("--preset", default="", help="default: 3b, clip-l14")
    parser.add_argument("--rows", type=int, default=0, help="samples a step (default: 8; clip 256)")
    parser.add_argument("--image", type=int, default=512, help="vlm: merged tokens of a picture, 28 x 28 pixels each")
    parser.add_argument("--prompt", type=int, default=64, help="vlm: tokens of a question")
    parser.add_argument("--answer", type=int, default=0, help="longest text in tokens (default: 512; clip 60)")
    parser.add_argument("--pack", type=int, default=4096, help="vlm: tokens of a packed row")
    parser.add_argument("--recompute", type=int, default=-1, help="1: keep block inputs only (default: 1 for 3b and 7b, else 0)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    c = parser.parse_args(argv)
    c.preset = c.preset or {"vlm": "3b", "clip": "clip-l14"}[c.what]
    c.rows, c.answer = c.rows or {"vlm": 8, "clip": 256}[c.what], c.answer or {"vlm": 512, "clip": 60}[c.what]
    c.recompute = c.preset in ("3b", "7b") if c.recompute < 0 else bool(c.recompute)
    if c.side:
        print(json.dumps(side(c)))
        return
    if c.preset not in (known := presets.VLM if c.what == "vlm" else presets.CLIP):
        parser.error(f"--preset {c.preset}: choose one of {', '.join(known)}")
    found = {name: [] for name in SIDES[c.what]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights = begin(c, folder)
            __import__(SIDES[c.what][-1])
        except ImportError as error:
            raise ConfigError(f"{error}: the other side needs it; pip install -e '.[bench]'") from error
        for turn in range(c.rounds):
            for name in found:
                command = [sys.executable, "-m", "nanopatho.bench_train", c.what, "--side", name, "--weights", weights]
                for field in ("preset", "rows", "image", "prompt", "answer", "pack", "steps", "warmup", "threads"):
                    command += [f"--{field}", str(getattr(c, field))]
                done = subprocess.run([*command, "--recompute", str(int(c.recompute))], capture_output=True, text=True)
                if done.returncode:
                    print(f"{name}, turn {turn + 1}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                    found[name].append(None)
                else:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(c, found))


def table(c, found):
    """What the sides returned, turn by turn -> the table as text; ratios are to the other library."""
    cuda = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {c.threads or os.cpu_count()} thread(s)"
    peak = next((value for name, value in PEAK.items() if name in where), None)
    lines = [f"{c.what} {c.preset}, {c.rows} rows a step, {'' if c.recompute else 'not '}recomputed, torch {torch.__version__}, {where}",
             f"{'':14}{'ms a step':>12}{'spread':>9}{'/s':>11}{'GB':>8}{'MFU':>7}{'first loss':>13}{'speed':>8}{'memory':>8}"]
    middle = lambda turns: statistics.median(s[0] for t in turns for s in t["seconds"])
    other = [t for t in found[SIDES[c.what][-1]] if t]
    for name, turns in found.items():
        turns = [t for t in turns if t]
        if not turns:
            lines.append(f"{name:14}failed, see above")
            continue
        t, each, size = middle(turns), [middle([x]) for x in turns], max(x["bytes"] for x in turns) / 1e9
        first = turns[0]["losses"][0]
        same = not other or abs(first - other[0]["losses"][0]) < (0.02 if cuda else 1e-4) * max(1.0, abs(first))
        against = (f"{middle(other) / t:7.2f}x{size * 1e9 / max(x['bytes'] for x in other):7.2f}x" if same else "   another loss: not compared"
                   ) if other else ""
        mfu = f"{turns[0]['work'] / t / peak:6.1%}" if peak and turns[0]["work"] else ""
        lines.append(f"{name:14}{1e3 * t:12.1f}{(max(each) - min(each)) / t:9.1%}{turns[0]['tokens'] / t:11,.0f}{size:8.2f}{mfu:>7}"
                     f"{first:13.5f}{against}")
    return "\n".join(lines + ["/s: tokens a second (clip: pairs); spread: between the turns; speed and memory: beside the last line"])


if __name__ == "__main__":
    run_main(main)
