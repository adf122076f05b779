"""Tokenizer, chat template, prompts, and which tokens are trained. Needs `tokenizers` only (no transformers).

Qwen2.5-VL's template: every turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n`; an image is `<|vision_start|>`, one
`<|image_pad|>` per merged cell, `<|vision_end|>`; the open assistant turn is `<|im_start|>assistant\\n`. Special tokens are
placed by id and never by text: a user who types `<|im_end|>` gets plain characters.

Trained are the assistant's tokens and the `<|im_end|>` that closes them, nothing else.
"""
import functools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

IMAGE = "<image>"
# The prompts of the paper's README in our own, shorter words; the tags are its own (Patho-R1 README, "Inference").
PROMPTS = {
    "cot": "You are a pathology expert. Think step by step, then answer.",
    "cod": "You are a pathology expert. Think in a short draft, then answer.",
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


def read_tokenizer(path):
    """tokenizer.json -> tokenizers.Tokenizer; FileNotFoundError or ValueError names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: weights need the tokenizer they were trained with; copy it there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:                                       # `tokenizers` raises no narrower class
        raise ValueError(f"{path}: cannot be read as a tokenizer ({error}); copy it again from the model") from error


class ChatTokenizer:
    """A `tokenizers.Tokenizer` with the ids this project needs. `encode` never yields a special token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
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
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))

    @classmethod
    def load(cls, folder):
        """tokenizer.json of a folder (or of a hub id that was downloaded); its ids must be those of the config.json there."""
        from .weights import find_folder
        folder = find_folder(folder)
        read, config = cls(read_tokenizer(folder / "tokenizer.json")), folder / "config.json"
        wanted = json.loads(config.read_text(encoding="utf-8")).get("image_token_id") if config.is_file() else None
        if wanted not in (None, read.id["<|image_pad|>"]):
            raise ValueError(f"{folder}/tokenizer.json: <|image_pad|> has id {read.id['<|image_pad|>']}, config.json says "
                             f"{wanted}: they belong to different models; put the right tokenizer.json there")
        return read


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
            add_content(m["content"].strip(), True)
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
