"""The three scripts of the language model as a user starts them: files, resume, bad input, what SFT trains.

The update of RL has test_train_rl.py, train_clip.py is in test_evaluate_clip.py. All at smoke size: 0.4 M parameters.
"""

import json
import math

import pytest
import torch

import train_clip
import train_pretrain
import train_rl
import train_sft
from data_prep import shards as prep
from nanopatho import chat, checkpoint, evaluate, presets
from nanopatho.clip import CLIP
from nanopatho.data import DataError, read_records
from nanopatho.log import ConfigError
from smoke import QUICK, RL, equal, luck, metrics, options, strict, weights

# --- end to end -------------------------------------------------------------------------------------------------------


def test_pretrain_and_sft_leave_what_they_promise(chain, world):
    for name, numbers in (("pretrain", {"loss", "grad_norm", "lr", "tokens"}),
                          ("sft", {"loss", "grad_norm", "lr", "tokens", "hard"})):
        out = chain / name
        assert {p.name for p in out.iterdir()} >= {"run.json", "metrics.jsonl", "log.txt", "samples", "results.json",
                                                   "config.json", "model.safetensors", "tokenizer.json"}
        assert not (out / "last").exists()
        rows = metrics(out)
        assert len(rows) == 3 and set(rows[0]) == numbers | {"step", "time"}
        assert abs(rows[0]["loss"] - math.log(1024)) < 1.5             # untrained: about one in 1,024 ids
        config = strict(out / "run.json")
        assert config["preset"] == "smoke" and config["stage"] == name and config["data"] == str(world)
        assert chat.ChatTokenizer.load(out).id["<|image_pad|>"] == strict(out / "config.json")["image_token_id"]
    assert not equal(weights(chain / "pretrain"), weights(chain / "sft"))
    assert strict(chain / "pretrain" / "results.json")["n"] == 24
    results = strict(chain / "sft" / "results.json")
    assert {"seconds", "greedy_accuracy", "greedy_accuracy_ci", "sampled_accuracy", "contradiction",
            "by_level"} <= set(results)
    assert set(results["pools"]) == {"test_combo", "test_stain"} and results["n"] == 8
    assert len(strict(chain / "sft" / "each.json")["greedy"]) == 8
    assert len(strict(chain / "sft" / "samples" / "questions.json")) == 6
    shown = (chain / "sft" / "samples" / "trained.txt").read_text()
    assert shown.startswith("<|im_start|>system\nYou are a pathology expert") and "<|im_end|>]" in shown


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_rl_runs_end_to_end(algo, chain, world, tmp_path):
    train_rl.main(options(preset="smoke", algo=algo, data=world, init=chain / "sft", out=tmp_path))
    rows = metrics(tmp_path)
    assert len(rows) == 2 and {"accuracy", "format", "length", "reward", "mixed", "rounds", "entropy", "truncated",
                               "pass_at_k", "claims"} <= set(rows[0])
    config = strict(tmp_path / "run.json")
    assert {k: config[k] for k in train_rl.ALGO[algo]} == train_rl.ALGO[algo] and config["cache_length"] == 3
    results = strict(tmp_path / "results.json")
    assert {"greedy_accuracy", "sampled_accuracy", "format", "mean_length", "contradiction", "pools"} <= set(results)
    page = strict(tmp_path / "samples" / "questions.json")
    assert all(len(q["answers"]) == 8 and (tmp_path.parent / q["image"]).is_file() for q in page)
    assert weights(tmp_path).keys() == weights(chain / "sft").keys()


# --- shards, LoRA -----------------------------------------------------------------------------------------------------


def packed(world, plain, out):
    """The training pools of the smoke world as tar shards of seven records, in the pools that the scripts look for."""
    (plain / "images").symlink_to(world / "images")
    captions, sft = ([json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()] for name in ("captions", "sft"))
    pools = {"captions": captions, "morphology": [r for r in captions if r.get("morphology")]}
    pools |= {f"sft_{level}": [r for r in sft if r["level"] == level] for level in ("easy", "medium", "hard")}
    for name, rows in pools.items():
        (plain / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prep.pack([plain / f"{name}.jsonl" for name in pools], out, 7)
    return out


@pytest.fixture(scope="session")
def shards(world, tmp_path_factory):
    return packed(world, tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed") / "shards")


@pytest.fixture(scope="session")
def clip_start(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip_start")
    torch.manual_seed(1)
    CLIP(presets.CLIP["smoke"]).save_pretrained(out)
    texts = [r["caption"] for r in read_records(world / "captions.jsonl")]
    chat.clip_tokenizer(texts, presets.CLIP["smoke"]["text_config"]["vocab_size"]).save(str(out / "tokenizer.json"))
    return out


@pytest.mark.parametrize("stage", ["clip", "pretrain"])
def test_a_batch_of_all_records_is_the_same_from_shards_and_from_files(stage, world, shards, chain, clip_start, tmp_path):
    """No loss depends on the order inside a batch. SFT draws by level, so its batches differ."""
    n = len([r for r in read_records(world / "captions.jsonl") if stage == "pretrain" or r.get("morphology")])
    fields = dict(QUICK, batch_size=n, lr=1e-3, augment="off", eval_items=0)
    fields |= dict(init=clip_start, steps_morphology=2, steps_all=0) if stage == "clip" else dict(init=chain / "pretrain", steps=2)
    script, load = (train_clip, CLIP.from_pretrained) if stage == "clip" else (train_pretrain, train_pretrain.PathoVLM.from_pretrained)
    for name, data in (("files", world), ("shards", shards)):
        script.main(options(**fields, data=data, out=tmp_path / name, workers=0))
    one, other, start = (load(folder).state_dict() for folder in (tmp_path / "files", tmp_path / "shards", fields["init"]))
    assert max((one[k] - other[k]).abs().max() for k in one) < 2e-6 < 1e-3 < max((one[k] - start[k]).abs().max() for k in one)


@pytest.mark.parametrize("stage", ["clip", "pretrain", "sft"])
def test_folders_of_shards_are_mixed(stage, world, shards, chain, clip_start, tmp_path, monkeypatch):
    """A second folder, without levels and without captions of form; 0.5 or 3 of its records come for each of the first's."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "images").symlink_to(world / "images")
    for name in ("captions", "sft"):
        (tmp_path / "plain" / f"{name}.jsonl").write_text((world / f"{name}.jsonl").read_text().replace('"id": "', '"id": "other-'))
    prep.pack([tmp_path / "plain" / f"{name}.jsonl" for name in ("captions", "sft")], tmp_path / "other", 7)
    script, seen = {"clip": train_clip, "pretrain": train_pretrain, "sft": train_sft}[stage], []
    monkeypatch.setattr(script, "check_finite", lambda step, rows, *more, **numbers: seen.append([r["id"] for r in rows]) or True)
    steps = dict(steps_morphology=2, steps_all=2, eval_items=0) if stage == "clip" else dict(steps=4)
    more = dict(eval_items=1, eval_samples=1, max_new_tokens=4) if stage == "sft" else {}
    script.main(options(**QUICK, data=shards, mix=f"{tmp_path / 'other'}=3", out=tmp_path / "out", batch_size=16, workers=0,
                        init=clip_start if stage == "clip" else chain / "pretrain", lr=1e-4, **steps, **more))
    shares = [sum(i.startswith("other-") for i in ids) / len(ids) for ids in seen]
    captions = 180 / (240 + sum("morphology" in line for line in (world / "captions.jsonl").read_text().splitlines()))
    want = [0, 0, captions, captions] if stage == "clip" else [0.75] * 4      # 60 : 180 captions, 40 : 120 conversations
    assert len(seen) == 4 and all(abs(a - b) <= 0.13 for a, b in zip(shares, want)), (shares, want)


def test_the_curriculum_moves_inside_a_mixture():
    sources, levels = [dict(weight=w) for w in (10, 10, 10, 30, 40)], [0, 1, 2, 0, -1]
    for p, easy, medium, hard in ((0, 0.6, 0.3, 0.1), (1, 0.25, 0.35, 0.4), (0.5, 0.425, 0.325, 0.25)):
        assert train_sft.moving_weights(p, sources, levels) == pytest.approx(
            [60 * easy / 4, 60 * medium, 60 * hard, 60 * easy * 3 / 4, 40])
    assert train_sft.moving_weights(0, sources[:2], [0, 2]) == pytest.approx([20 * 6 / 7, 20 / 7])
    assert train_sft.moving_weights(0.3, sources[4:], [-1]) == pytest.approx([40])


def test_shards_need_init_and_the_pools_of_the_stage(shards, chain, tmp_path):
    for script in (train_clip, train_pretrain, train_sft):
        with pytest.raises(ConfigError, match="shards, which are not read in advance .* give --init"):
            script.main(options(preset="smoke", data=shards, out=tmp_path / "out"))
    (tmp_path / "index.json").write_text(json.dumps({"format": prep.FORMAT, "pools": {"other": {"shards": []}}}))
    for script, pool in ((train_clip, "morphology"), (train_pretrain, "captions"), (train_sft, "sft")):
        with pytest.raises(DataError, match=f"no pool '{pool}', it has other"):
            script.main(options(preset="smoke", data=tmp_path, init=chain / "pretrain", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_lora_is_saved_in_the_published_layout(stage, world, chain, tmp_path, monkeypatch):
    """The weights left behind are W + 2 B A, reckoned in float64 from the start and the last checkpoint; that holds B and A
    alone. At the first update of RL the model is its own reference: a KL of exactly zero, and above zero later."""
    script, fields = (train_sft, RESUME["sft, lora"][1]) if stage == "sft" else (train_rl, dict(RESUME["grpo, lora"][1], updates=1))
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    kept, finish = {}, checkpoint.finish

    def look(out, *more):
        kept.update(torch.load(out + "/last/train_state.pt")["adapter"])
        assert not list((tmp_path / "last").glob("*.safetensors"))
        finish(out, *more)
    monkeypatch.setattr(checkpoint, "finish", look)
    script.main(options(**fields, data=world, init=chain / "pretrain", out=tmp_path))
    start, found = weights(chain / "pretrain"), weights(tmp_path)
    assert start.keys() == found.keys() and len(kept) == 2 * 2 * 7       # A and B, two layers, seven matrices in each
    changed = {name.replace(".lora_a", ".weight") for name in kept if name.endswith(".lora_a")}
    for name in start:
        if name in changed:
            a, b = (kept[name.replace(".weight", x)].double() for x in (".lora_a", ".lora_b"))
            assert torch.allclose(found[name].double(), start[name].double() + 2 * b @ a, atol=1e-7) and b.any()
        else:
            assert torch.equal(found[name], start[name]), name
    if stage == "grpo":
        kl = [r["kl"] for r in metrics(tmp_path) if "kl" in r]
        assert kl[0] == 0 and max(kl) > 1e-6


# --- resume: N steps == k steps, a kill, N - k steps ------------------------------------------------------------------


RESUME = {
    "pretrain": (train_pretrain, dict(QUICK, steps=6, batch_size=4, optimizer="muon", eval_items=2)),
    "sft": (train_sft, dict(QUICK, steps=6, batch_size=4, eval_items=1, eval_samples=1, max_new_tokens=4)),
    "grpo": (train_rl, dict(RL, algo="grpo", steps=6, lr=1e-3, epochs=2)),
    "dapo": (train_rl, dict(RL, algo="dapo", steps=6, lr=1e-3)),
    "sft, lora": (train_sft, dict(QUICK, steps=6, batch_size=4, eval_items=1, eval_samples=1, max_new_tokens=4, lora=4, lr=1e-2)),
    "grpo, lora": (train_rl, dict(RL, algo="grpo", steps=6, lr=1e-2, lora=4)),
}


@pytest.mark.parametrize("stage", RESUME)
def test_resume_is_bitwise(stage, chain, world, tmp_path, monkeypatch):
    """Six steps in one go, and six with a kill after the fifth; the checkpoint holds four."""
    script, fields = RESUME[stage]
    fields = dict(fields, data=world, **({} if stage == "pretrain" else dict(init=chain / "pretrain")))
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    script.main(options(**fields, out=tmp_path / "whole", save_every=0))
    real = script.Run.step

    def killed(self, step, **numbers):
        real(self, step, **numbers)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Run, "step", killed)
        script.main(options(**fields, out=tmp_path / "broken", save_every=2))
    assert len(metrics(tmp_path / "broken")) == 5 and not (tmp_path / "broken" / "model.safetensors").exists()
    script.main(options(**fields, out=tmp_path / "broken", save_every=2))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    whole, broken = metrics(tmp_path / "whole"), metrics(tmp_path / "broken")
    assert len(whole) == 6 and all(r.pop("time") >= 0 for r in whole + broken) and whole == broken
    if script is train_rl:
        assert any("loss" in r for r in whole[4:]) and any(r["mixed"] for r in whole)   # something was learned after it
    results = [strict(tmp_path / name / "results.json") for name in ("whole", "broken")]
    assert all(r.pop("seconds") >= 0 for r in results) and results[0] == results[1]
    assert not (tmp_path / "broken" / "last").exists()


# --- a step that is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["clip", "pretrain"])
def test_a_step_that_is_not_finite_is_passed_over(stage, world, chain, tmp_path, monkeypatch):
    """The third of five. It is counted, also by a run that is resumed after it, and nothing of it reaches the weights."""
    script = train_clip if stage == "clip" else train_pretrain
    owner, name = (train_clip, "clip_loss") if stage == "clip" else (train_pretrain.PathoVLM, "loss")
    real, steps, calls = getattr(owner, name), [], []
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or real(*a, **k) * (math.nan if len(calls) == 3 else 1))
    update = script.Optimizers.step
    monkeypatch.setattr(script.Optimizers, "step", lambda self, lr: steps.append(lr) or update(self, lr))
    length = dict(steps_morphology=2, steps_all=3) if stage == "clip" else dict(steps=5, init=chain / "pretrain")
    fields = dict(QUICK, data=world, out=tmp_path, batch_size=4, eval_items=0 if stage == "clip" else 1, **length)
    saved, real_save = [], script.checkpoint.save
    monkeypatch.setattr(script.checkpoint, "save", lambda *a: saved.append(a[3]) or real_save(*a))
    script.main(options(**fields, save_every=4, max_skipped=1))
    rows = metrics(tmp_path)
    assert len(steps) == 4 and [r.get("skipped") for r in rows] == [None, None, 1, None, None]
    assert "loss" not in rows[2] and all("loss" in r for i, r in enumerate(rows) if i != 2)
    assert [len(s["skipped"]) for s in saved] == [1, 1] and "step 3: loss is nan" in saved[0]["skipped"][0]


# --- command line and bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_clip, train_pretrain, train_sft, train_rl])
def test_help_explains_every_field(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")                              # no line breaks inside words
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and " ".join(script.__doc__.split()) in shown
    for name, f in script.Config.__dataclass_fields__.items():
        assert f"--{name} " in shown and f"{' '.join(f.metadata['help'].split())} (default: {f.default})" in shown, name


@pytest.mark.parametrize("script", [train_clip, train_pretrain, train_sft, train_rl])
@pytest.mark.parametrize("argv,says", [(["--preset", "huge"], ["'huge'", "smoke", "tiny", "small"]),
                                       (["--stepz", "3"], ["--stepz", "--seed", "--out"])])
def test_unknown_preset_and_field(script, argv, says, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(argv)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in message for word in says), message


@pytest.mark.parametrize("field,value,choices", [("algo", "ppo", "grpo"), ("aggregation", "mean", "token-mean"),
                                                 ("reward", "sum", "dapo_gated"), ("dynamic", "true", "on")])
def test_a_wrong_choice_of_rl_is_told_at_once(field, value, choices, capsys):
    with pytest.raises(SystemExit) as ended:
        train_rl.main([f"--{field}", value])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"--{field}" in message and value in message and choices in message


@pytest.mark.parametrize("script,name", [(train_pretrain, "captions"), (train_sft, "sft"), (train_rl, "rl")])
def test_missing_data_says_how_to_make_it(script, name, tmp_path):
    with pytest.raises(DataError, match=rf"none.{name}.jsonl: no such file. Make one with `python -m data_prep micro"):
        script.main(options(preset="smoke", data=tmp_path / "none", out=tmp_path / "out", init="x"))
    assert not (tmp_path / "out").exists()


def test_rl_needs_a_start(world, tmp_path):
    with pytest.raises(ConfigError, match="--init is empty.*SFT run folder"):
        train_rl.main(options(preset="smoke", data=world, out=tmp_path / "out"))
    for script in (train_sft, train_rl):
        with pytest.raises(ConfigError, match="nowhere: no such folder"):
            script.main(options(preset="smoke", data=world, out=tmp_path / "out", init=tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_faults_of_data_are_found_before_training(world, tmp_path, chain):
    """Also those that only the evaluation at the end would meet."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(world / "images")
    for path in world.glob("*.json*"):
        (data / path.name).write_bytes(path.read_bytes())

    def spoil(name, **changes):
        rows = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        rows[3].update(changes)
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    (tmp_path / "cut.jpg").write_bytes((world / "images" / "test-000000.jpg").read_bytes()[:700])
    for pool, changes, says, scripts in (
            ("test_stain", dict(answer="E"), r"test_stain.jsonl:4 id=.*'answer' must be one of the letters A",
             (train_sft, train_rl)),
            ("val", dict(options=["a"]), r"val.jsonl:4 .*'options'", (train_sft, train_rl)),
            ("test", dict(image=str(tmp_path / "cut.jpg")), r"test.jsonl:4 .*cut.jpg: damaged or cut off",
             (train_pretrain, train_sft, train_rl)),
            ("captions", dict(caption=""), r"captions.jsonl:4 .*'caption' is missing", (train_pretrain,)),
            ("sft", dict(messages=[]), r"sft.jsonl:4 .*'messages' is missing", (train_sft,))):
        spoil(pool, **changes)
        for script in scripts:
            with pytest.raises(DataError, match=says):
                script.main(options(preset="smoke", data=data, out=tmp_path / "out", init=chain / "pretrain"))
        (data / f"{pool}.jsonl").write_bytes((world / f"{pool}.jsonl").read_bytes())
    assert not (tmp_path / "out").exists()


def test_unwritable_out(world, chain, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file/run: cannot write the run folder"):
        train_sft.main(options(preset="smoke", data=world, out=tmp_path / "file" / "run", init=chain / "pretrain"))


# --- SFT --------------------------------------------------------------------------------------------------------------


def test_bare_takes_the_reasoning_away():
    record = {"messages": [{"role": "system", "content": "other"},
                           {"role": "user", "content": "<image>Is <think> a tag?"},
                           {"role": "assistant", "content": "<think>I see\nfat.</think>\n<answer>B</answer>"}]}
    _, turns, kind = train_sft.conversation(record, "bare")
    assert kind == "chat" and turns == [{"role": "system", "content": chat.PROMPTS["bare"]}, record["messages"][1],
                                        {"role": "assistant", "content": "\n<answer>B</answer>"}]
    _, turns, _ = train_sft.conversation(record, "cot")
    assert turns == [{"role": "system", "content": chat.PROMPTS["cot"]}, *record["messages"][1:]]


def test_frozen_parts_and_bare_style(world, chain, tmp_path):
    fields = dict(QUICK, data=world, init=chain / "pretrain", out=tmp_path / "run", steps=1, batch_size=4, eval_items=1,
                  eval_samples=0, max_new_tokens=4)
    train_sft.main(options(**fields, train="projector", style="bare", lr=1e-2))
    before, after = weights(chain / "pretrain"), weights(tmp_path / "run")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith("visual.merger.") for k in changed)
    samples = tmp_path / "run" / "samples"
    shown = (samples / "trained.txt").read_text()
    assert "<think>" not in shown and chat.PROMPTS["bare"] in shown and not (samples / "questions.json").exists()


def test_unknown_parts_to_train(capsys):
    for script in (train_pretrain, train_sft, train_rl):
        with pytest.raises(SystemExit) as ended:
            script.main(["--train", "vision,head"])
        assert ended.value.code == 2
        assert "--train vision,head: choose from vision, projector, decoder" in capsys.readouterr().err


def test_the_trained_text_is_bracketed():
    tokenizer = chat.train_tokenizer(["abc"], 256)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    ids, trained = chat.render(turns, tokenizer, [], system="s")
    labels = torch.tensor([i if keep else -100 for i, keep in zip(ids, trained)])
    assert train_sft.trained_tokens(tokenizer, torch.tensor(ids), labels) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b c<|im_end|>]\n")


def test_pools_of_the_smoke_world_can_be_judged(world):
    """The lexicon knows every finding of the facts, and a true sentence of it scores 1."""
    lexicon = evaluate.read_lexicon(world)
    for record in read_records(world / "rl.jsonl", use="question"):
        said = [lexicon[record["subfield"]][a][record["facts"][a]][0] for a in lexicon[record["subfield"]]]
        got = evaluate.judge(f"<think>{', '.join(said)}</think><answer>{record['answer']}</answer>", record, lexicon)
        assert got["correct"] and got["recall"] == 1.0 and got["true"] == len(got["claims"])
    assert presets.TRAIN["smoke"]["rl"]["max_new_tokens"] == 16        # cache_length 3 above is a fifth of it
