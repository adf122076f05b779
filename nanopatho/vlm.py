"""PathoVLM: vision tower, projector and decoder joined into Qwen2.5-VL. Tiny and 7B: this class with other numbers.

Source: arXiv 2502.13923 and the published weights; `state_dict()` names are the published names, `config` is the
published flat config.json. Patho-R1 (arXiv 2505.11404) is this model, further trained. Needs attention, projector, vit,
decoder, weights.

    model = PathoVLM(config)                       # random weights, ready to train
    logits = model(ids, pixel_values, grid)        # (B, T, V)
    h = model.hidden_states(ids, pixel_values, grid)
    loss = model.loss(h, labels)                   # the head runs only where there is something to predict

Letters: B rows, T tokens, E hidden width, V vocabulary, N images, C merged image tokens of all images, K labelled
tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Documents, kernels_for, padded_causal_mask
from .decoder import Decoder, KVCache
from .vit import VisionTower

# ---------------------------------------------------------------------------------------------------- configuration

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "rms_norm_eps", "image_token_id")
OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id",
            "vision_token_id", "video_token_id", "max_position_embeddings", "initializer_range")
# Defaults of the published class: a file may hold only what differs from them.
VISION_DEFAULTS = dict(depth=32, intermediate_size=3420, num_heads=16, out_hidden_size=3584, in_chans=3, patch_size=14,
                       spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                       fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=4, hidden_act="silu")


def parse_config(config: dict) -> dict:
    """Any of the three published forms of config.json -> the flat one, every field this code reads present.

    Flat (first release), flat and nested at once (transformers 4.5x), nested under text_config (5.x).
    `tie_word_embeddings` is None when the file does not say; from_pretrained then looks whether there is an lm_head.
    Unsupported variants are errors.
    """
    text, vision = config.get("text_config") or {}, config.get("vision_config")
    if config.get("model_type", "qwen2_5_vl") != "qwen2_5_vl" or not vision:
        raise ValueError(f"config: model_type {config.get('model_type')!r}, vision_config "
                         f"{'present' if vision else 'missing'}; only qwen2_5_vl with a vision_config is supported")

    def field(name, default=None):
        return text.get(name, config.get(name, default))

    rope = field("rope_parameters") or field("rope_scaling") or {}
    flat = {name: field(name) for name in NEEDED} | {name: field(name) for name in OPTIONAL if field(name) is not None}
    flat["rope_theta"] = rope.get("rope_theta", field("rope_theta"))
    missing = [name for name, value in flat.items() if value is None]
    missing += ["mrope_section"] * ("mrope_section" not in rope)
    missing += ["vision_config.hidden_size"] * ("hidden_size" not in vision)
    if missing:
        raise ValueError(f"config: missing {', '.join(missing)}")
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": list(rope["mrope_section"])}
    flat["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    flat["hidden_act"] = field("hidden_act", "silu")
    flat["vision_config"] = v = {name: vision.get(name, default) for name, default in VISION_DEFAULTS.items()}
    v["hidden_size"], v["in_chans"] = vision["hidden_size"], vision.get("in_chans", vision.get("in_channels", 3))

    kind = rope.get("rope_type", rope.get("type", "mrope"))
    width, heads, kv_heads = (flat[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    sections, cell = flat["rope_scaling"]["mrope_section"], v["spatial_merge_size"] * v["patch_size"]
    for wrong, what in (
        (kind not in ("mrope", "default"), f"rope type {kind!r} is not supported"),
        (flat["hidden_act"] != "silu" or v["hidden_act"] != "silu", "hidden_act other than silu"),
        (field("use_sliding_window", False), "use_sliding_window is not supported"),
        (field("attention_dropout", 0.0) != 0, "attention_dropout is not supported"),
        (width % heads, f"hidden_size {width} is not a multiple of num_attention_heads {heads}"),
        (heads % kv_heads, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"),
        (2 * sum(sections) != width // heads, f"mrope_section {sections}: not half the head width {width // heads}"),
        (v["out_hidden_size"] != width, f"vision out_hidden_size {v['out_hidden_size']} is not hidden_size {width}"),
        (v["hidden_size"] % (4 * v["num_heads"]), "vision hidden_size is not a multiple of 4 * num_heads"),
        (v["window_size"] % cell, f"window_size {v['window_size']} is not a multiple of {cell}"),
    ):
        if wrong:
            raise ValueError(f"config: {what}")
    return flat


# ---------------------------------------------------------------------------------------------------- positions


def mrope_positions(ids: Tensor, grid: Tensor | None, valid: Tensor | None, image_token_id: int, merge: int = 2):
    """-> rotary positions (3, B, T) long (time, row, column; 0 on padding), and (B,) the position of the next token.

    A text token takes the next free number on all three axes. An image starts at the next free number n: all its tokens
    have time n, rows n, n+1, ..., columns n, n+1, ...; then max(rows, columns) numbers are used up, fewer than it has
    tokens. Images are taken from `grid` (N, 3) in reading order. Three text tokens, a 2 x 2 image, a text token: row
    axis 0 1 2 3 3 4 4 5.
    """
    is_image = ids == image_token_id
    step = torch.ones_like(ids) if valid is None else valid.long()  # (B, T) how far a token moves the next free number
    if valid is not None:
        is_image &= valid.bool()
    row = column = 0
    shapes = [] if grid is None else [(h // merge, w // merge) for _, h, w in grid.tolist()]
    slots = is_image.flatten().nonzero().squeeze(1).cpu()  # (C,) where the image tokens sit in the flattened batch
    if (expected := sum(h * w for h, w in shapes)) != len(slots):
        raise ValueError(f"input_ids hold {len(slots)} image tokens (id {image_token_id}), but {len(shapes)} image(s) "
                         f"of {[h * w for h, w in shapes][:8]} tokens make {expected}: one needs grid_h * grid_w / "
                         f"{merge ** 2}")
    if shapes:
        counts = torch.tensor([h * w for h, w in shapes])  # (N,)
        last = counts.cumsum(0) - 1
        torn = (slots[last] - slots[last - counts + 1] != counts - 1).nonzero().flatten().tolist()
        if torn:
            raise ValueError(f"the tokens of image {torn[0]} (grid {grid[torn[0]].tolist()}) do not stand in one run")
        inside = torch.arange(len(slots)) - (last - counts + 1).repeat_interleave(counts)  # (C,) index within the image
        width = torch.tensor([w for _, w in shapes]).repeat_interleave(counts)
        moves = torch.zeros_like(slots)
        moves[last] = torch.tensor([max(h, w) for h, w in shapes])  # the image as a whole moves on at its last token
        slots = slots.to(ids.device)
        step.view(-1)[slots] = moves.to(ids.device)
        row, column = torch.zeros_like(step), torch.zeros_like(step)  # (B, T)
        row.view(-1)[slots], column.view(-1)[slots] = (inside // width).to(ids.device), (inside % width).to(ids.device)
    after = step.cumsum(1)
    start = after - step  # (B, T) the free number each token finds
    positions = torch.stack((start, start + row, start + column))  # (3, B, T)
    return (positions if valid is None else positions * valid.long()), after[:, -1]


# ---------------------------------------------------------------------------------------------------- model


class PathoVLM(nn.Module):
    """Parameters: `visual.*`, `model.*`, and `lm_head.weight` unless tied to the embedding (then `lm_head` is None)."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = parse_config(config)
        self.visual = VisionTower(self.config["vision_config"])
        self.model = Decoder(self.config)
        tied = self.config["tie_word_embeddings"]
        self.lm_head = None if tied else nn.Linear(self.config["hidden_size"], self.config["vocab_size"], bias=False)
        self.init_weights()

    def init_weights(self):
        """To train from scratch: normal(0, 0.02), biases 0, projections into the residual stream smaller (GPT-2)."""
        std = self.config.get("initializer_range", 0.02)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim > 1:
                    layers = len(self.visual.blocks if name.startswith("visual.") else self.model.layers)
                    into_residual = name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight"))
                    p.normal_(0, std * (2 * layers) ** -0.5 if into_residual else std)
                elif name.endswith("bias"):
                    p.zero_()

    @property
    def head(self) -> Tensor:
        """(V, E) the output matrix, wherever it lives."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, *inputs, **more) -> Tensor:
        """-> logits (B, T, V) fp32. Arguments as for hidden_states."""
        return self.logits(self.hidden_states(*inputs, **more))

    def hidden_states(self, input_ids: Tensor, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None,
                      attention_mask: Tensor | None = None, *, position_ids: Tensor | None = None,
                      image_embeds: Tensor | None = None, cache: KVCache | None = None,
                      documents: Tensor | None = None) -> Tensor:
        """-> (B, T, E) after the final norm; rows at padding are finite and meaningless.

        input_ids (B, T) with every image as a run of image_token_id; pixel_values (P, 1176), image_grid_thw (N, 3):
        images in reading order over the batch. attention_mask (B, T) 1 at real tokens, padding left or right.
        position_ids (3, B, T) override. image_embeds (C, E) = visual(...) computed before, instead of pixel_values: one
        image can then serve many rows. documents (n,): B is 1 and the row holds n samples of so many tokens end to end
        (data.pack_rows). Each has its own positions and sees nothing of the others.
        """
        valid = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            position_ids, _ = mrope_positions(input_ids, image_grid_thw, valid, self.config["image_token_id"],
                                              self.visual.merge)
        if documents is not None:
            sizes, first = documents.tolist(), documents.cumsum(0) - documents
            if input_ids.shape != (1, sum(sizes)):
                raise ValueError(f"input_ids {tuple(input_ids.shape)}: documents of {sizes[:8]} tokens make "
                                 f"(1, {sum(sizes)})")
            start = position_ids[:, :, first].repeat_interleave(documents, 2, output_size=sum(sizes))
            position_ids, valid, cache = position_ids - start, None, Documents(sizes, documents.device)
        x = self.embed(input_ids, pixel_values, image_grid_thw, image_embeds)
        # Causality already hides right padding from real tokens: no mask then, the fast path of every kernel.
        right_padded = valid is None or bool((valid[:, :-1] >= valid[:, 1:]).all())
        mask = None if right_padded else padded_causal_mask(valid)
        return self.model(x, *self.model.rotary(position_ids), mask, cache)

    def embed(self, input_ids, pixel_values=None, image_grid_thw=None, image_embeds=None) -> Tensor:
        """(B, T, E) token embeddings with the image features written over the image tokens, in reading order."""
        x = self.model.embed_tokens(input_ids)
        if image_embeds is None:
            if pixel_values is None:
                return x
            image_embeds = self.visual(pixel_values, image_grid_thw)
        slots = (input_ids.flatten() == self.config["image_token_id"]).nonzero().squeeze(1)
        if len(slots) != len(image_embeds):
            raise ValueError(f"input_ids hold {len(slots)} image tokens (id {self.config['image_token_id']}), "
                             f"the images give {len(image_embeds)} features")
        return x.flatten(0, 1).index_copy(0, slots, image_embeds.to(x.dtype)).view_as(x)

    def logits(self, h: Tensor) -> Tensor:
        """(..., E) -> (..., V) fp32."""
        return F.linear(h, self.head).float()

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of labels[:, t] given hidden[:, t-1], fp32. labels (B, T) = ids, -100 where not trained.

        reduction "sum" is for normalising by a count over several micro-batches or processes.
        """
        wanted = labels[:, 1:] != -100
        if reduction == "mean" and not wanted.any():
            raise ValueError("labels: every token is -100, there is nothing to learn from this batch")
        h, targets = hidden[:, :-1][wanted], labels[:, 1:][wanted]  # (K, E), (K,)
        if kernels_for(h):  # there the (K, V) logits never exist
            from kernels.logprob import cross_entropy
            return cross_entropy(h, self.head.to(h.dtype), targets, reduction=reduction)
        return F.cross_entropy(self.logits(h), targets, reduction=reduction)

    def token_logps(self, hidden: Tensor, ids: Tensor, mask: Tensor, temperature: float = 1.0, banned=()) -> Tensor:
        """log p(ids[:, t] | hidden[:, t-1]) at the tokens where mask (B, T) is True, 0 elsewhere: (B, T) fp32.

        Same distribution as generate() draws from: logits / temperature, `banned` ids impossible. mask[:, 0] must be
        False.
        """
        wanted = mask.bool()
        if wanted[:, 0].any():
            raise ValueError("mask: the first token of a row has nothing before it and no probability")
        wanted = wanted[:, 1:]
        logp = log_softmax(self.logits(hidden[:, :-1][wanted]), temperature, banned)  # (K, V)
        logp = logp.gather(1, ids[:, 1:][wanted].unsqueeze(1)).squeeze(1)  # (K,)
        return F.pad(torch.zeros_like(wanted, dtype=torch.float32).masked_scatter(wanted, logp), (1, 0))

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype | None = None, device="cpu") -> "PathoVLM":
        """Read config.json and safetensors from a folder in the published layout; see weights.load_vlm."""
        from .weights import load_vlm
        return load_vlm(cls, folder, dtype, device)

    def save_pretrained(self, folder, max_shard_bytes: int = 5_000_000_000):
        """Write config.json and safetensors under the published names; see weights.save_vlm."""
        from .weights import save_vlm
        save_vlm(self, folder, max_shard_bytes)


def log_softmax(logits: Tensor, temperature: float = 1.0, banned=()) -> Tensor:
    """(K, V) fp32 logits -> log-probabilities of logits / temperature with the `banned` ids (list or tensor) at -inf.

    Sampler and scorer share it: the policy gradient is only right if both mean the same distribution.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if len(banned):
        logits = logits.index_fill(1, torch.as_tensor(banned, dtype=torch.long, device=logits.device), float("-inf"))
    return logits.log_softmax(-1)


def trainable(model: PathoVLM, parts) -> list:
    """Freeze all but the named parts ("vision", "projector", "decoder") -> the parameters that are trained.

    The projector is `visual.merger`, the vision part the rest of `visual`, the decoder everything else (head included).
    """
    unknown = set(parts) - {"vision", "projector", "decoder"}
    if unknown or not parts:
        raise ValueError(f"--train names {sorted(unknown) or 'nothing'}: choose from vision, projector, decoder")
    for name, p in model.named_parameters():
        top = name.split(".", 2)[:2]
        part = "decoder" if top[0] != "visual" else "projector" if top[1] == "merger" else "vision"
        p.requires_grad_(part in parts)
    return [p for p in model.parameters() if p.requires_grad]
