"""Bad input as a user meets it: one message with file, record, field and fix, before training, and nothing is lost.

The rules of single records and images stand in test_data.py and test_image.py; here the programs are tried.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_clip
import train_pretrain
import train_rl
import train_sft
from data_prep import __main__ as data_prep
from nanopatho import chat, evaluate
from nanopatho.data import DataError
from nanopatho.image import ImageError
from nanopatho.log import ConfigError, check_finite, run_main
from smoke import QUICK, RL, equal, metrics, options, strict, weights

ROOT = Path(__file__).resolve().parents[1]
BCSS = Path(os.environ.get("NANOPATHO_SHARED", ROOT.parent / "shared")) / "data" / "bcss"
SCRIPTS = {"clip": train_clip, "pretrain": train_pretrain, "sft": train_sft, "rl": train_rl}
POOL = {"clip": "captions", "pretrain": "captions", "sft": "sft", "rl": "rl"}
SHORT = dict(QUICK, steps=4, batch_size=4, eval_items=1, save_every=2)


def start(stage, chain, **more):
    """Run a script at smoke size, from the chain's weights where it needs some."""
    init = {} if stage == "clip" else dict(init=chain / "pretrain")
    SCRIPTS[stage].main(options(**{**dict(preset="smoke"), **init, **more}))


def kill_after(monkeypatch, script, step):
    real = script.Run.step

    def killed(self, at, **numbers):
        real(self, at, **numbers)
        if at == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(script.Run, "step", killed)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# --- one message, no traceback ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DataError, ImageError, ConfigError])
def test_what_the_user_can_mend_is_one_message(kind):
    def main():
        raise kind("a.jsonl:3 is wrong; mend it")
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == "error: a.jsonl:3 is wrong; mend it"    # sys.exit prints it and ends with code 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        run_main(lambda: torch.zeros(2).view(3))
    with pytest.raises(ValueError):
        run_main(lambda: int("seven"))
    assert run_main(lambda: 7) == 7


@pytest.mark.parametrize("call", [["train_sft.py"], ["-m", "nanopatho.evaluate", "--model", "none"]])
def test_as_a_program(call, tmp_path):
    done = subprocess.run([sys.executable, *call, "--data", str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/none/") and "no such file. Make one" in done.stderr


# --- images and records -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory):
    """file -> what the message says of it"""
    folder = tmp_path_factory.mktemp("bad")
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 60, 3), dtype=np.uint8)) for i in range(3)]
    noise[0].save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:3000])
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(folder / "deep.png")
    noise[0].save(folder / "moving.gif", save_all=True, append_images=noise[1:])
    Image.new("1", (16_000, 6_000)).save(folder / "gigantic.png")
    Image.new("RGB", (3, 700)).save(folder / "stripe.png")
    Image.new("CMYK", (112, 112), (0, 255, 255, 0)).save(folder / "print.jpg")
    return {folder / "cut.png": "damaged or cut off", folder / "deep.png": "more than 8 bits",
            folder / "moving.gif": "3 frames", folder / "gigantic.png": "96,000,000 pixels, the limit is",
            folder / "stripe.png": "one side is over 200 times", folder / "absent.png": "no such file"}


@pytest.fixture
def data(world, tmp_path):
    """A copy of the world whose files may be spoiled; the images are shared."""
    out = tmp_path / "data"
    out.mkdir()
    (out / "images").symlink_to(world / "images")
    for path in world.glob("*.json*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def spoil(data, pool, **changes):
    """Write the pool anew with other fields in its fourth record (... takes a field away)."""
    world = (data / "images").resolve().parent
    rows = [json.loads(line) for line in (world / f"{pool}.jsonl").read_text().splitlines()]
    rows[3] = {k: v for k, v in {**rows[3], **changes}.items() if v is not ...}
    (data / f"{pool}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("stage", SCRIPTS)
def test_images_that_cannot_be_used(stage, data, chain, tmp_path, bad_images):
    for path, says in bad_images.items():
        spoil(data, POOL[stage], image=str(path))
        with pytest.raises(DataError) as told:
            start(stage, chain, data=data, out=tmp_path / "out")
        assert f"{data}/{POOL[stage]}.jsonl:4 id={POOL[stage]}-000003: field 'image': {path}" in str(told.value)
        assert says in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_an_evaluation(data, chain, bad_images, capsys):
    for path, says in bad_images.items():
        spoil(data, "test", image=str(path))
        with pytest.raises(DataError, match=rf"test.jsonl:4 id=test-000003: field 'image': {path}.*{says}"):
            evaluate.main(options(model=chain / "sft", data=data))
    spoil(data, "test", image=str(path.parent / "print.jpg"))           # CMYK can be read
    evaluate.main(options(model=chain / "sft", data=data, items=4, samples=0, max_new_tokens=2))
    assert json.loads(capsys.readouterr().out)["n"] == 4
    with pytest.raises(ConfigError, match="--model: .*none: no such folder"):
        evaluate.main(options(model=data / "none", data=data))


@pytest.mark.parametrize("stage,field,value,says", [
    ("clip", "caption", ..., "is missing"), ("pretrain", "image", ..., "is missing"), ("sft", "level", "expert", "easy, medium"),
    ("sft", "messages", [{"role": "user", "content": "<image>"}], "assistant turn"), ("rl", "options", ..., "is missing"),
    ("rl", "answer", ..., "is missing"), ("rl", "answer", "E", "letters A, B, C, D"), ("rl", "id", 5, "non-empty string")])
def test_records_that_cannot_be_used(stage, field, value, says, data, chain, tmp_path):
    spoil(data, POOL[stage], **{field: value})
    with pytest.raises(DataError, match=rf"{POOL[stage]}.jsonl:4 id=.*: field '{field}' .*{says}"):
        start(stage, chain, data=data, out=tmp_path / "out")
    (data / f"{POOL[stage]}.jsonl").write_text("\n")
    with pytest.raises(DataError, match=f"{POOL[stage]}.jsonl: holds no records"):
        start(stage, chain, data=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_files_beside_the_records(stage, data, chain, tmp_path):
    """They are read at the end of a stage, so they are checked at its beginning."""
    whole = (data / "lexicon.json").read_bytes()
    for text in ("{", "[1]", '{"H&E": {"material": {"fat": "fat"}}}'):
        (data / "lexicon.json").write_text(text)
        with pytest.raises(DataError, match="lexicon.json"):
            start(stage, chain, data=data, out=tmp_path / "out")
    (data / "lexicon.json").write_bytes(whole)
    if stage == "clip":
        spoil(data, "test", facts=..., caption=...)
        with pytest.raises(DataError, match="test.jsonl:4 id=test-000003: no field 'caption'"):
            start(stage, chain, data=data, out=tmp_path / "out")
        (data / "zero_shot.json").write_text("{}")
        spoil(data, "test")
        with pytest.raises(DataError, match="zero_shot.json: must be .*CLASSNAME"):
            start(stage, chain, data=data, out=tmp_path / "out")
    else:
        spoil(data, "test", facts={"tissue": "fat"})
        with pytest.raises(DataError, match="test-000003: field 'facts' lacks architecture.*lexicon.json"):
            start(stage, chain, data=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_settings_are_checked_before_anything_is_read(stage, capsys):
    size = "clip-b16" if stage == "clip" else "3b"
    few = "prompts" if stage == "rl" else "batch_size"
    for argv, says in ((["--preset", size], f"--preset {size} needs --init FOLDER: published sizes"),
                       ([f"--{few}", "0"], f"--{few} 0: must be 1 or more"), (["--lr", "nan"], "--lr nan: must be 0 or more"),
                       (["--seed", "-1"], "--seed -1: must be 0 or more")):
        with pytest.raises(SystemExit) as ended:
            SCRIPTS[stage].main(argv)
        assert ended.value.code == 2 and says in capsys.readouterr().err
    if stage == "rl":
        with pytest.raises(ConfigError, match="--kl much: write a number"):
            train_rl.main(["--kl", "much"])


def test_claims_cannot_be_paid_without_facts(data, chain, tmp_path):
    (data / "lexicon.json").unlink()
    with pytest.raises(ConfigError, match="--claim_weight 0.5: no record of .*rl.jsonl has facts"):
        start("rl", chain, data=data, out=tmp_path / "out", claim_weight=0.5)


@pytest.mark.parametrize("file,content,says", [
    ("model.safetensors", None, "missing"), ("model.safetensors", b"cut off", "damaged or cut off"),
    ("config.json", None, "missing"), ("config.json", b'{"a', "not valid JSON"), ("config.json", b"[]", "JSON object"),
    ("tokenizer.json", None, "is missing"), ("tokenizer.json", b"{}", "cannot be read as a tokenizer")])
def test_weights_to_start_from(file, content, says, chain, world, tmp_path):
    shutil.copytree(chain / "pretrain", tmp_path / "init")
    (tmp_path / "init" / file).unlink()
    if content is not None:
        (tmp_path / "init" / file).write_bytes(content)
    for script in (train_pretrain, train_sft, train_rl):
        with pytest.raises(ConfigError, match=rf"^--init: .*{tmp_path}/init.*{says}"):
            script.main(options(preset="smoke", data=world, init=tmp_path / "init", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model_and_unfinished_start(chain, world, tmp_path):
    shutil.copytree(chain / "pretrain", tmp_path / "init")
    chat.train_tokenizer(["abc"], 300).save(tmp_path / "init")
    with pytest.raises(ConfigError, match=r"<\|image_pad\|> has id 312, config.json says 1014"):
        start("sft", chain, data=world, init=tmp_path / "init", out=tmp_path / "out")
    (tmp_path / "init" / "model.safetensors").unlink()
    (tmp_path / "init" / "last").mkdir()
    with pytest.raises(ConfigError, match="has not finished: start it again to finish it$"):       # of LoRA: no weights there
        start("sft", chain, data=world, init=tmp_path / "init", out=tmp_path / "out")
    shutil.copy(chain / "pretrain" / "model.safetensors", tmp_path / "init" / "last")
    with pytest.raises(ConfigError, match="has not finished: start it again to finish it, or give .*init/last"):
        start("sft", chain, data=world, init=tmp_path / "init", out=tmp_path / "out")


# --- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_folder_that_cannot_be_written(stage, world, chain, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="file/run: cannot write the run folder.*Choose another --out"):
        start(stage, chain, data=world, out=tmp_path / "file" / "run")


@pytest.fixture(scope="module")
def broken_off(chain, world, tmp_path_factory):
    """A pretraining of four steps, killed after its third; the checkpoint holds two."""
    out = tmp_path_factory.mktemp("broken") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, train_pretrain, 2)
        start("pretrain", chain, **SHORT, data=world, out=out)
    return out


def test_resuming_with_other_settings_is_noticed(broken_off, chain, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(broken_off, out)
    before = snapshot(out)
    for changed, says in ((dict(lr=1e-4), r"lr was 0.001, is 0.0001"), (dict(seed=5, batch_size=8),
                          "seed was 0, is 5; batch_size was 4, is 8"), (dict(steps=5), "steps was 4, is 5")):
        with pytest.raises(ConfigError, match=rf"{out} holds a run with other settings: {says}\. Give the old ones .*--out"):
            start("pretrain", chain, **{**SHORT, **changed}, data=world, out=out)
    with pytest.raises(ConfigError, match="stage was 'pretrain', is 'sft'"):
        start("sft", chain, **SHORT, data=world, out=out)
    assert snapshot(out) == before
    start("pretrain", chain, **{**SHORT, "threads": 0, "eval_items": 2, "save_every": 3}, data=world, out=out)
    torch.set_num_threads(1)
    assert len(metrics(out)) == 4 and strict(out / "results.json")["n"] == 2


def test_half_written_run_folders(broken_off, chain, world, tmp_path):
    def damaged(name, content):
        out = tmp_path / name.replace("/", "_")
        shutil.copytree(broken_off, out)
        path = out / name
        path.write_bytes(content(path.read_bytes())) if content else path.unlink()
        return dict(SHORT, data=world, out=out)

    half = lambda whole: whole[:len(whole) // 2]
    for name, content, says in (("last/train_state.pt", half, r"train_state.pt cannot be read .*Remove .*last to start"),
                                ("last/model.safetensors", half, r"damaged or cut off.*remove .*last to start"),
                                ("last/config.json", None, r"config.json: missing.*remove .*last to start"),
                                ("run.json", half, r"run.json cannot be read .*Choose another --out")):
        fields = damaged(name, content)
        before = snapshot(fields["out"])
        with pytest.raises(ConfigError, match=says):
            start("pretrain", chain, **fields)
        assert snapshot(fields["out"]) == before                       # told, and nothing touched
    fields = damaged("metrics.jsonl", lambda whole: whole[:-40])       # the line that the kill cut off
    start("pretrain", chain, **fields)
    whole = dict(SHORT, data=world, out=tmp_path / "whole")
    start("pretrain", chain, **whole)
    assert len(metrics(fields["out"])) == 4 and equal(weights(fields["out"]), weights(whole["out"]))


def test_finished_weights_are_not_overwritten(chain, world):
    before = snapshot(chain / "sft")
    for more, says in ((dict(lr=0.5), "lr was 0.001, is 0.5"), (dict(init=chain / "sft"), "--out and --init are the same")):
        with pytest.raises(ConfigError, match=says):
            start("sft", chain, data=world, out=chain / "sft", **more)
    with pytest.raises(ConfigError, match="stage was 'sft', is 'grpo'"):
        start("rl", chain, data=world, out=chain / "sft", algo="grpo")
    assert snapshot(chain / "sft") == before


# --- a loss that is no number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clip", "pretrain", "sft"])
def test_a_loss_that_is_no_number_stops_the_run(stage, chain, world, tmp_path, monkeypatch):
    """At the third step. The checkpoint of the second stays, and no step is logged that was not made."""
    script, calls = SCRIPTS[stage], []
    owner, name = (train_clip, "clip_loss") if stage == "clip" else (train_pretrain.PathoVLM, "loss")
    real = getattr(owner, name)

    def spoiled(*a, **k):
        calls.append(1)
        return real(*a, **k) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(owner, name, spoiled)
    fields = dict(SHORT, data=world, out=tmp_path)
    if stage == "clip":
        del fields["steps"]
    with pytest.raises(ConfigError, match=r"step 3: loss is nan, grad_norm is nan; nothing was updated. Records of this step: "
                                          rf"{POOL[stage]}-0.*, {POOL[stage]}-0.*lower --lr"):
        start(stage, chain, **fields)
    assert len(metrics(tmp_path)) == 2
    assert torch.load(tmp_path / "last" / "train_state.pt")["step"] == 2
    if stage != "clip":
        assert all(torch.isfinite(w).all() for w in weights(tmp_path / "last").values())


def test_many_records_are_not_all_listed():
    rows = [{"id": f"r{i}"} for i in range(300)]
    check_finite(0, rows, loss=1.0, grad_norm=2.0)
    with pytest.raises(ConfigError, match="r19 and 280 more. Look"):
        check_finite(0, rows, loss=1.0, grad_norm=float("inf"))


# --- your own data ----------------------------------------------------------------------------------------------------


def test_records_without_pools_and_lexicon(data, chain, tmp_path, capsys):
    """The smallest data folder of each stage: its records and their images."""
    needed = {"clip": ("id", "image", "caption"), "pretrain": ("id", "image", "caption"),
              "sft": ("id", "image", "messages"), "rl": ("id", "image", "question", "options", "answer")}
    for stage, names in needed.items():
        own = tmp_path / stage
        own.mkdir()
        (own / "images").symlink_to(data / "images")
        rows = [json.loads(line) for line in (data / f"{POOL[stage]}.jsonl").read_text().splitlines()]
        (own / f"{POOL[stage]}.jsonl").write_text("".join(json.dumps({k: r[k] for k in names}) + "\n" for r in rows))
        start(stage, chain, data=own, out=own / "run", **({"steps_morphology": 0} if stage == "clip" else {}))
        assert strict(own / "run" / "results.json")["seconds"] >= 0 and (own / "run" / "model.safetensors").is_file()
        assert stage in ("clip", "pretrain") or f"{own}/test.jsonl is not there: no accuracy" in capsys.readouterr().out
        assert not (own / "run" / "last").exists()


def test_real_tiles_through_the_whole_chain(tmp_path):
    """Twenty tiles in two folders -> records by `data_prep folder` -> all stages, each from the one before."""
    if not BCSS.is_dir():
        pytest.skip(f"{BCSS} is absent: the real H&E tiles are not part of the repository (set NANOPATHO_SHARED)")
    for label in ("tumor", "non_tumor"):
        regions = {}
        for path in sorted((BCSS / label).glob("*.jpg")):
            regions.setdefault(path.name.split("_")[0], []).append(path)
        (tmp_path / "tiles" / label).mkdir(parents=True)
        for path in [p for files in regions.values() for p in files[:-(-10 // len(regions))]][:10]:
            shutil.copy(path, tmp_path / "tiles" / label)
    own, out = tmp_path / "own", tmp_path / "run"
    assert data_prep.main(["folder", str(tmp_path / "tiles"), "--out", str(own), "--labels",
                           "tumor=invasive tumor,non_tumor=other tissue"]) == 0
    rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in own.glob("*.jsonl")}
    assert set(rows) == {"captions", "sft", "rl", "val", "test"} and len(rows["captions"] + rows["val"] + rows["test"]) == 20
    assert not {r["group"] for r in rows["test"]} & {r["group"] for r in rows["captions"]}
    assert data_prep.main(["validate", *map(str, own.glob("*.jsonl"))]) == 0
    train_clip.main(options(preset="smoke", data=own, out=out / "clip"))
    train_pretrain.main(options(preset="smoke", data=own, out=out / "pretrain"))
    train_sft.main(options(preset="smoke", data=own, init=out / "pretrain", out=out / "sft", max_new_tokens=8))
    train_rl.main(options(preset="smoke", data=own, init=out / "sft", out=out / "grpo", algo="grpo"))
    evaluate.main(options(model=out / "grpo", data=own, samples=0, max_new_tokens=4))
    n = len(rows["test"])
    assert strict(out / "clip" / "results.json")["zero_shot_accuracy_n"] == strict(out / "pretrain" / "results.json")["n"] == n
    for stage in ("sft", "grpo"):
        assert strict(out / stage / "results.json")["n"] == n and (out / stage / "samples" / "questions.json").is_file()
