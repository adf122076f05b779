"""The plan on paper for full size: tokens, operations, memory and hours of every stage, for your own node too.

    python -m nanopatho.scale                                          # 8 x H100, the numbers of the paper
    python -m nanopatho.scale --gpus 4 --gpu A100 --mfu 0.35 --pairs 200000 --presets 3b
    python -m nanopatho.scale --write docs/SCALE.md

hours = operations / (GPUs x peak x MFU) / 3600, where a weight costs 2 operations a token forward and 4 backward, attention
4 x width for every pair of tokens that see each other in a layer (backward twice that), and recomputing layers in backward
one forward more. Sampling answers is not bound by operations but by memory: every step of decoding reads all weights and all
keys and values once. Parameters and memory come from plan.py, which tests compare with what is really allocated.
"""
import argparse
import math
import sys
from types import SimpleNamespace

from . import plan
from .log import PEAK, flops, vlm_flops
from .presets import CLIP, VLM

CARDS = {"H200": (4.8e12, 141e9), "H100": (3.35e12, 80e9), "A100": (2.04e12, 80e9), "L40S": (864e9, 48e9), "L4": (300e9, 24e9),
         "RTX 4090": (1.008e12, 24e9)}                               # bytes a second and bytes, from the makers' data sheets
# One epoch each. Counts are the paper's; lengths, which it does not publish, and efficiencies are guesses to be replaced.
GIVEN = dict(
    form=(1_600_000, "pairs of step 1 of Patho-CLIP, captions of form; step 2 takes all pairs"),
    pairs=(3_500_000, "image and caption pairs of stage 1"), cot=(500_000, "conversations of stage 2"),
    questions=(10_000, "questions of stage 3"), answers=(8, "answers sampled for each"),
    image_tokens=(512, "merged tokens of an image, 28 x 28 pixels each"), prompt_tokens=(128, "text tokens of a question"),
    caption_tokens=(128, "tokens of a caption"), cot_tokens=(512, "tokens of a conversation's answer"),
    answer_tokens=(512, "tokens of a sampled answer"), rounds=(1.0, "rollouts a step; more where DAPO replaces groups"),
    mfu=(0.4, "share of peak that training reaches"), bandwidth_share=(0.6, "share of bandwidth that decoding reaches"),
    step_ms=(20.0, "least milliseconds of a decoding step: launching its kernels; less with --graph"),
    room=(0.9, "share of a card's memory that may be planned"))


def settings(preset, c, micro=1, stage=""):
    """What plan.py asks of a script's Config, with the scripts' defaults (tests compare them)."""
    return SimpleNamespace(preset=preset, init="", train="vision,projector,decoder", optimizer="adamw",
                           batch_size=256 if stage == "clip" else 64,
                           micro_batch=micro, max_pixels=c.image_tokens * 28 ** 2, prompts=128, group_size=c.answers,
                           max_new_tokens=c.answer_tokens, algo="grpo", kl="algo")


def scores(model, text, image):
    """Operations of attention in one forward pass of one row: 4 x width for each pair of tokens that see each other. The
    decoder is causal; the tower's windows hold `window_size` pixels squared, its few full layers the whole image."""
    c, v = model.config, model.config["vision_config"]
    patches, window, full = 4 * image, (v["window_size"] // v["patch_size"]) ** 2, len(v["fullatt_block_indexes"])
    tower = v["hidden_size"] * patches * (full * patches + (v["depth"] - full) * min(window, patches))
    return 4 * (tower + c["hidden_size"] * c["num_hidden_layers"] * (text + image) ** 2 / 2)


def forward(model, rows, text, trained, image):
    """Operations of one forward pass over `rows` rows of text + image tokens, the head at `trained` of them."""
    return rows * (vlm_flops(model, trained, text + image, 4 * image) / 3 + scores(model, text, image))


def forward_clip(model, rows):
    """The same for pairs of Patho-CLIP, texts at full length (the script cuts a batch to its longest). The last layer of the
    image tower makes keys and values of all patches, two of its twelve width x width, and the rest for one position."""
    image, text = model.config["vision_config"], model.config["text_config"]
    patches, tokens = (image["image_size"] // image["patch_size"]) ** 2 + 1, text["max_position_embeddings"]
    depth = image["num_hidden_layers"]
    seen = image["hidden_size"] * (depth - 1) * patches ** 2 + text["hidden_size"] * text["num_hidden_layers"] * tokens ** 2 / 2
    positions = (model.vision_model.encoder, patches * (1 - 10 / 12 / depth)), (model.text_model.encoder, tokens)
    return rows * (flops(*positions) / 3 + 4 * seen)


def decode_seconds(model, c, card, rows):
    """Seconds in which one GPU writes one more token in each of `rows` rows: weights and half-grown caches read in bf16."""
    m = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if plan.part(n) == "decoder")
    weights -= model.model.embed_tokens.weight.numel() if model.lm_head is not None else 0     # looked up, not read
    kv = 2 * m["num_hidden_layers"] * m["hidden_size"] // m["num_attention_heads"] * m["num_key_value_heads"]
    read = plan.BF16 * (weights + kv * rows * ((c.image_tokens + c.prompt_tokens) / c.answers + c.answer_tokens / 2))
    return max(read / (CARDS[card][0] * c.bandwidth_share), 2 * weights * rows / (PEAK[card] * c.mfu), c.step_ms / 1e3)


def memory(model, stage, preset, c, card, gpus):
    """-> (micro-batch, bytes on one GPU, layers recomputed?) of the largest micro-batch that fits, recomputing only if none
    fits otherwise; (None, least bytes, True) if none does. `room` leaves space for what plan.py does not count."""
    whole = settings(preset, c, stage=stage)
    share = math.ceil((whole.prompts * c.answers if stage == "rl" else whole.batch_size) / gpus)
    for recompute in (False, True):
        for micro in [share >> k for k in range(share.bit_length())]:
            size = plan.peak(plan.memory(model, settings(preset, c, micro, stage), stage, gpus, recompute))
            if size <= CARDS[card][1] * c.room:
                return micro, size, recompute
    return None, size, True


def stage_plan(model, stage, preset, c, card, gpus):
    """-> dict of one stage ("clip", "pretrain", "sft", "rl"): rows, tokens, operations, hours (of which sampling), memory."""
    micro, size, recompute = memory(model, stage, preset, c, card, gpus)
    again, rate = 4 if recompute else 3, gpus * PEAK[card] * c.mfu
    if stage == "clip":
        rows, text, sampling = c.form + c.pairs, model.config["text_config"], 0.0
        tokens = rows * (model.vision_model.embeddings.position_embedding.num_embeddings + text["max_position_embeddings"])
        twice = micro != math.ceil(settings(preset, c, stage=stage).batch_size / gpus)     # the features, of several passes
        work = (again + twice) * forward_clip(model, rows)
    elif stage == "rl":
        rows, question = c.questions * c.answers, c.prompt_tokens
        tokens = c.questions * (c.image_tokens + question) + rows * c.answer_tokens
        # The prompt is computed once for its answers; each answer sees it and itself.
        alone = forward(model, c.questions, question, 0, c.image_tokens)
        seen = model.config["hidden_size"] * model.config["num_hidden_layers"] * (
            c.image_tokens + question + c.answer_tokens / 2)
        answers = rows * c.answer_tokens * (vlm_flops(model, 1, 1, 0) / 3 + 4 * seen)
        work = (again + 1) * (alone + answers)                         # update, and the reference's forward pass
        prompts = settings(preset, c).prompts                          # questions of a step, over all GPUs
        at_once, steps = prompts * c.answers / gpus, c.rounds * c.questions / prompts * c.answer_tokens
        sampling = steps * decode_seconds(model, c, card, at_once) + c.rounds * alone / rate
    else:
        rows, answer = (c.pairs, c.caption_tokens) if stage == "pretrain" else (c.cot, c.cot_tokens)
        text = answer + (c.prompt_tokens if stage == "sft" else 0)
        tokens, sampling = rows * (c.image_tokens + text), 0.0
        work = again * forward(model, rows, text, answer, c.image_tokens)
    return dict(preset=preset, stage=stage, rows=rows, images=c.questions if stage == "rl" else rows, tokens=tokens, work=work,
                sampling=sampling / 3600, hours=(work / rate + sampling) / 3600, micro=micro, memory=size, recompute=recompute)


def line(f):
    """One stage_plan as a row of the table."""
    one = "does not fit" if f["micro"] is None else f"{f['micro']} row(s){', recomputed' * f['recompute']}"
    return (f"| {f['preset']} | {f['stage']} | {f['rows']:,} | {f['tokens'] / 1e9:.2f} | {f['work'] / 1e18:,.1f} | "
            f"{f['memory'] / 1e9:.1f} | {one} | {f['hours']:.1f} | {f['sampling']:.1f} | "
            f"{f['images'] / f['hours'] / 3600:,.0f} |")


def table(c, presets, card, gpus):
    """The plan as Markdown."""
    lines = ["| model | stage | rows | tokens, 10^9 | operations, 10^18 | GB on each GPU | one pass | hours | of them sampling | images a second |",
             "|---|---|---:|---:|---:|---:|---|---:|---:|---:|"]
    for preset in presets:
        if preset in CLIP:
            lines.append(line(stage_plan(plan.build(SimpleNamespace(preset=preset), "clip"), "clip", preset, c, card, gpus)))
        if preset not in VLM:
            continue
        model = plan.build(SimpleNamespace(init="", preset=preset), "sft")
        found = [stage_plan(model, stage, preset, c, card, gpus) for stage in ("pretrain", "sft", "rl")]
        lines += map(line, found)
        lines.append(f"| {preset} | together | | {sum(f['tokens'] for f in found) / 1e9:.2f} | "
                     f"{sum(f['work'] for f in found) / 1e18:,.1f} | | | {sum(f['hours'] for f in found):.1f} | "
                     f"{sum(f['sampling'] for f in found):.1f} | |")
    return "\n".join(lines)


def document(c, presets, card, gpus):
    given = "\n".join(f"| `--{name}` | {vars(c)[name]:,} | {GIVEN[name][1]} |" for name in GIVEN)
    return f"""# Full size on paper

Reckoned by `python -m nanopatho.scale`, not measured: no full-size run has been made yet. With the options below it reckons
your own node; `--write docs/SCALE.md` writes this page. The formulas stand in `nanopatho/scale.py`, a line each.

{gpus} x {card}: {PEAK[card] / 1e12:,.0f} Tflop/s in bf16, {CARDS[card][0] / 1e12:g} TB/s and {CARDS[card][1] / 1e9:.0f} GB each.

{table(c, presets, card, gpus)}

Memory is that of plan.py: fp32 weights, gradients and moments shared out over the GPUs, bf16 at work, for RL the frozen
reference as well. "One pass" is the largest micro-batch that fits into {c.room:.0%} of a card, layers recomputed in backward
where nothing fits otherwise (the presets 3b and 7b recompute always, to be safe: up to a third more training operations
than here, `--recompute off` where the plan says that it fits). RL is GRPO; DAPO needs no reference, but up to `--max_rounds` times the sampling (`--rounds`).
Patho-CLIP (both steps, {c.form:,} and {c.pairs:,} pairs, batch 256, texts at full length) is whole on every GPU.
Not counted: evaluation, saving, the longest answer that others wait for, and reading images, for which see the last column:
opening a record of a shard with a picture of 224 x 224 pixels took a worker 1.0 ms of CPU time (measured on one AMD EPYC core,
`python -c "from tests.test_stream import benchmark; benchmark('/tmp/bench', 2000, 1, 224)"`), larger pictures in proportion to
their pixels. Eight GPUs with `--workers 4` have 32 such cores; what Patho-CLIP asks for is more than most nodes read and resize.

| option | here | meaning |
|---|---:|---|
{given}

The counts are the paper's. **MFU, bandwidth and step time are assumptions**, not measured here; the log line of
every script shows the MFU that is really reached: put it in. The hours go down in proportion.
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (value, text) in GIVEN.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} (default: {value:,})")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="H100", choices=CARDS)
    parser.add_argument("--presets", nargs="+", default=["clip-b16", "clip-l14", "3b", "7b"],
                        choices=["small", "clip-b16", "clip-l14", "3b", "7b"])
    parser.add_argument("--write", metavar="FILE", help="write the page instead of printing the table")
    c = parser.parse_args(argv)
    for name in (*GIVEN, "gpus"):
        most = 1 if name in ("mfu", "bandwidth_share", "room") else math.inf
        if not 0 < vars(c)[name] <= most:
            parser.error(f"--{name} {vars(c)[name]}: must be above 0" + ", and 1 at most" * (most == 1))
    if c.write:
        with open(c.write, "w", encoding="utf-8") as file:
            file.write(document(c, c.presets, c.gpu, c.gpus))
    else:
        print(table(c, c.presets, c.gpu, c.gpus))


if __name__ == "__main__":
    sys.exit(main())
