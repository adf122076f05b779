"""CLIP against Hugging Face's CLIPModel, the open_clip file form, the loss against float64 and finite differences."""
import json
import math
import zipfile

import pytest
import torch

from nanopatho.clip import CLIP, clip_loss, from_open_clip, to_open_clip

# Widths are multiples of 64 so that the open_clip rule heads = width/64 holds and the .pt form can be tried too.
TEXT = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
            max_position_embeddings=11, layer_norm_eps=1e-5, bos_token_id=97, eos_token_id=98, pad_token_id=0)
VISION = dict(hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2, num_channels=3,
              image_size=42, patch_size=14, layer_norm_eps=1e-5)


def config(act="quick_gelu", **text):
    # the sub-configs' projection_dim is wrong on purpose: published folders are to be read at the top level
    return dict(model_type="clip", projection_dim=24, logit_scale_init_value=2.0,
                text_config=dict(TEXT, hidden_act=act, projection_dim=512, **text),
                vision_config=dict(VISION, hidden_act=act, projection_dim=512))


@torch.no_grad()
def shake(model):
    """Norms around 1 and biases around 0, but at neither: fresh ones would hide a missing norm or bias."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name == "logit_scale":
            p.fill_(2.3)
        elif p.ndim == 1:
            p.normal_(float("norm" in name or "layrnorm" in name) * name.endswith("weight"), 0.3)
        else:
            p.normal_(0, 0.3 if "embed" in name and "patch" not in name else p[0].numel() ** -0.5)
    return model


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(4, 3, 42, 42, generator=g)
    ids = torch.randint(1, 97, (4, 11), generator=g)
    ids[:, 0] = 97
    for row, end in enumerate((10, 4, 1, 7)):                         # full, padded, empty text, padded
        ids[row, end], ids[row, end + 1:] = 98, 0
    return pixels, ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [98, 2])                              # 2: old configs, pooling at the highest id
def test_equals_hugging_face_both_ways(act, eos, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = config(act, )
    made["text_config"]["eos_token_id"] = eos
    reference = shake(transformers.CLIPModel(transformers.CLIPConfig(**json.loads(json.dumps(made))))).eval()
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(made))    # the published form instead of this version's
    ours = CLIP.from_pretrained(tmp_path / "hf")
    pixels, ids = batch()
    with torch.no_grad():
        want = reference(input_ids=ids, pixel_values=pixels)
        want_image = reference.visual_projection(reference.vision_model(pixels).pooler_output)
        want_text = reference.text_projection(reference.text_model(ids).pooler_output)
        torch.testing.assert_close(ours.encode_image(pixels), want_image, atol=5e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(ids), want_text, atol=5e-5, rtol=0)
        torch.testing.assert_close(ours(pixels, ids), want.logits_per_image, atol=5e-5, rtol=0)
    assert set(ours.state_dict()) == {k for k in reference.state_dict() if not k.endswith("position_ids")}

    ours.save_pretrained(tmp_path / "ours")                           # and back: their reader, no key left over
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        got = again.eval()(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(got, want.logits_per_image, atol=5e-5, rtol=0)


def test_gradients_equal_hugging_face():
    transformers = pytest.importorskip("transformers")
    reference = shake(transformers.CLIPModel(transformers.CLIPConfig(**config())))
    ours = CLIP(config())
    ours.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.endswith("position_ids")})
    pixels, ids = batch()
    want = reference(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    got = clip_loss(ours.encode_image(pixels), ours.encode_text(ids), ours.logit_scale)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    want.backward()
    got.backward()
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "module"])
def test_open_clip_file(wrapped, tmp_path, capsys):
    model = shake(CLIP(config("gelu"))).eval()
    state = to_open_clip(model.state_dict())
    assert state["visual.proj"].shape == (128, 24) and state["text_projection"].shape == (64, 24)   # transposed there
    assert state["visual.transformer.resblocks.2.attn.in_proj_weight"].shape == (384, 128)
    assert state["transformer.resblocks.1.attn.in_proj_bias"].shape == (192,)
    assert state["visual.conv1.weight"].shape == (128, 3, 14, 14) and state["positional_embedding"].shape == (11, 64)
    if wrapped == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save(state if wrapped == "bare" else {"epoch": 3, "state_dict": state}, tmp_path / "ViT-L-14-336.pt")
    read = CLIP.from_pretrained(tmp_path / "ViT-L-14-336.pt").eval()
    assert read.config["vision_config"]["image_size"] == 42           # from the positions, whatever the name says
    assert read.config["text_config"]["hidden_act"] == "gelu" and "hidden_act gelu" in capsys.readouterr().err
    pixels, ids = batch()
    with torch.no_grad():
        assert torch.equal(read(pixels, ids), model(pixels, ids))
    quick = CLIP.from_pretrained(tmp_path / "ViT-L-14-336.pt", hidden_act="quick_gelu")
    with torch.no_grad():
        assert (quick.encode_image(pixels) - model.encode_image(pixels)).abs().max() > 1e-3
    back = from_open_clip(to_open_clip(model.state_dict()))[1]
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_in_proj_rows_are_q_k_v():
    """open_clip's block is torch's nn.MultiheadAttention: the packed rows must mean the same to it."""
    model = shake(CLIP(config()))
    attention = model.vision_model.encoder.layers[0].self_attn
    packed = to_open_clip(model.state_dict())
    theirs = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    theirs.load_state_dict({k.removeprefix("visual.transformer.resblocks.0.attn."): v for k, v in packed.items()
                            if k.startswith("visual.transformer.resblocks.0.attn.")})
    x = torch.randn(2, 5, 128)
    torch.testing.assert_close(attention(x), theirs(x, x, x, need_weights=False)[0], atol=5e-6, rtol=0)


def test_openai_archive_is_read(tmp_path):
    """OpenAI's own files are TorchScript archives; torch.load with weights_only refuses those."""
    class Holder(torch.nn.Module):
        def __init__(self, state):
            super().__init__()
            self.w = torch.nn.ParameterDict()
            for name, value in state.items():
                parent = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(parent, part):
                        parent.add_module(part, torch.nn.Module())
                    parent = getattr(parent, part)
                parent.register_buffer(last, value)
            del self.w

        def forward(self, x):
            return x

    model = shake(CLIP(config("quick_gelu"))).eval()
    state = dict(to_open_clip(model.state_dict()), input_resolution=torch.tensor(42), vocab_size=torch.tensor(99))
    torch.jit.trace(Holder(state), torch.zeros(1)).save(str(tmp_path / "ViT-B-16.pt"))
    assert zipfile.is_zipfile(tmp_path / "ViT-B-16.pt")
    read = CLIP.from_pretrained(tmp_path / "ViT-B-16.pt").eval()
    pixels, ids = batch()
    with torch.no_grad():
        assert torch.equal(read(pixels, ids), model(pixels, ids))


@pytest.mark.parametrize("text,vision,embed,total", [
    ((512, 12, 8), (768, 12, 12, 16, 224), 512, 149_620_737),         # ViT-B/16
    ((768, 12, 12), (1024, 24, 16, 14, 224), 768, 427_616_513),       # ViT-L/14
    ((768, 12, 12), (1024, 24, 16, 14, 336), 768, 427_944_193)])      # ViT-L/14@336
def test_published_sizes(text, vision, embed, total):
    made = dict(projection_dim=embed,
                text_config=dict(hidden_size=text[0], intermediate_size=4 * text[0], num_hidden_layers=text[1],
                                 num_attention_heads=text[2]),        # sparse: the rest is the class's default
                vision_config=dict(hidden_size=vision[0], intermediate_size=4 * vision[0], num_hidden_layers=vision[1],
                                   num_attention_heads=vision[2], patch_size=vision[3], image_size=vision[4]))
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(made).parameters()) == total


def test_padding_and_cutting_change_nothing():
    model = shake(CLIP(config())).eval()
    _, ids = batch()
    with torch.no_grad():
        whole = model.encode_text(ids)
        short = model.encode_text(ids[1:, :8])                        # longest remaining sentence: 8 tokens
        ids[1, 5:] = 50                                               # other rubbish behind the end token
        assert torch.equal(model.encode_text(ids), whole)
    torch.testing.assert_close(short, whole[1:], atol=1e-5, rtol=0)


def test_initialization_is_openais():
    torch.manual_seed(0)
    model = CLIP(config())
    assert model.logit_scale.item() == pytest.approx(2.0)
    assert CLIP(dict(projection_dim=8, text_config=TEXT, vision_config=VISION)).logit_scale.item() \
        == pytest.approx(math.log(1 / 0.07))
    block = model.vision_model.encoder.layers[0]
    for p, std in ((block.self_attn.q_proj.weight, 128 ** -0.5), (block.self_attn.out_proj.weight, (128 * 6) ** -0.5),
                   (block.mlp.fc1.weight, 256 ** -0.5), (block.mlp.fc2.weight, (128 * 6) ** -0.5),
                   (model.text_model.embeddings.token_embedding.weight, 0.02),
                   (model.text_model.embeddings.position_embedding.weight, 0.01),
                   (model.visual_projection.weight, 128 ** -0.5), (model.text_projection.weight, 64 ** -0.5)):
        assert p.std().item() == pytest.approx(std, rel=0.08)
    assert not block.mlp.fc1.bias.any() and (block.layer_norm1.weight == 1).all()


# --- the loss ---------------------------------------------------------------------------------------------------------


def slow_loss(image, text, logit_scale, also_true=None):
    """The sum written out, in float64: -log of the right pair's share, both directions."""
    image, text = image.double(), text.double()
    n, scale, total = len(image), math.exp(float(logit_scale)), 0.0
    cosine = [[float(image[i] @ text[j] / (image[i].norm() * text[j].norm())) for j in range(n)] for i in range(n)]
    counts = lambda i, j: i == j or also_true is None or not also_true[i][j]
    for i in range(n):
        right = math.exp(scale * cosine[i][i])
        total -= math.log(right / sum(math.exp(scale * cosine[i][j]) for j in range(n) if counts(i, j))) / 2
        total -= math.log(right / sum(math.exp(scale * cosine[j][i]) for j in range(n) if counts(j, i))) / 2
    return total / n


# not symmetric: "large nuclei" is true of a picture with "large nuclei, fat", not the other way round
ALSO = (torch.arange(49).view(7, 7) * 5 % 7 < 2).tolist()


@pytest.mark.parametrize("also", [None, ALSO])
def test_loss_equals_the_written_out_sum(also):
    g = torch.Generator().manual_seed(3)
    image, text = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g) * 4
    got = clip_loss(image, text, torch.tensor(1.7), None if also is None else torch.tensor(also))
    assert got.item() == pytest.approx(slow_loss(image, text, 1.7, also), abs=1e-5)


def test_loss_closed_forms():
    same = torch.ones(6, 3)
    scale = torch.tensor(2.0)
    assert clip_loss(same, same, scale).item() == pytest.approx(math.log(6), abs=1e-6)       # nothing to tell apart
    assert clip_loss(same, same, scale, torch.ones(6, 6, dtype=torch.bool)).item() == 0      # twins only
    eye = torch.eye(4)                                                # orthogonal pairs: log(1 + 3 e^-s)
    assert clip_loss(eye, eye, scale).item() == pytest.approx(math.log(1 + 3 * math.exp(-math.exp(2.0))), abs=1e-6)


def test_loss_gradient_by_finite_differences():
    g = torch.Generator().manual_seed(4)
    parts = [torch.randn(7, 4, generator=g), torch.randn(7, 4, generator=g), torch.tensor(1.2)]
    parts = [x.requires_grad_() for x in parts]
    clip_loss(*parts, torch.tensor(ALSO)).backward()
    step = 1e-5
    for which in range(3):
        numeric = torch.zeros_like(parts[which], dtype=torch.float64)
        for i in range(numeric.numel()):
            values = []
            for sign in (1, -1):
                moved = [p.detach().double().clone() for p in parts]
                moved[which].view(-1)[i] += sign * step
                values.append(slow_loss(*moved, ALSO))
            numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(parts[which].grad.double(), numeric, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("also", [None, ALSO])
@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 2, 6, 7)])
def test_parts_of_the_loss_add_up(cuts, also):
    """Each part in chunks of two rows; loss and gradients against float64 and the formula in one piece."""
    g = torch.Generator().manual_seed(6)
    mask = None if also is None else torch.tensor(also)
    make = lambda: [x.clone().requires_grad_() for x in (image, text, torch.tensor(1.1))]
    image, text = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    want, got = make(), make()
    clip_loss(*want, mask).backward()
    parts = [clip_loss(*got, mask, slice(a, b), chunk=2) for a, b in zip(cuts, cuts[1:])]
    assert sum(parts).item() == pytest.approx(slow_loss(image, text, 1.1, also), abs=1e-5)
    sum(parts).backward()
    for one, other in zip(got, want):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_memory_of_the_loss_grows_with_the_batch_not_with_its_square():
    """Numbers kept for the backward pass, each storage counted once."""
    kept = {}
    for B in (256, 512, 1024):
        features, held = [torch.randn(B, 8, requires_grad=True) for _ in range(2)], {}

        def pack(x):
            held[x.untyped_storage().data_ptr()] = x
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            clip_loss(*features, torch.tensor(1.0, requires_grad=True), chunk=32)
        kept[B] = sum(x.untyped_storage().nbytes() for x in held.values()) / 4
    assert kept[1024] < 2.1 * kept[512] < 4.5 * kept[256] and kept[1024] < 100 * 1024


def test_recomputed_blocks_give_the_same_gradients():
    pixels, ids = batch()
    found = []
    for recompute in (False, True):
        model = shake(CLIP(config()))
        model.vision_model.encoder.recompute = model.text_model.encoder.recompute = recompute
        clip_loss(model.encode_image(pixels), model.encode_text(ids), model.logit_scale).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_cause(tmp_path):
    model = CLIP(config())
    pixels, ids = batch()
    with pytest.raises(ValueError, match="wants .B, 3, 42, 42."):
        model.encode_image(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="row 2 has no end token 98"):
        model.encode_text(ids.masked_fill((ids == 98) & (torch.arange(4)[:, None] == 2), 5))
    with pytest.raises(ValueError, match="reads 11"):
        model.encode_text(torch.full((1, 12), 98))
    with pytest.raises(ValueError, match="'relu'"):
        CLIP(config("relu"))
    with pytest.raises(FileNotFoundError, match="not there"):
        CLIP.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        CLIP.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    wrong = dict(config(), projection_dim=25)
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"visual_projection.weight is \(24, 128\), config says \(25, 128\)"):
        CLIP.from_pretrained(tmp_path)
    state = to_open_clip(model.state_dict())
    state["visual.trunk.stem.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="visual.trunk.stem.weight"):
        from_open_clip(state)


class Bomb:
    """A pickle that writes a file when it is loaded by a careless program."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["clip.pt", "pytorch_model.bin"])
def test_files_that_are_not_tensors_are_refused_unrun(name, tmp_path):
    model, path = CLIP(config()), tmp_path / name
    where = tmp_path if name.endswith(".bin") else path
    (tmp_path / "config.json").write_text(json.dumps(model.config))

    def refused(word):
        with pytest.raises(ValueError, match="nothing in it was run") as error:
            CLIP.from_pretrained(where)
        message = str(error.value)
        assert name in message and word in message and "\n" not in message and len(message) < 500, message

    torch.save({"logit_scale": Bomb(tmp_path / "ran")}, path)
    refused("clip" if name == "clip.pt" else "pytorch_model")
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"logit_scale": [1, 2]}}, path)
    refused("logit_scale is a list")
    torch.save([torch.zeros(1)], path)
    refused("list")
    torch.save(to_open_clip(model.state_dict()), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused(name)
    path.write_bytes(b"")
    refused(name)
