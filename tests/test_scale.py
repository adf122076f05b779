"""The plan on paper against PyTorch's own counter of operations, counting by hand, and the scripts' own settings."""

import argparse
import functools
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_clip
import train_pretrain
import train_rl
import train_sft
from nanopatho import plan, presets, scale
from nanopatho.clip import CLIP, clip_loss
from nanopatho.vlm import PathoVLM


def given(**fields):
    return argparse.Namespace(**({name: value for name, (value, _) in scale.GIVEN.items()} | fields))


@functools.cache
def meta(preset):
    with torch.device("meta"):
        return PathoVLM(presets.VLM[preset])


def test_operations_of_a_forward_and_backward_pass_are_those_that_pytorch_counts():
    model, text, image, rows = PathoVLM(presets.VLM["smoke"]), 24, 16, 2
    ids = torch.randint(0, 900, (rows, text + image))
    ids[:, 2:2 + image] = model.config["image_token_id"]
    labels = ids.clone()
    labels[:, :-text] = -100
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(model.hidden_states(ids, torch.randn(128, 1176), torch.tensor([(1, 8, 8)] * rows)), labels)
        loss.backward()
    counted = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    weights = sum(n for op, n in counted.items() if "bmm" not in op)
    patch_embedding = 2 * 2 * 128 * 1176 * 64                            # not in vlm_flops: forward, and its weights' gradient
    ours = 3 * (scale.forward(model, rows, text, text, image) - rows * scale.scores(model, text, image))
    assert abs(ours - (weights - patch_embedding)) < 0.015 * ours        # norms and biases, counted as if they were products


def test_pairs_of_tokens_that_see_each_other_counted_one_by_one():
    model, text, image = meta("smoke"), 24, 16                           # 8 x 8 patches, windows of 4 x 4, second layer full
    decoder = sum(j <= i for i in range(text + image) for j in range(text + image))
    patches = [(y, x) for y in range(8) for x in range(8)]
    inside = sum((a[0] // 4, a[1] // 4) == (b[0] // 4, b[1] // 4) for a in patches for b in patches)
    exact = 4 * (2 * 64 * decoder + 64 * (inside + 64 ** 2))             # layers x width x pairs
    assert abs(scale.scores(model, text, image) / exact - 1) < 0.03      # the diagonal of the decoder is counted by half


def test_patho_clip():
    """Operations by PyTorch's counter; memory of the whole model on every GPU; hours by hand."""
    model, rows = CLIP(presets.CLIP["smoke"]), 3
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        clip_loss(model.encode_image(torch.randn(rows, 3, 112, 112)), model.encode_text(torch.tensor([[1] * 47 + [1023]] * 3)),
                  model.logit_scale).backward()
    rest = 2 * 2 * rows * 64 * 588 * 64 + 6 * rows * 2 * 64 * 64 + 3 * 2 * 2 * rows * rows * 64     # patches, projections, loss
    half = 3 * 4 * rows * 64 * 48 ** 2 / 2                               # PyTorch counts a causal square as a whole one
    assert 3 * scale.forward_clip(model, rows) == pytest.approx(counter.get_total_flops() - rest - half, rel=0.03)
    with torch.device("meta"):
        large = CLIP(presets.CLIP["clip-l14"])
    told = plan.memory(large, scale.settings("clip-l14", given(), 32, "clip"), "clip", 8)
    n = 427_616_513
    assert (told["weights"], told["gradients"], told["optimizer"], told["gathered weights"]) == (4 * n, 4 * n, 8 * n, 2 * n)
    one = scale.stage_plan(large, "clip", "clip-l14", given(), "H100", 8)
    layers = (23 * 12 + 2) * 1024 ** 2 * 257 + 12 * 12 * 768 ** 2 * 77          # weights x positions, by the published shapes
    by_hand = 6 * 5_100_000 * layers
    assert by_hand < one["work"] < 1.06 * by_hand and one["rows"] == 5_100_000 and one["tokens"] == 5_100_000 * (257 + 77)
    assert one["hours"] == pytest.approx(one["work"] / (8 * 989e12 * 0.4) / 3600)
    small = scale.stage_plan(large, "clip", "clip-l14", given(), "L4", 1)     # 256 rows do not fit: features computed twice
    assert small["micro"] < 256 and small["work"] == pytest.approx(one["work"] * (4 + small["recompute"]) / 3)


@pytest.mark.parametrize("preset, read", [("7b", 7_070_619_136), ("3b", 3_085_938_688)])
def test_decoding_reads_weights_and_caches_once(preset, read):
    """Published sizes: Qwen2.5's decoder with its output matrix, which the 3B shares with the embedding."""
    c = given(bandwidth_share=0.5, step_ms=0.1)
    kv = {"7b": 28 * 4 * 128, "3b": 36 * 2 * 128}[preset] * 2 * 2        # bytes of a token in bf16
    seconds = (2 * read + kv * 128 * (640 / 8 + 256)) / (3.35e12 / 2)
    assert scale.decode_seconds(meta(preset), c, "H100", 128) == pytest.approx(seconds, rel=1e-9)
    assert scale.decode_seconds(meta(preset), given(step_ms=50.0), "H100", 1) == 0.05
    assert scale.decode_seconds(meta(preset), c, "H100", 1e6) > 2 * read * 1e6 / (989e12 * c.mfu) * 0.999     # then operations


def test_totals_and_hours():
    c, model = given(), meta("3b")
    one = scale.stage_plan(model, "pretrain", "3b", c, "H100", 8)
    assert one["tokens"] == 3_500_000 * (512 + 128) and one["sampling"] == 0
    assert one["hours"] == pytest.approx(one["work"] / (8 * 989e12 * 0.4) / 3600)
    layers = 36 * (2 * 2048 ** 2 + 2 * 2048 * 256 + 3 * 2048 * 11008)     # q, o; k, v; MLP, by their published shapes
    tower = 32 * (4 * 1280 ** 2 + 3 * 1280 * 3420)                       # over 4 x 512 patches
    by_hand = 6 * 3_500_000 * (640 * layers + 128 * 151_936 * 2048 + 2048 * tower)
    assert by_hand < one["work"] < 1.06 * by_hand                        # besides: attention, the merger, norms and biases
    half = scale.stage_plan(model, "pretrain", "3b", given(mfu=0.2), "H100", 8)
    assert half["hours"] == pytest.approx(2 * one["hours"])
    rl = scale.stage_plan(model, "rl", "3b", c, "H100", 8)
    assert rl["rows"] == 80_000 and rl["tokens"] == 10_000 * 640 + 80_000 * 512
    twice = scale.stage_plan(model, "rl", "3b", given(rounds=2.0), "H100", 8)
    assert twice["sampling"] == pytest.approx(2 * rl["sampling"]) and twice["hours"] - rl["hours"] == pytest.approx(rl["sampling"])


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("card, gpus", [("H100", 8), ("L4", 8), ("H200", 8)])
def test_the_largest_pass_that_fits(stage, card, gpus):
    c, model = given(), meta("3b")
    micro, size, recompute = scale.memory(model, stage, "3b", c, card, gpus)
    fits = lambda m, r: plan.peak(plan.memory(model, scale.settings("3b", c, m), stage, gpus, r)) <= 0.9 * scale.CARDS[card][1]
    share = 128 if stage == "rl" else 8
    halves = [share >> k for k in range(share.bit_length())]
    assert (micro, recompute) == next(((m, r) for r in (False, True) for m in halves if fits(m, r)), (None, True))
    assert size > 8 * sum(p.numel() for p in model.parameters()) / gpus
    assert (card, stage) == ("L4", "rl") or micro is not None


def test_settings_are_those_of_the_scripts():
    ours = scale.settings("3b", given())
    for script in (train_pretrain, train_sft, train_rl):
        theirs = script.Config()
        for name in ("train", "optimizer", "batch_size", "prompts", "group_size", "kl"):
            assert getattr(theirs, name, getattr(ours, name)) == getattr(ours, name)
    clip = scale.settings("clip-l14", given(), stage="clip")
    assert (clip.batch_size, clip.optimizer) == (train_clip.Config().batch_size, train_clip.Config().optimizer)


def test_the_page_is_up_to_date_and_the_command_refuses_nonsense(tmp_path, capsys):
    scale.main(["--write", str(tmp_path / "page.md")])
    page = (Path(__file__).parent.parent / "docs" / "SCALE.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "page.md").read_text(encoding="utf-8"), "python -m nanopatho.scale --write docs/SCALE.md"
    scale.main(["--gpus", "1", "--gpu", "L4", "--presets", "small", "--pairs", "1000"])
    assert "| small | pretrain | 1,000 |" in capsys.readouterr().out
    for argv in (["--mfu", "1.2"], ["--gpus", "0"], ["--pairs", "-1"]):
        with pytest.raises(SystemExit):
            scale.main(argv)
        assert f"{argv[0]} {argv[1]}: must be above 0" in capsys.readouterr().err
