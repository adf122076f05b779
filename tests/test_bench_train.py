"""The benchmark of a training step: its sides compute the same, and what fails or differs is not timed. Truth: transformers."""

import subprocess
import sys
from argparse import Namespace

import pytest

from nanopatho import bench_train
from nanopatho.presets import VLM

ARGS = dict(what="vlm", preset="smoke", rows=3, image=16, prompt=5, answer=24, pack=64, recompute=False, steps=1, warmup=1, rounds=1,
            threads=1)


def test_the_sides_compute_the_same_and_take_turns():
    pytest.importorskip("transformers")
    flags = [f"--{k}={v}" for k, v in ARGS.items() if k not in ("what", "recompute")]
    done = subprocess.run([sys.executable, "-m", "nanopatho.bench_train", "vlm", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["ours"][5] == rows["packed"][5] == rows["transformers"][5]          # the first loss, to five digits
    assert all(rows[name][-1].endswith("x") for name in bench_train.SIDES["vlm"]) and rows["transformers"][-2:] == ["1.00x", "1.00x"]


def test_batches_are_what_their_numbers_say():
    c = Namespace(**ARGS)
    for samples in bench_train.vlm_batches(VLM["smoke"], c):
        answers = [int((s["labels"] >= 0).sum()) for s in samples]
        assert [s["input_ids"].shape[1] for s in samples] == [a + 5 + 16 + 2 for a in answers] and all(6 <= a <= 24 for a in answers)
        assert all(int((s["input_ids"] == VLM["smoke"]["image_token_id"]).sum()) == 16 and len(s["pixel_values"]) == 64 for s in samples)
        batch = bench_train.padded(samples)
        assert int(batch["attention_mask"].sum()) == sum(s["input_ids"].shape[1] for s in samples)
        assert int((batch["labels"] >= 0).sum()) == sum(answers) and batch["pixel_values"].shape == (192, 588)


def test_the_table():
    turn = lambda loss, *seconds: dict(losses=[loss], seconds=[[s, s] for s in seconds], tokens=100.0, work=1e9, bytes=2e9)
    found = dict(ours=[turn(3.0, 0.1, 0.2, 0.3), turn(3.0, 0.2, 0.2, 0.4)], packed=[None, None], transformers=[turn(3.0, 0.4, 0.4)])
    ours, packed, theirs = bench_train.table(Namespace(**ARGS), found).splitlines()[2:5]
    assert ours.split() == ["ours", "200.0", "0.0%", "500", "2.00", "3.00000", "2.00x", "1.00x"]
    assert packed.split() == ["packed", "failed,", "see", "above"] and theirs.split()[1] == "400.0"
    found["ours"] = [turn(3.1, 0.1)]
    assert "another loss: not compared" in bench_train.table(Namespace(**ARGS), found)
