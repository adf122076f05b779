"""Tokenizer, chat template, prompts, which tokens are trained; and a model to ask.

    python -m nanopatho.chat --model runs/demo/dapo --image tile.png --question "Which material?" --options fat mucin
    python -m nanopatho.chat --model runs/demo/dapo --image a.png b.png     # no question: a conversation, line by line

The first half needs `tokenizers` only (no transformers); asking (from `stream` on) needs torch and vlm.py.

Qwen2.5-VL's template: every turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n`; an image is `<|vision_start|>`, one
`<|image_pad|>` per merged cell, `<|vision_end|>`; the open assistant turn is `<|im_start|>assistant\\n`. Special tokens are
placed by id and never by text: a user who types `<|im_end|>` gets plain characters.

Trained are the assistant's tokens and the `<|im_end|>` that closes them, nothing else.
"""
import argparse
import functools
import json
import os
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

IMAGE = "<image>"
# The prompts of the paper's README in our own, shorter words; the tags are its own (Patho-R1 README, "Inference").
PROMPTS = {
    "cot": "You are a pathology expert. Think step by step, then answer.",
    "cod": "You are a pathology expert. Think in a short draft, at most five words a step, then answer.",
    "bare": "You are a pathology expert. Answer at once.",
    "plain": "You are a helpful assistant.",
}
# Qwen2.5's added tokens in the order of their ids (151643 ... 151664); the last eight are not "special" there.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")                                          # Qwen2.5's own pre-tokenizer, from its tokenizer.json

# Qwen2.5-VL's template as other programs read it, written from its rules (docstring above)
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# What travels with the weights besides tokenizer.json: kept as it was found, written by `save` where there was none.
COMPANIONS = ("tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "chat_template.json",
              "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
              "processor_config.json")


def read_tokenizer(path):
    """tokenizer.json -> tokenizers.Tokenizer; FileNotFoundError or ValueError names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: weights need the tokenizer they were trained with; copy it there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:                                       # `tokenizers` raises no narrower class
        raise ValueError(f"{path}: cannot be read as a tokenizer ({error}); copy it again from the model") from error


class ChatTokenizer:
    """A `tokenizers.Tokenizer` with the ids this project needs. `encode` never yields a special token.

    files: {name: bytes} to be saved unchanged, as found beside the weights; empty for a tokenizer trained here.
    """

    def __init__(self, tokenizer, files=None):
        self.tokenizer, self.files = tokenizer, files or {}
        tokenizer.encode_special_tokens = True                       # "<|im_end|>" inside a text is text
        self.id = {}
        for token in SPECIAL:
            self.id[token] = tokenizer.token_to_id(token)
            if self.id[token] is None:
                raise ValueError(f"tokenizer.json has no token {token}: this is not a Qwen2.5-VL tokenizer")
        self.pad_id, self.end_id = self.id["<|endoftext|>"], self.id["<|im_end|>"]
        self.eos_ids = (self.end_id, self.pad_id)
        # What a policy must never sample: image and vision marks (a sampled <|image_pad|> breaks the next forward pass) and
        # turn starts. The scorer masks the same ids, so sampler and scorer share one distribution (facts: verl #1640).
        self.banned_ids = tuple(i for t, i in self.id.items() if i not in self.eos_ids)
        self.encode = functools.lru_cache(maxsize=65536)(self._encode)

    def _encode(self, text):
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids):
        """Token ids -> text, special tokens dropped."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder):
        """tokenizer.json, chat template, image and generation settings: all that others need beside the weights."""
        from .image import PREPROCESSOR
        own = {"tokenizer_config.json": dict(
                   tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                   clean_up_tokenization_spaces=False, chat_template=TEMPLATE),
               "generation_config.json": dict(do_sample=False, eos_token_id=self.eos_ids, pad_token_id=self.pad_id),
               "preprocessor_config.json": PREPROCESSOR}
        files = {name: json.dumps(content, indent=2).encode() for name, content in own.items()}
        for name, content in {"tokenizer.json": self.tokenizer.to_str().encode(), **files, **self.files}.items():
            partial = Path(folder) / f"{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, Path(folder) / name)

    @classmethod
    def load(cls, folder):
        """tokenizer.json and what stands beside it, of a folder or of a hub id that was downloaded.

        ValueError if it does not fit the config.json there: another image token, or more tokens than embedding rows.
        """
        from .weights import find_folder, read_json
        folder = find_folder(folder)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        read = cls(tokenizer, {name: (folder / name).read_bytes() for name in ("tokenizer.json", *COMPANIONS)
                               if (folder / name).is_file()})
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        image_id, rows = config.get("image_token_id"), (config.get("text_config") or config).get("vocab_size")
        if image_id not in (None, read.id["<|image_pad|>"]):
            wrong = f"<|image_pad|> has id {read.id['<|image_pad|>']}, config.json says {image_id}"
        elif rows and max(tokenizer.get_vocab().values()) >= rows:
            wrong = f"its highest id is {max(tokenizer.get_vocab().values())}, the embedding has {rows} rows"
        else:
            return read
        raise ValueError(f"{folder}/tokenizer.json: {wrong}: they belong to different models; put the right "
                         "tokenizer.json there")


def train_tokenizer(texts, bpe_size):
    """Byte-level BPE with Qwen's rules on `texts` (iterable of str) -> ChatTokenizer; special ids start at bpe_size.

    Fewer merges than asked for (a small corpus) are filled with unused entries, so that ids do not depend on the corpus.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=bpe_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    missing = bpe_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(missing)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(ADDED)
    assert tokenizer.token_to_id(SPECIAL[0]) == bpe_size
    return ChatTokenizer(tokenizer)


def image_tokens(grid, merge=2):
    """image_grid_thw (N, 3) -> list of N counts of `<|image_pad|>`: t*h*w / merge^2."""
    return (grid.prod(dim=1) // merge ** 2).tolist()


def render(messages, tokenizer, image_counts, kind="chat", system=None, where=""):
    """Messages -> (token ids, trained flags), both lists of length T.

    kind "chat": all turns; "prompt": all turns, then an open assistant turn; "text": contents only, no template, closed by
    `<|endoftext|>`, images not trained. A default system turn is added when the first role is not system (as in Qwen's
    template). image_counts: tokens per image, in order. Raises ValueError naming `where` when marks and images differ.
    """
    ids, trained = [], []

    def add(tokens, keep=False):
        ids.extend(tokens)
        trained.extend([keep] * len(tokens))

    counts = list(image_counts)
    marks = sum(m["content"].count(IMAGE) for m in messages)
    if marks != len(counts):
        raise ValueError(f"{where}: the messages hold {marks} {IMAGE} marks, but {len(counts)} image(s) were given")

    def add_content(text, keep, prefix=""):
        # Between two special tokens Qwen's tokenizer sees one string: the role and the text are encoded together.
        parts = text.split(IMAGE)
        for i, part in enumerate(parts):
            if i:
                n = counts.pop(0)
                add([tokenizer.id["<|vision_start|>"]] + [tokenizer.id["<|image_pad|>"]] * n
                    + [tokenizer.id["<|vision_end|>"]])
            if prefix + part:
                add(tokenizer.encode(prefix + part), keep)
            prefix = ""

    start, end = [tokenizer.id["<|im_start|>"]], [tokenizer.end_id]
    if kind == "text":
        for m in messages:
            add_content(m["content"], keep=m["role"] == "assistant")
        add([tokenizer.pad_id], True)
        return ids, trained
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system or PROMPTS["plain"]}, *messages]
    for m in messages:
        add(start)
        if m["role"] == "assistant":                                 # encoded apart: sampling starts behind "assistant\n"
            add(tokenizer.encode("assistant\n"))
            add_content(m["content"], True)
            add(end, True)
        else:
            add_content(m["content"], False, prefix=m["role"] + "\n")
            add(end)
        add(tokenizer.encode("\n"))
    if kind == "prompt":
        add(start + list(tokenizer.encode("assistant\n")))
    return ids, trained


# --- Patho-CLIP's text side: lower-case BPE with </w>, start and end of text as the two highest ids -------------------
def clip_tokenizer(texts, vocab_size):
    """Train CLIP's kind of tokenizer on `texts` -> tokenizers.Tokenizer with SOT = vocab-2 and EOT = vocab-1."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                                 normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
                             behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Single letters that end a word are given, in order: left to the trainer they get ids in hash order, anew in every run.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
                                  special_tokens=[c + "</w>" for c in alphabet], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]                # a clean model: the given tokens are not special
    tokenizer, rules = Tokenizer(models.BPE(learned["vocab"], [tuple(pair) for pair in learned["merges"]],
                                            end_of_word_suffix="</w>")), tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    tokenizer.decoder = rules.decoder
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(vocab_size - 2 - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def clip_ids(tokenizer, texts, context=77):
    """Texts -> (B, context) long: SOT, tokens, EOT, zeros. A text that is too long loses its tail, never its EOT."""
    import torch
    tokenizer.encode_special_tokens = True
    sot, eot = tokenizer.token_to_id("<|startoftext|>"), tokenizer.token_to_id("<|endoftext|>")
    out = torch.zeros(len(texts), context, dtype=torch.long)
    for row, text in zip(out, texts):
        ids = [sot, *tokenizer.encode(text, add_special_tokens=False).ids[:context - 2], eot]
        row[:len(ids)] = torch.tensor(ids)
    return out


# --- Asking a model ---------------------------------------------------------------------------------------------------
def likelihoods(logits, seen, settings):
    """(V,) logits -> (V,) log-probabilities to choose the next token by, as generation_config.json asks.

    Fields, in transformers' order: repetition_penalty (on the ids `seen`, the prompt's included), and with do_sample
    temperature, top_k, top_p; a missing one changes nothing. (generate.py, which training uses, has none of these: a
    policy gradient needs the probabilities of the policy itself.)
    """
    penalty, some = settings.get("repetition_penalty") or 1.0, logits[seen]
    logits = logits.index_copy(0, seen, some.where(some < 0, some / penalty).where(some >= 0, some * penalty))
    if settings.get("do_sample"):
        logits = logits / (settings.get("temperature") or 1.0)
        if settings.get("top_k"):
            least = logits.topk(min(settings["top_k"], len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        ordered, order = logits.sort()                               # ascending: the tail to cut comes first
        tail = ordered.softmax(0).cumsum(0) <= 1 - (settings.get("top_p") or 1.0)
        tail[-1] = False
        logits = logits.index_fill(0, order[tail], float("-inf"))
    return logits.log_softmax(0)


def stream(model, ids, pixels, grid, settings, *, limit, banned=(), generator=None):
    """Yield the tokens of an answer to one prompt, ids (1, T), one by one; the last is one of settings["eos_token_id"],
    unless `limit` tokens were not enough. `banned` ids cannot come."""
    import torch

    from .decoder import KVCache
    from .vlm import mrope_positions
    c, decoder, ends = model.config, model.model, settings["eos_token_id"]
    ends = {ends} if isinstance(ends, int) else set(ends)
    banned, seen = torch.tensor(list(banned), dtype=torch.long, device=ids.device), ids[0].unique()
    with torch.no_grad():
        positions, after = mrope_positions(ids, grid, None, c["image_token_id"], model.visual.merge)
        x, capacity = model.embed(ids, pixels, grid), ids.shape[1] + limit
        cache = KVCache(len(decoder.layers), 1, c["num_key_value_heads"], capacity, decoder.head_width, x.dtype,
                        ids.device)
        for step in range(limit):
            h = decoder(x, *decoder.rotary(positions), None, cache)[0, -1]                        # (E,)
            logp = likelihoods(model.logits(h).index_fill(0, banned, float("-inf")), seen, settings)
            token = logp.argmax(0, keepdim=True)
            if settings.get("do_sample"):
                token = torch.multinomial(logp.exp(), 1, generator=generator)
            yield int(token)
            if int(token) in ends:
                return
            seen = torch.cat((seen, token)).unique()
            x, positions = decoder.embed_tokens(token)[None], (after + step).expand(3, 1, 1)      # (1, 1, E), (3, 1, 1)


def influence(model, ids, pixels, grid, wanted):
    """How much each image token moved the log-probability of the tokens where `wanted` (1, T) is True.

    |gradient x feature| -> for each image an array (rows, cols) of its merged cells; the largest of all is 1. Saliency
    through the whole network, not attention weights; it shows influence, not proof of a reason.
    """
    import torch
    with torch.no_grad():
        features = model.visual(pixels, grid)
    features.requires_grad_(True)
    hidden = model.hidden_states(ids, image_grid_thw=grid, image_embeds=features)
    gradient, = torch.autograd.grad(model.token_logps(hidden, ids, wanted).sum(), features)
    heat = (gradient.float() * features.detach().float()).sum(-1).abs()                           # (C,)
    heat, shapes = (heat / heat.max().clamp_min(1e-12)).cpu(), [(h // 2, w // 2) for _, h, w in grid.tolist()]
    return [part.view(shape).numpy() for part, shape in zip(heat.split([h * w for h, w in shapes]), shapes)]


def draw_heat(pictures, heats):
    """PIL images and their heat (rows, cols) in 0..1 -> one picture: each image, beside it the same under the heat."""
    from PIL import Image
    tiles = []
    for picture, heat in zip(pictures, heats):
        scale = max(1, 448 // max(picture.size))
        picture = picture.resize((picture.width * scale, picture.height * scale))
        cover = Image.fromarray((heat * 200).astype("uint8")).resize(picture.size, Image.Resampling.BICUBIC)
        tiles += [picture, Image.composite(Image.new("RGB", picture.size, (255, 40, 0)), picture, cover)]
    sheet = Image.new("RGB", (sum(t.width for t in tiles), max(t.height for t in tiles)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (sum(t.width for t in tiles[:i]), 0))
    return sheet


def answer_span(reply, tokenizer):
    """Token ids of a reply -> (first, end) of the tokens inside <answer>; of the whole reply if there is none."""
    said = [tokenizer.decode(reply[:n]).partition("<answer>")[2].partition("</")[0] for n in range(len(reply) + 1)]
    inside = [n for n in range(len(reply)) if said[n + 1].rstrip("<") != said[n].rstrip("<")]     # a token may be ">B"
    return (inside[0], inside[-1] + 1) if inside else (0, len(reply))


def main(argv=None):
    import torch

    from . import checkpoint, rewards
    from .data import LETTERS, question_text
    from .image import ImageError, open_image, pixel_limits, qwen_pixels
    from .log import ConfigError
    from .vlm import PathoVLM
    from .weights import find_folder, read_json
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nThe first")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    say = parser.add_argument
    say("--model", required=True, help="folder of weights (a run, published ones), or a hub id that was fetched")
    say("--image", nargs="*", default=[], help="image files, shown with the first question")
    say("--question", help="ask this and end; without it each line of the input is a turn, `/image FILE` adds an image")
    say("--options", nargs="*", default=[], help="the choices, lettered A, B, ...")
    say("--prompt", default="cot", choices=sorted(PROMPTS), help="cot: step by step; cod: a short draft; or none of it")
    say("--heatmap", metavar="PNG", help="write where the (last) answer looked")
    say("--max_new_tokens", type=int, default=2048, help="longest answer")
    say("--max_pixels", type=int, help="largest image; default: the folder's preprocessor_config.json")
    say("--temperature", type=float, help="instead of generation_config.json: 0 = the likeliest token")
    say("--seed", type=int, default=0)
    say("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    c = parser.parse_args(argv)
    if min(c.max_new_tokens, c.max_pixels or 1) < 1 or (c.temperature or 0) < 0 or not (
            len(c.options) == 0 or 2 <= len(c.options) <= len(LETTERS)):
        parser.error(f"a number is not positive, or --options are not 2 to {len(LETTERS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    waiting = [open_image(path) for path in c.image]                 # pictures for the next question
    with checkpoint.reading(c.model, "--model"):
        folder = find_folder(c.model)
        low, high = pixel_limits(folder)
        tokenizer, settings = ChatTokenizer.load(folder), {}
        if (folder / "generation_config.json").is_file():
            settings = read_json(folder / "generation_config.json")
        dtype = getattr(torch, c.dtype or ("bfloat16" if device == "cuda" else "float32"))
        model = PathoVLM.from_pretrained(folder, dtype=dtype, device=device).eval().requires_grad_(False)
    settings["eos_token_id"] = settings.get("eos_token_id") or tokenizer.eos_ids
    if c.temperature is not None:
        settings.update(do_sample=c.temperature > 0, temperature=c.temperature)
    generator = torch.Generator(device=device).manual_seed(c.seed)
    messages, pictures = [{"role": "system", "content": PROMPTS[c.prompt]}], []

    def turn(question):
        user = question_text({"question": question, "options": c.options, "image": [None] * len(waiting)})
        talk, seen = [*messages, {"role": "user", "content": user}], [*pictures, *waiting]
        pixels, grid = qwen_pixels(seen, low, c.max_pixels or high) if seen else (None, None)
        try:
            ids, _ = render(talk, tokenizer, image_tokens(grid) if seen else [], kind="prompt", where="this question")
        except ValueError as error:                                  # it spells <image>
            raise ConfigError(str(error)) from error
        ids = torch.tensor([ids], device=device)
        pixels, grid = (pixels.to(device), grid.to(device)) if seen else (None, None)
        reply, shown, text = [], 0, ""
        for token in stream(model, ids, pixels, grid, settings, limit=c.max_new_tokens, banned=tokenizer.banned_ids,
                            generator=generator):
            reply.append(token)
            text = tokenizer.decode(reply)
            if not text.endswith("\ufffd"):                          # half a character: wait for its other bytes
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print(text[shown:])
        if reply[-1] not in tokenizer.eos_ids:
            print(f"(cut off after {len(reply)} tokens: --max_new_tokens)")
        response = rewards.parse_response(text)
        chosen = rewards.choice(response.answer, c.options)
        if response.format_ok:
            print("answer:", response.answer if chosen is None else f"{LETTERS[chosen]}. {c.options[chosen]}")
        elif c.prompt != "plain":
            print("answer: none can be read; the reply is not <think> ... </think><answer> ... </answer>")
        if c.heatmap and seen:
            first, end = (ids.shape[1] + n for n in answer_span(reply, tokenizer))
            ids = torch.cat((ids, torch.tensor([reply], device=device)), 1)
            wanted = torch.zeros_like(ids, dtype=torch.bool)
            wanted[:, first:end] = True
            draw_heat(seen, influence(model, ids, pixels, grid, wanted)).save(c.heatmap)
            print(f"{c.heatmap}: what moved {tokenizer.decode(ids[0, first:end])!r}")
        messages[:] = [*talk, {"role": "assistant", "content": text.replace(IMAGE, "")}]
        pictures.extend(waiting), waiting.clear()

    if c.heatmap and not waiting:
        parser.error("--heatmap needs an --image")
    if c.question is not None:
        return turn(c.question)
    for line in sys.stdin:
        try:
            if line.startswith("/image "):
                waiting.append(open_image(line.removeprefix("/image ").strip()))
            elif line.strip():
                turn(line.strip())
        except (ConfigError, ImageError) as error:                   # a slip of the pen does not end the conversation
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    from nanopatho import chat, log                                  # the module itself, not a second copy of it
    log.run_main(chat.main)
