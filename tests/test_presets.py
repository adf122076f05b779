"""Order of precedence, exit codes and messages of the command line; every preset names real fields and a real model."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

import train_clip
import train_pretrain
import train_rl
import train_sft
from nanopatho import presets
from nanopatho.clip import CLIP
from nanopatho.vlm import PathoVLM, parse_config

SCRIPTS = {"clip": train_clip, "pretrain": train_pretrain, "sft": train_sft, "rl": train_rl}


@dataclass
class Config:
    """The fields that TRAIN["smoke"]["sft"] sets, and some that no preset knows."""
    preset: str = field(default="tiny", metadata={"help": "size"})
    steps: int = field(default=77, metadata={"help": "how many"})
    lr: float = field(default=1e-5, metadata={"help": "rate"})
    augment: bool = field(default=True, metadata={"help": "turn"})
    style: str = field(default="cot", metadata={"help": "style", "choices": ("cot", "bare")})
    out: str = field(default="runs/x", metadata={"help": "folder"})


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    monkeypatch.setitem(presets.TRAIN, "smoke", {"sft": dict(steps=3, lr=1e-3)})
    monkeypatch.setitem(presets.TRAIN, "tiny", {"sft": dict(steps=9)})
    monkeypatch.setitem(presets.TRAIN, "3b", {})


def parse(*argv, stage="sft"):
    return presets.parse(Config, stage, list(argv))


def test_command_line_over_preset_over_default():
    assert parse() == Config(preset="tiny", steps=9)                   # the default preset counts too
    assert parse("--preset", "smoke") == Config(preset="smoke", steps=3, lr=1e-3)
    assert parse("--preset", "smoke", "--lr", "5e-4") == Config(preset="smoke", steps=3, lr=5e-4)
    assert parse("--preset", "smoke", "--steps", "77", "--lr", "0").steps == 77  # given, though equal to the default
    assert parse("--preset", "smoke", "--lr", "0").lr == 0.0           # 0 is a value, not "left out"
    assert parse("--preset", "3b") == Config(preset="3b")              # a preset without numbers of this stage
    assert parse("--out", "").out == ""


@pytest.mark.parametrize("text,value", [("on", True), ("False", False), ("no", False), ("YES", True), ("0", False)])
def test_bool(text, value):
    assert parse("--augment", text).augment is value


@pytest.mark.parametrize("argv,says", [
    (["--preset", "huge"], ["'huge'", "smoke, tiny, small, 3b, 7b"]),
    (["--preset", "clip-l14"], ["'clip-l14'", "smoke, tiny, small, 3b, 7b"]),     # a preset, but not of this script
    (["--learning_rate", "1"], ["--learning_rate", "--lr", "--steps", "--augment", "--out"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--augment", "maybe"], ["--augment", "'maybe' is neither on nor off"]),
    (["--style", "short"], ["--style", "short", "cot", "bare"]),
])
def test_mistakes_end_with_two_and_the_list(argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in says), message


def test_dry_run_ends_with_the_plan_and_needs_no_init(capsys):
    with pytest.raises(SystemExit) as ended:
        presets.parse(train_sft.Config, "sft", ["--preset", "7b", "--dry-run"])
    assert not ended.value.code and capsys.readouterr().out.startswith("sft, 7b: 8,292,166,656 parameters")


def test_a_logger_that_is_not_installed_is_told_with_its_extra(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    for stage, script in SCRIPTS.items():
        assert presets.parse(script.Config, stage, ["--preset", "smoke"]).log == "off"
        with pytest.raises(SystemExit) as ended:
            presets.parse(script.Config, stage, ["--preset", "smoke", "--log", "wandb"])
        assert ended.value.code == 2
        assert '--log wandb: wandb is not installed; pip install -e ".[log]"' in capsys.readouterr().err


def test_clip_has_its_own_presets(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--preset", "7b", stage="clip")
    assert ended.value.code == 2 and "smoke, tiny, small, clip-b16, clip-l14" in capsys.readouterr().err
    assert parse("--preset", "clip-b16", stage="clip").preset == "clip-b16"


def test_help_shows_text_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--steps int" in shown and "how many (default: 77)" in shown and "Order of precedence" in shown


def test_a_preset_with_an_unknown_field_is_our_fault(monkeypatch):
    monkeypatch.setitem(presets.TRAIN, "smoke", {"sft": dict(stepz=3)})
    with pytest.raises(AssertionError, match="smoke.*sft.*stepz"):
        parse("--preset", "smoke")


def test_every_preset_fits_every_script(monkeypatch):
    monkeypatch.undo()                                                 # the real numbers
    assert set(presets.TRAIN) == set(presets.VLM) | set(presets.CLIP)
    for stage, script in SCRIPTS.items():
        for preset in presets.CLIP if stage == "clip" else presets.VLM:
            start = ["--init", "weights"] if preset in presets.PUBLISHED else []
            c = presets.parse(script.Config, stage, ["--preset", preset, *start])
            for f in dataclasses.fields(c):
                value = getattr(c, f.name)
                assert type(value) is f.type or (f.type, type(value)) == (float, int), (stage, preset, f.name, value)
                assert value in f.metadata.get("choices", (value,)) and len(f.metadata["help"]) > 8, f.name


def test_models_are_the_published_ones():
    with torch.device("meta"):
        for name, total in (("3b", 3_754_622_976), ("7b", 8_292_166_656)):          # Qwen2.5-VL-Instruct
            assert sum(p.numel() for p in PathoVLM(presets.VLM[name]).parameters()) == total
        for name, total in (("clip-b16", 149_620_737), ("clip-l14", 427_616_513)):  # OpenAI's CLIP
            assert sum(p.numel() for p in CLIP(presets.CLIP[name]).parameters()) == total
        for name in ("smoke", "tiny", "small"):
            config = parse_config(presets.VLM[name])
            assert config["vocab_size"] == presets.TINY_BPE + 22        # 14 special, 8 added tokens: no unused row
            assert config["vision_config"]["window_size"] % 28 == 0
            sizes = [sum(p.numel() for p in m.parameters()) for m in (PathoVLM(config), CLIP(presets.CLIP[name]))]
            assert max(sizes) < 60e6
