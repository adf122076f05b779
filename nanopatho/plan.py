"""What a run will need, before it needs it: parameters, memory per GPU, tensor names. Nothing is allocated (meta).

    python train_rl.py --preset 7b --dry-run --world 8
    python train_sft.py --preset 3b --init weights/Qwen2.5-VL-3B-Instruct --dry-run     # compares names and shapes

Counted is what the scripts keep: weights, gradients and the optimizer's moments in fp32, shared out over the GPUs (CLIP: whole
on each), with the weights of the layer at work gathered in bf16; for RL a frozen copy for the KL term, and while answers are sampled a
whole copy in bf16 with their keys and values; and the tensors that backward needs, in bf16, layer by layer
(tests/test_plan.py compares them with those really kept). With --lora frozen weights are in bf16, and serve as the KL
term's reference. Not counted: CUDA's own half gigabyte, work space of the kernels, fragmentation.
"""
import math
import re

import torch

from . import lora
from .optim import HIDDEN

FP32, BF16 = 4, 2              # bytes; on a CPU everything is fp32
SAMPLING, UPDATE = ("copy to sample from", "keys and values"), ("gradients", "gathered weights", "activations")
PROMPT, ANSWER = 256, 512      # guesses: text tokens of a prompt, and of an answer in stages 1 and 2


def build(config, stage):
    """The model a script would start from, on meta: of the folder --init (names and shapes are compared), or preset."""
    from . import presets, weights
    from .clip import CLIP
    from .vlm import PathoVLM
    if stage != "clip" and config.init:
        model = weights.match(PathoVLM, weights.find_folder(config.init))[0]
    else:
        with torch.device("meta"):
            model = CLIP(presets.CLIP[config.preset]) if stage == "clip" else PathoVLM(presets.VLM[config.preset])
    if getattr(config, "lora", 0):
        lora.add(model, config.lora)
    return model


def part(name):
    """Tensor name -> the part of the model, in the words of --train (CLIP: a tower, or the projections), or lora."""
    if lora.only({name: None}):
        return "lora"
    if name.startswith(("vision_model.", "text_model.")):
        return name.split("_")[0]
    if name.startswith("visual."):
        return "projector" if name.startswith("visual.merger.") else "vision"
    return "decoder" if name.startswith(("model.", "lm_head.")) else "projections"


def patterns(named):
    """[(name, shape)] -> the same with one line for all layers, layers.{0..35}.bias: exact, and short enough to read."""
    groups = {}
    for name, shape in named:
        before, layer, after = re.fullmatch(r"(?:(.*(?:layers|blocks)\.)(\d+))?(.*)", name).groups()
        groups.setdefault((before or "", after, tuple(shape)), []).append(layer)
    return [(before + (f"{{{at[0]}..{at[-1]}}}" if len(at) > 1 else at[0] or "") + after, shape)
            for (before, after, shape), at in groups.items()]


def trained_parts(config):
    return ["lora"] if getattr(config, "lora", 0) else getattr(config, "train", "").split(",")


def passes(config, stage, world):
    """-> (prompts, answers to each, answer tokens) of one forward and backward pass on one GPU, at most."""
    if stage == "rl":
        answers = min(config.micro_batch, math.ceil(config.prompts * config.group_size / world))
        return math.ceil(answers / config.group_size), config.group_size, config.max_new_tokens
    rows = math.ceil(config.batch_size / world)
    if pack := getattr(config, "pack", 0):                           # a row of samples end to end; one sample is never cut
        return max(1, pack // (config.max_pixels // 28 ** 2 + PROMPT + ANSWER)), 1, ANSWER
    return min(getattr(config, "micro_batch", 0) or rows, rows), 1, ANSWER


def kv_width(c):
    return c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]


def layer_numbers(kind, width, inner, kv=0):
    """Numbers that backward keeps of one token in one layer: what the norms keep and hand on, q, k, v, the attended
    values, and four widths of the gated MLP (CLIP: three of its plain one)."""
    return dict(decoder=6 * width + 2 * kv + 4 * inner, vision=10 * width + 4 * inner, clip=8 * width + 3 * inner)[kind]


def activations(model, config, stage, world, recompute=False, size=BF16):
    """Bytes that one forward pass keeps on one GPU for its backward; `size` bytes a number, the scores in fp32.

    recompute: of each layer only its input stays, and one layer at a time is opened. A vision tower that is not trained
    keeps nothing.
    """
    c, (prompts, answers, length) = model.config, passes(config, stage, world)
    v, trained = c["vision_config"], trained_parts(config)
    if stage == "clip":
        t, scores, numbers = c["text_config"], 0, 0
        towers = (v, (v["image_size"] // v["patch_size"]) ** 2 + 1), (t, t["max_position_embeddings"])
        stacks = [("clip", x["hidden_size"], x["intermediate_size"], 0, x["num_hidden_layers"], prompts * n)
                  for x, n in towers]
    else:
        image, kv = config.max_pixels // 28 ** 2, kv_width(c)
        patches, tokens = 4 * prompts * image, prompts * (image + PROMPT + answers * length)
        stacks = [("vision", v["hidden_size"], v["intermediate_size"], 0, v["depth"], patches)] * ("vision" in trained)
        stacks += [("decoder", c["hidden_size"], c["intermediate_size"], kv, c["num_hidden_layers"], tokens)]
        merger = "vision" in trained or "projector" in trained
        # the pixels and the merger; embeddings and last norm
        numbers = patches * (1176 * ("vision" in trained) + 5 * v["hidden_size"] * merger) + 4 * tokens * c["hidden_size"]
        scores = 2 * prompts * answers * length * c["vocab_size"]    # the scores and their log-softmax
    opened = [layer_numbers(*of) * many for *of, _, many in stacks]
    numbers += sum(layers * (many * width if recompute else one)
                   for (_, width, *_, layers, many), one in zip(stacks, opened))
    return size * (numbers + (max(opened) if recompute else 0)) + FP32 * scores


def memory(model, config, stage, world, recompute=False):
    """-> {what: bytes on one GPU}. SAMPLING and UPDATE take turns, the rest is there all the time: see peak."""
    trained, named, sizes = trained_parts(config), dict(model.named_parameters()), {}
    update = {n: p.numel() for n, p in named.items() if stage == "clip" or part(n) in trained}
    muon = sum(k for n, k in update.items() if config.optimizer == "muon" and named[n].ndim == 2 and HIDDEN.search(n))
    every, update = sum(p.numel() for p in named.values()), sum(update.values())
    for n, p in named.items():
        layer = re.match(r".*(?:layers|blocks)\.\d+", n)             # None: outside of them, gathered all the time
        sizes[layer and layer[0]] = sizes.get(layer and layer[0], 0) + p.numel()
    fixed = (every - update) * (trained == ["lora"])                 # in bf16
    shares = 1 if stage == "clip" else world                         # CLIP is whole on every GPU, and cast to bf16 there
    out = {"weights": (FP32 * (every - fixed) + BF16 * fixed) / shares, "gradients": FP32 * update / shares,
           "optimizer": FP32 * (2 * update - muon) / shares,         # AdamW keeps two moments, Muon one
           "gathered weights": BF16 * (every if stage == "clip" else sizes.pop(None) + max(sizes.values()))}
    if stage == "rl":
        if trained != ["lora"] and (float(config.kl) > 0 if config.kl != "algo" else config.algo == "grpo"):
            out["reference model"] = FP32 * every / world
        c, prompts = model.config, math.ceil(config.prompts / world)
        tokens = config.max_pixels // 28 ** 2 + PROMPT + config.group_size * config.max_new_tokens
        out["copy to sample from"] = BF16 * every
        out["keys and values"] = BF16 * 2 * kv_width(c) * c["num_hidden_layers"] * prompts * tokens
    return out | {"activations": activations(model, config, stage, world, recompute)}


def peak(told):
    """memory(...) -> bytes that one GPU needs at most."""
    return sum(told.values()) - min(sum(told.get(name, 0) for name in names) for names in (SAMPLING, UPDATE))


def describe(config, stage, world=1):
    """The plan of one run as text."""
    model = build(config, stage)
    named = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]
    total, trained = sum(n for *_, n in named), trained_parts(config)
    lines = [f"{stage}, {config.preset}: {total:,} parameters in {len(named)} tensors, {2 * total:,} bytes as bf16"]
    for name in dict.fromkeys(part(n) for n, *_ in named):
        state = "trained" if stage == "clip" or name in trained else "frozen"
        lines.append(f"  {name:12}{sum(k for n, _, k in named if part(n) == name):15,}  {state}")
    told = [memory(model, config, stage, world, recompute) for recompute in (False, True)]
    lines += ["", f"memory on each of {world} GPU(s), in GB = 10^9 bytes; right: with layers recomputed in backward"]
    lines += [f"  {name:20}" + "".join(f"{t[name] / 1e9:12.2f}" for t in told) for name in told[0]]
    lines += [f"  {'at most':20}" + "".join(f"{peak(t) / 1e9:12.2f}" for t in told)]
    prompts, answers, length = passes(config, stage, world)
    what = f"{prompts} pair(s)" if stage == "clip" else (
        f"{prompts} prompt(s) of {config.max_pixels // 28 ** 2} image and {PROMPT} text tokens, each with {answers} "
        f"answer(s) of {length} tokens")
    lines += [f"  one pass, at most: {what}", "", "tensors"]
    return "\n".join(lines + [f"  {name} {shape}" for name, shape in patterns([(n, s) for n, s, _ in named])])
