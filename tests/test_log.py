"""What a run leaves behind when it is killed: the log and the checkpoint, at every moment of writing."""

import json
import os
import shutil
from dataclasses import dataclass

import pytest
import torch

from nanopatho import checkpoint, chat, log, presets
from nanopatho.log import ConfigError, Run, write_json
from nanopatho.optim import Optimizers
from nanopatho.vlm import PathoVLM


@dataclass
class Config:
    lr: float = 1e-3
    out: str = "x"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for the process ending here: nothing may catch it."""


def kill_at(monkeypatch, module, name, call):
    """Calling module.name for the call-th time (from 0) ends the process before it acts."""
    real, calls = getattr(module, name), []

    def stub(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, stub)


# --- log --------------------------------------------------------------------------------------------------------------


def test_write_json_is_whole_or_old(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"a": "µ", "b": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "µ", "b": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})                              # fails half-way through the data
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, log.os, "replace", 0)                           # written, not yet renamed
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "µ"
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3} and os.listdir(tmp_path) == ["results.json"]


def test_a_run_writes_what_it_promises(tmp_path):
    run = Run(tmp_path / "a" / "b", Config(lr=0.5), total=3, title="sft")
    run.step(0, loss=torch.tensor(2.0), lr=1.23456789e-7)
    run.step(1, show=("loss",), loss=1.0, lr=1e-3, hard=1 / 3)
    run.text("step1", "Größe <b>")
    run.close()
    out = tmp_path / "a" / "b"
    assert json.loads((out / "run.json").read_text()) == {"lr": 0.5, "out": "x", "stage": "sft"}
    first, second = rows(out)
    assert (first["step"], first["loss"]) == (0, 2.0) and 0 <= first["time"] <= second["time"] < 5
    assert first["lr"] == 1.23457e-7                                   # six digits, not six places: small ones survive
    assert second == {"step": 1, "time": second["time"], "loss": 1.0, "lr": 1e-3, "hard": 0.333333}
    assert (out / "samples" / "step1.txt").read_text(encoding="utf-8") == "Größe <b>"
    assert (out / "log.txt").read_text().splitlines()[1].startswith("sft 2/3 | ")


def test_a_resumed_run_drops_what_was_not_saved(tmp_path):
    run = Run(tmp_path, Config(), 9, "rl")
    for step in range(5):
        run.step(step, loss=step)
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ti')                                   # the kill came while this was written
    before = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:5]]
    run = Run(tmp_path, Config(), 9, "rl", start=3)                    # the checkpoint holds three steps
    assert rows(tmp_path) == before[:3]
    assert before[2]["time"] <= run.seconds() < before[2]["time"] + 5   # time goes on from the step kept last
    run.step(3, loss=30)
    run.close()
    assert [r["loss"] for r in rows(tmp_path)] == [0, 1, 2, 30]
    Run(tmp_path, Config(), 9, "rl").close()                           # a new start begins an empty log
    assert rows(tmp_path) == []
    Run(tmp_path / "other", Config(), 9, "rl", start=3).close()        # a log that was lost is no reason to stop
    assert rows(tmp_path / "other") == []


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = Run(tmp_path / "out", Config(), 2, "sft")
    run.step(0, loss=1.0)
    run.text("a", "b")
    run.close()
    assert not (tmp_path / "out").exists()


def test_speed_stands_in_the_log_and_not_in_the_metrics(tmp_path):
    run = Run(tmp_path, Config(), 2, "sft")
    assert 0 <= run.lap() < 5
    run.step(0, note=log.speed(0.5, 1000, 1e12), loss=1.0)
    run.close()
    assert set(rows(tmp_path)[0]) == {"step", "time", "loss"}
    assert "| loss 1 | 2,000 tokens/s | " in (tmp_path / "log.txt").read_text()
    assert 0.05 < float((tmp_path / "log.txt").read_text().split()[-2]) < 50            # GB of this process


def test_operations_by_hand():
    """A linear layer of 3 x 4 weights: 2 * 12 forward and 4 * 12 backward at each of 10 positions."""
    layer = torch.nn.Linear(3, 4, bias=False)
    assert log.flops((layer, 10)) == 6 * 12 * 10
    assert log.flops((layer.requires_grad_(False), 10), (torch.nn.Linear(2, 2), 1)) == 2 * 12 * 10 + 6 * 6
    model = PathoVLM(presets.VLM["smoke"])
    decoder = sum(p.numel() for p in model.model.layers.parameters())
    assert log.vlm_flops(model, 0, 7, 0) == 6 * 7 * decoder
    assert log.vlm_flops(model, 3, 0, 0) == 6 * 3 * 1024 * 64


def test_a_trace_is_written(tmp_path):
    run = Run(tmp_path, Config(), 9, "sft", profile=1)
    for step in range(6):
        torch.ones(3)
        run.step(step, loss=1.0)
    run.close()
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert sum(e.get("name") == "aten::ones" for e in trace["traceEvents"]) == 1          # of the one step asked for


def test_steps_that_are_not_finite_are_counted_and_named(capsys):
    skipped, records = [], [{"id": "r1"}, {"id": "r2"}]
    assert log.check_finite(0, records, skipped, 1, loss=1.0) and not skipped
    assert not log.check_finite(4, records, skipped, 1, loss=float("nan"))
    assert "skipped step 5: loss is nan" in capsys.readouterr().err and len(skipped) == 1
    with pytest.raises(ConfigError, match=r"(?s)step 8: .*r1, r2.*--max_skipped N .now 1.*before that, step 5: loss is nan"):
        log.check_finite(7, records, skipped, 1, grad_norm=float("inf"))


def test_unwritable_folder_ends_with_a_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit, match="cannot write the run folder.*--out") as ended:
            Run(out, Config(), 3, "sft")
        assert str(out) in str(ended.value)
    assert (tmp_path / "file").read_text() == "in the way"


# --- checkpoint -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return chat.train_tokenizer(["fat mucin"], presets.TINY_BPE)


def fresh(seed=0):
    torch.manual_seed(seed)
    model = PathoVLM(presets.VLM["smoke"])
    return model, Optimizers(model, 1e-3, 0.1, "muon")


def train(model, optimizer, steps=1):
    for _ in range(steps):                                             # noise: torch's random state counts
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(1e-3)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_resume_continues_bit_for_bit(tmp_path, tokenizer):
    whole, optimizer = fresh()
    train(whole, optimizer, 2)
    checkpoint.save(tmp_path, whole, optimizer, {"step": 2, "generator": torch.Generator().get_state()}, tokenizer)
    train(whole, optimizer, 2)
    other, optimizer = fresh(seed=7)
    state = checkpoint.resume(tmp_path, other, optimizer)
    assert state["step"] == 2 and set(state) == {"step", "generator"}
    train(other, optimizer, 2)
    assert same(whole, other)
    assert sorted(os.listdir(tmp_path)) == ["last"]
    files = {"config.json", "model.safetensors", "tokenizer.json"}     # and small published ones
    assert set(os.listdir(tmp_path / "last")) >= files | {"train_state.pt"}
    assert chat.ChatTokenizer.load(tmp_path / "last").encode("fat") == tokenizer.encode("fat")
    checkpoint.finish(tmp_path, other, tokenizer)                      # the end: weights in the folder, no resume state
    assert set(os.listdir(tmp_path)) >= files and not (tmp_path / "last").exists()
    assert same(PathoVLM.from_pretrained(tmp_path), other)
    assert checkpoint.resume(tmp_path, other, optimizer) is None


# Every file operation of a save, as a place to be killed at: (module, function, which call)
PLACES = [(PathoVLM, "save_pretrained", 0), (torch, "save", 0), (checkpoint.shutil, "rmtree", 1),
          (checkpoint.os, "replace", 2), (checkpoint.os, "replace", 3), (checkpoint.shutil, "rmtree", 2)]


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_a_kill_at_any_moment_of_saving_leaves_one_to_read(place, tmp_path, monkeypatch):
    module, name, call = PLACES[place]                                 # os.replace: two of save_pretrained come first
    model, optimizer = fresh()
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    train(model, optimizer)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, module, name, call)
        checkpoint.save(tmp_path, model, optimizer, {"step": 2})
    again, fresh_optimizer = fresh(seed=3)
    got = checkpoint.resume(tmp_path, again, fresh_optimizer)["step"]
    assert got == (2 if place == len(PLACES) - 1 else 1)
    train(again, fresh_optimizer)                                      # and the next save is killed at the same place
    with monkeypatch.context() as patch:
        kill_at(patch, module, name, call)
        try:
            checkpoint.save(tmp_path, again, fresh_optimizer, {"step": got + 1})
        except Killed:
            pass
    assert checkpoint.resume(tmp_path, *fresh())["step"] in (got, got + 1)
    checkpoint.save(tmp_path, again, fresh_optimizer, {"step": 9})     # one that is let finish: everything is in order
    assert checkpoint.resume(tmp_path, *fresh())["step"] == 9 and os.listdir(tmp_path) == ["last"]


def test_only_the_old_one_is_left(tmp_path, monkeypatch):
    """Killed between the two renames: last.old is the only complete checkpoint, last.tmp may be anything."""
    model, optimizer = fresh()
    checkpoint.save(tmp_path, model, optimizer, {"step": 4})
    (tmp_path / "last").rename(tmp_path / "last.old")
    shutil.copytree(tmp_path / "last.old", tmp_path / "last.tmp")
    (tmp_path / "last.tmp" / "train_state.pt").write_bytes(b"half")    # never looked at
    other, optimizer = fresh(seed=5)
    assert checkpoint.resume(tmp_path, other, optimizer)["step"] == 4 and same(model, other)
    with monkeypatch.context() as patch, pytest.raises(Killed):        # and killed again before the rename
        kill_at(patch, checkpoint.os, "replace", 2)
        checkpoint.save(tmp_path, *fresh(), {"step": 5})
    assert checkpoint.resume(tmp_path, *fresh())["step"] == 4
    checkpoint.finish(tmp_path, other)                                 # a finished stage leaves nothing to be resumed
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_nothing_to_resume(tmp_path):
    assert checkpoint.resume(tmp_path / "nowhere", *fresh()) is None
    (tmp_path / "last.tmp").mkdir()
    (tmp_path / "last.tmp" / "train_state.pt").write_bytes(b"half")
    assert checkpoint.resume(tmp_path, *fresh()) is None               # a save that was broken off
    (tmp_path / "last").mkdir()                                        # no state in it: not our doing, so it is told
    with pytest.raises(ConfigError, match=r"last/train_state.pt is missing.*Remove .*last to start this stage again"):
        checkpoint.resume(tmp_path, *fresh())


def test_a_broken_state_ends_with_a_message(tmp_path):
    checkpoint.save(tmp_path, *fresh(), {"step": 1})
    whole = (tmp_path / "last" / "train_state.pt").read_bytes()
    (tmp_path / "last" / "train_state.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ConfigError, match=r"last/train_state.pt cannot be read .*Remove .* to start this stage again"):
        checkpoint.resume(tmp_path, *fresh())


def test_tensorboard_holds_each_step_once_after_a_kill(tmp_path):
    """Truth: TensorBoard's own reader. Steps that a killed run logged and did not save come a second time."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra log")

    @dataclass
    class Logged(Config):
        log: str = "tensorboard"
    for start, add in ((0, 0.5), (3, 0.25)):                             # the first one is killed after step 5
        run = Run(tmp_path, Logged(), 8, "x", start)
        for step in range(start, 8 if start else 6):
            run.step(step, loss=step + add)
        run.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, s + (0.25 if s >= 3 else 0.5)) for s in range(8)]
    assert [r["loss"] for r in rows(tmp_path)] == [e.value for e in events.Scalars("loss")]


def test_wandb_offline(tmp_path, monkeypatch):
    """Nothing is sent; what would be sent lies in the run folder."""
    pytest.importorskip("wandb", reason="extra log")
    monkeypatch.setenv("WANDB_MODE", "offline")

    @dataclass
    class Logged(Config):
        log: str = "wandb"
    run = Run(tmp_path, Logged(), 2, "x")
    run.step(0, loss=0.5)
    run.close()
    kept, = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss" in kept.read_bytes()
