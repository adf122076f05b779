"""OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020), the model behind Patho-CLIP: two towers and one loss.

An image tower (ViT) and a text tower (causal transformer) each end in one vector of `projection_dim` numbers. Training
pulls the vectors of a picture and of its caption together and pushes the other captions of the batch away.

Module and parameter names are those of the published Hugging Face checkpoints (`vision_model.pre_layrnorm` included,
the typo is in every file), so `state_dict()` of this model IS a published file. `from_pretrained` reads
  - a Hugging Face folder: config.json + model.safetensors (or an indexed set of shards, or pytorch_model.bin);
  - an open_clip `.pt` (Patho-CLIP's form): a bare state dict or one under "state_dict", `module.` in front or not;
  - OpenAI's own `.pt`, a TorchScript archive: torch.jit.load compiles the program in it, so take that file from its
    publisher only. The other two hold tensors, and nothing in them is run.
May be copied alone: needs torch, and safetensors for files.

Shapes: B batch, C channels, N patches (N = (image_size/patch_size)^2), T text tokens, D width of a tower, H heads,
        E projection_dim.
"""
import json
import math
import os
import pickle
import re
import sys
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Class defaults of Hugging Face's CLIPConfig (= ViT-B/32): what a sparse config.json leaves out.
TEXT_DEFAULTS = dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                     num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
                     eos_token_id=49407)
VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       num_channels=3, image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)


def complete(config):
    """A new config dict with every field this file reads; sparse published configs lean on their class's defaults."""
    return dict(config, text_config={**TEXT_DEFAULTS, **(config.get("text_config") or {})},
                vision_config={**VISION_DEFAULTS, **(config.get("vision_config") or {})},
                projection_dim=config.get("projection_dim", 512),             # the top-level one; sub-configs may lie
                logit_scale_init_value=config.get("logit_scale_init_value", math.log(1 / 0.07)))


def activation(name):
    """OpenAI trained with x*sigmoid(1.702x); open_clip trains with the exact GELU. Weights do not tell which one."""
    if name == "quick_gelu":
        return lambda x: x * torch.sigmoid(1.702 * x)
    if name == "gelu":
        return F.gelu
    raise ValueError(f"clip config: hidden_act={name!r} unknown; use 'quick_gelu' (OpenAI) or 'gelu' (open_clip)")


class Attention(nn.Module):
    """Multi-head self-attention with biases. (B, T, D) -> (B, keep, D), for the first `keep` tokens; None = all T."""

    def __init__(self, width, heads, causal):
        super().__init__()
        if width % heads:
            raise ValueError(f"clip config: hidden_size {width} is not a multiple of num_attention_heads {heads}")
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, keep=None):
        q, k, v = (proj(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, H, keep or T, D/H)
                   for proj, rows in ((self.q_proj, x[:, :keep]), (self.k_proj, x), (self.v_proj, x)))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)    # scale 1/sqrt(D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (B, keep, D)


class MLP(nn.Module):
    def __init__(self, width, hidden, act):
        super().__init__()
        self.act, self.fc1, self.fc2 = activation(act), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, c, causal):
        super().__init__()
        self.self_attn = Attention(c["hidden_size"], c["num_attention_heads"], causal)
        self.layer_norm1 = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"], c["hidden_act"])
        self.layer_norm2 = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, x, keep=None):
        x = x[:, :keep] + self.self_attn(self.layer_norm1(x), keep)           # (B, keep, D)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, c, causal):
        super().__init__()
        self.recompute = False           # True: keep only block inputs for backward and compute the rest twice
        self.layers = nn.ModuleList(Block(c, causal) for _ in range(c["num_hidden_layers"]))

    def forward(self, x, keep=None):
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            rows = keep if i == last else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rows, use_reentrant=False)
            else:
                x = layer(x, rows)
        return x                                                              # (B, keep, D)


class VisionEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        if c["image_size"] % patch:
            raise ValueError(f"clip config: image_size {c['image_size']} is not a multiple of patch_size {patch}")
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(c["num_channels"], width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((c["image_size"] // patch) ** 2 + 1, width)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)     # (B, N, D), row by row
        first = self.class_embedding.expand(len(pixels), 1, -1)               # (B, 1, D)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight   # (B, 1+N, D)


class VisionModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.image_size = c["image_size"]
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])   # sic
        self.encoder = Encoder(c, causal=False)
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def tokens(self, pixels, keep=None):
        """(B, C, S, S) -> tokens before the last norm (B, 1+N, D); token 0 is the class token."""
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"pixels are {tuple(pixels.shape)}, this image tower wants (B, 3, {self.image_size}, "
                             f"{self.image_size}): resize with nanopatho.image.clip_pixels(images, {self.image_size})")
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), keep)

    def forward(self, pixels):
        # Only the class token is read, so the last layer answers for it alone: a fifth of the tiny tower's work saved.
        return self.post_layernorm(self.tokens(pixels, keep=1)[:, 0])         # (B, D)


class TextEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.position_embedding = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])

    def forward(self, ids):
        context = self.position_embedding.num_embeddings
        if ids.shape[1] > context:
            raise ValueError(f"text ids have {ids.shape[1]} tokens, this text tower reads {context}: truncate")
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]   # (B, T, D)


class TextModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eos_token_id = c["eos_token_id"]
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, ids):
        # The sentence is read off at its end token. Causal attention: whatever follows it (padding) changes nothing,
        # so a batch may be cut to its longest sentence.
        if self.eos_token_id == 2:                                            # old HF configs: 2 means "unknown"
            end = ids.argmax(dim=1)                                           # OpenAI: EOT is the highest id
        else:
            is_end = ids == self.eos_token_id                                 # (B, T)
            if not is_end.any(dim=1).all():                                   # HF would silently read token 0
                row = int((~is_end.any(dim=1)).nonzero()[0])
                raise ValueError(f"text row {row} has no end token {self.eos_token_id}: keep it when truncating")
            end = is_end.int().argmax(dim=1)                                  # the first one
        x = self.encoder(self.embeddings(ids))                                # (B, T, D)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), end])   # (B, D)


class CLIP(nn.Module):
    """`CLIP(config)` with a Hugging Face CLIPConfig as a dict (text_config, vision_config, projection_dim)."""

    def __init__(self, config):
        super().__init__()
        self.config = config = complete(config)
        self.vision_model = VisionModel(config["vision_config"])
        self.text_model = TextModel(config["text_config"])
        self.visual_projection = nn.Linear(config["vision_config"]["hidden_size"], config["projection_dim"], bias=False)
        self.text_projection = nn.Linear(config["text_config"]["hidden_size"], config["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config["logit_scale_init_value"])))   # a logarithm
        self.apply_initialization()

    @torch.no_grad()
    def apply_initialization(self):
        """OpenAI's start from scratch (section 2.4 and the released code): every residual branch ends in a projection
        scaled by 1/sqrt(2 layers) so that depth does not blow up the stream; biases 0, norms 1. Departure: they apply
        it to the text tower and leave torch's defaults in the image tower's blocks; here both towers get it."""
        for tower, part in ((self.vision_model, "vision_config"), (self.text_model, "text_config")):
            c = self.config[part]
            width = c["hidden_size"]
            for block in tower.encoder.layers:
                inner = width ** -0.5
                outer = inner * (2 * c["num_hidden_layers"]) ** -0.5
                for linear, std in ((block.self_attn.q_proj, inner), (block.self_attn.k_proj, inner),
                                    (block.self_attn.v_proj, inner), (block.self_attn.out_proj, outer),
                                    (block.mlp.fc1, (2 * width) ** -0.5), (block.mlp.fc2, outer)):
                    linear.weight.normal_(0, std)
                    linear.bias.zero_()
        vision, text = self.vision_model.embeddings, self.text_model.embeddings
        vision.class_embedding.normal_(0, vision.class_embedding.numel() ** -0.5)
        vision.position_embedding.weight.normal_(0, vision.class_embedding.numel() ** -0.5)
        text.token_embedding.weight.normal_(0, 0.02)
        text.position_embedding.weight.normal_(0, 0.01)
        for projection in (self.visual_projection, self.text_projection):
            projection.weight.normal_(0, projection.in_features ** -0.5)

    def encode_image(self, pixels):
        """(B, 3, S, S) normalised pixels (image.clip_pixels) -> (B, E), not normalised to unit length."""
        return self.visual_projection(self.vision_model(pixels))

    def encode_text(self, ids):
        """(B, T) token ids, each row with its end token, T <= context -> (B, E), not normalised to unit length."""
        return self.text_projection(self.text_model(ids))

    def forward(self, pixels, ids):
        """-> logits (B images, B texts): scaled cosines; its transpose serves the other direction."""
        image, text = (F.normalize(x, dim=-1) for x in (self.encode_image(pixels), self.encode_text(ids)))
        return self.logit_scale.exp() * image @ text.T

    @classmethod
    def from_pretrained(cls, path, *, dtype=torch.float32, device="cpu", hidden_act=None):
        """Hugging Face folder, or open_clip / OpenAI `.pt` file -> CLIP in eval mode. `hidden_act` overrides the choice
        config.json, or for a .pt its origin, makes: "gelu" for open_clip files (as Patho-CLIP's authors build theirs),
        "quick_gelu" for OpenAI archives. The one that runs is printed, since no error would show a wrong one."""
        if os.path.isdir(path):
            config, state = read_folder(path)
            config = complete(config)
        elif os.path.isfile(path):
            state, is_archive = read_pt(path)
            config, state = from_open_clip(state)
            hidden_act = hidden_act or ("quick_gelu" if is_archive else "gelu")
        else:
            raise FileNotFoundError(f"{path}: not there; give a folder with config.json, or an open_clip .pt")
        if hidden_act:
            config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = hidden_act
        vision = config["vision_config"]
        print(f"clip: {path}: {vision['image_size']} px, hidden_act {vision['hidden_act']}", file=sys.stderr)
        with torch.device("meta"):                                            # shapes only: no second copy in memory
            model = cls(config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.endswith("position_ids")}      # a buffer of old HF files
        problems = [f"missing {k}" for k in expected if k not in state]
        problems += [f"unexpected {k}" for k in state if k not in expected]
        problems += [f"{k} is {tuple(state[k].shape)}, config says {shape}" for k, shape in expected.items()
                     if k in state and tuple(state[k].shape) != shape]
        if problems:
            raise ValueError(f"{path}: not the weights of its config ({len(problems)} faults): "
                             + "; ".join(problems[:5]))
        for name in state:                                                    # one at a time: never two whole copies
            state[name] = state[name].to(device=device, dtype=dtype)
        model.load_state_dict(state, assign=True)
        model.requires_grad_(True)
        return model.eval()

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors in Hugging Face's form; their CLIPModel reads it."""
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        partial = os.path.join(folder, "model.safetensors.partial")           # a killed save never leaves half a model
        save_file(state, partial, metadata={"format": "pt"})
        os.replace(partial, os.path.join(folder, "model.safetensors"))
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
            json.dump(dict(self.config, model_type="clip", architectures=["CLIPModel"]), f, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def clip_loss(image_features, text_features, logit_scale, also_true=None, mine=None, chunk=4096):
    """Symmetric InfoNCE: each picture must find its text among the batch's texts, each text its picture.

    image_features, text_features (B, E), any length (unit length is made here, in fp32); logit_scale: the logarithm of
    the inverse temperature, as stored in the model. -> scalar: mean of the two cross-entropies.
    also_true (B, B) bool, optional: [i, j] = text j fits picture i too, because it repeats i's caption or a part of it.
    Such a pair is neither right nor wrong: it leaves the denominators (the diagonal stays whatever it says), so a batch
    of one repeated caption has loss 0. Without also_true it counts as wrong, as in OpenAI's code, where 400 M captions
    make repetitions rare; a drawn world with short captions repeats itself in every batch.
    mine: a slice of the B pairs -> their part of the loss, what their pictures and texts find among all B. The parts of
    all processes add up to the loss, and so do the gradients; every process needs all features.
    More than `chunk` pairs: that many rows of logits exist at a time, made again in backward; memory grows with B only.
    """
    image, text = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    B, scale = len(image), logit_scale.float().exp()
    if mine is None and B <= chunk:                                           # the formula in one piece
        logits = scale * image @ text.T                                       # (B pictures, B texts)
        if also_true is not None:
            own = torch.eye(B, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(also_true.to(logits.device) & ~own, float("-inf"))
        target = torch.arange(B, device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def find(rows, others, target, mask):
        logits = scale * rows @ others.T                                      # (rows, B)
        if mask is not None:
            own = target[:, None] == torch.arange(B, device=target.device)
            logits = logits.masked_fill(mask.to(logits.device) & ~own, float("-inf"))
        return F.cross_entropy(logits, target, reduction="sum")

    loss, (start, stop, _) = 0.0, (mine or slice(B)).indices(B)
    for at in range(start, stop, chunk):
        rows = slice(at, min(at + chunk, stop))
        target = torch.arange(rows.start, rows.stop, device=image.device)
        for one, other, mask in ((image, text, also_true), (text, image, None if also_true is None else also_true.T)):
            part = None if mask is None else mask[rows]
            loss = loss + checkpoint(find, one[rows], other, target, part, use_reentrant=False)
    return loss / (2 * B)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_folder(folder):
    """Hugging Face folder -> config dict, state dict."""
    config_path = os.path.join(folder, "config.json")
    if not os.path.isfile(config_path):
        raise FileNotFoundError(f"{config_path}: missing; a CLIP folder holds config.json and model.safetensors")
    with open(config_path, encoding="utf-8") as f:
        try:
            config = json.load(f)
        except ValueError as error:
            raise ValueError(f"{config_path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: holds a {type(config).__name__}, a JSON object is needed")
    if config.get("model_type", "clip") != "clip":
        raise ValueError(f"{config_path}: model_type {config['model_type']!r}, expected 'clip'")
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [os.path.join(folder, name) for name in names]
    if all(os.path.isfile(f) for f in files):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            return config, {k: v for f in files for k, v in load_file(f).items()}
        except SafetensorError as error:
            raise ValueError(f"{', '.join(files)}: damaged or cut off ({error}); fetch or train it again") from error
    old = os.path.join(folder, "pytorch_model.bin")
    if os.path.isfile(old):
        return config, read_tensors(old)
    missing = [f for f in files if not os.path.isfile(f)]
    raise FileNotFoundError(f"{missing[0]}: missing ({len(missing)} of {len(files)} weight files; no pytorch_model.bin "
                            "either)")


def read_tensors(path):
    """A file of torch.save that holds a dict of tensors, or one under "state_dict"; anything else is refused unrun."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
            raise TypeError(f"{odd[0]} is a {type(state[odd[0]]).__name__}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as error:
        reason = re.split(r"\. |\n", str(error).strip())[0] or type(error).__name__   # torch goes on: how to run it
        raise ValueError(f"{path}: damaged, or more than a dict of tensors; nothing in it was run. Fetch it again, or "
                         f"take a safetensors file ({reason})") from error
    return state


def read_pt(path):
    """open_clip or OpenAI .pt -> bare state dict, whether the file is OpenAI's TorchScript archive."""
    is_archive = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            is_archive = any(name.endswith("/constants.pkl") for name in z.namelist())
    if is_archive:
        state = dict(torch.jit.load(path, map_location="cpu").state_dict())
    else:
        state = read_tensors(path)
    return {k.removeprefix("module."): v for k, v in state.items()}, is_archive


RENAMES = [  # open_clip pattern, HF name; in both directions (see to_open_clip), so one-to-one
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
]
BLOCK_RENAMES = [("ln_1.", "layer_norm1."), ("ln_2.", "layer_norm2."), ("mlp.c_fc.", "mlp.fc1."),
                 ("mlp.c_proj.", "mlp.fc2."), ("attn.out_proj.", "self_attn.out_proj.")]


def _rename(name, pairs):
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old):]
    raise ValueError(f"clip weights: {name} belongs to neither OpenAI's nor open_clip's CLIP with a ViT image tower")


def from_open_clip(state):
    """State dict in open_clip's names -> config, state dict in HF's names. Every size is read from the tensors: the
    resolution from the number of positions (a file's name may lie); heads are width/64, OpenAI's rule."""
    hf = {}
    for name, tensor in state.items():
        if name in ("input_resolution", "context_length", "vocab_size", "attn_mask"):   # not weights
            continue
        block = re.match(r"((?:visual\.)?transformer\.resblocks\.)(\d+)\.(.+)", name)
        if not block:
            transposed = name in ("visual.proj", "text_projection")           # x @ proj there, a Linear here
            hf[_rename(name, RENAMES)] = tensor.T.contiguous() if transposed else tensor
            continue
        layer = f"{_rename(block[1], RENAMES)}{block[2]}."
        if block[3].startswith("attn.in_proj_"):                              # (3D, ...) = q rows, k rows, v rows
            for part, rows in zip("qkv", tensor.chunk(3)):
                hf[f"{layer}self_attn.{part}_proj.{block[3].removeprefix('attn.in_proj_')}"] = rows.clone()
        else:
            hf[layer + _rename(block[3], BLOCK_RENAMES)] = tensor
    needed = [new for _, new in RENAMES if not new.endswith((".", "layers."))]
    missing = [name for name in needed if name not in hf]
    if missing:
        raise ValueError(f"clip weights: {missing[0]} not found; expected an open_clip or OpenAI CLIP with a ViT tower")

    def tower(prefix):
        layers = [int(k[len(prefix):].split(".")[0]) for k in hf if k.startswith(prefix)]
        mlp = hf.get(f"{prefix}0.mlp.fc1.weight")
        if mlp is None:
            raise ValueError(f"clip weights: {prefix}0.mlp.fc1.weight not found; this tower has no layers")
        return dict(hidden_size=mlp.shape[1], intermediate_size=mlp.shape[0], num_hidden_layers=max(layers) + 1,
                    num_attention_heads=max(1, mlp.shape[1] // 64), layer_norm_eps=1e-5, hidden_act="gelu")

    patch = hf["vision_model.embeddings.patch_embedding.weight"].shape        # (D, C, p, p)
    positions = hf["vision_model.embeddings.position_embedding.weight"].shape[0]
    side = math.isqrt(positions - 1)
    vocab = hf["text_model.embeddings.token_embedding.weight"].shape[0]
    context = hf["text_model.embeddings.position_embedding.weight"].shape[0]
    config = dict(
        model_type="clip", projection_dim=hf["visual_projection.weight"].shape[0],
        vision_config=dict(tower("vision_model.encoder.layers."), num_channels=patch[1], patch_size=patch[2],
                           image_size=side * patch[2]),
        text_config=dict(tower("text_model.encoder.layers."), vocab_size=vocab, max_position_embeddings=context,
                         bos_token_id=vocab - 2, eos_token_id=vocab - 1))     # SOT, EOT: the two highest ids
    return complete(config), hf


def to_open_clip(state):
    """The inverse: state dict in HF's names -> open_clip's, for programs that read that form. The head count travels in
    no tensor: readers assume width/64."""
    back, block_back = [(new, old) for old, new in RENAMES], [(new, old) for old, new in BLOCK_RENAMES]
    out = {}
    for name, tensor in state.items():
        block = re.match(r"((?:vision|text)_model\.encoder\.layers\.)(\d+)\.(.+)", name)
        if not block:
            transposed = name in ("visual_projection.weight", "text_projection.weight")
            out[_rename(name, back)] = tensor.T.contiguous() if transposed else tensor
        elif block[3].startswith("self_attn.q_proj."):
            kind = block[3].rsplit(".", 1)[1]
            parts = [state[f"{block[1]}{block[2]}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{_rename(block[1], back)}{block[2]}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif not block[3].startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            out[f"{_rename(block[1], back)}{block[2]}.{_rename(block[3], block_back)}"] = tensor
    return out
