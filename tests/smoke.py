"""What the tests of the scripts share: options, readers of run folders, and a stand-in for the reward rules."""

import json
import math
import zlib
from pathlib import Path

import torch

from nanopatho.vlm import PathoVLM

QUICK = dict(preset="smoke", threads=1, warmup=2)
RL = dict(QUICK, prompts=3, group_size=4, max_new_tokens=8, eval_items=2, eval_samples=2)


def options(**fields):
    return [x for name, value in fields.items() for x in (f"--{name}", str(value))]


def strict(path):
    """JSON as other programs read it: no NaN."""
    def refuse(text):
        raise AssertionError(f"{path} holds {text}")
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(len(rows)))
    assert all(math.isfinite(v) for r in rows for v in r.values()), rows
    return rows


def weights(folder):
    return PathoVLM.from_pretrained(folder).state_dict()


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def luck(text, record, **more):
    """Stands for the rule that reads answers, since a random model never gives one that can be read: a coin by text."""
    short = (more.get("n_tokens") or 0) <= more.get("length_limit", 0)
    return {"format": 1.0, "accuracy": float(zlib.crc32(text.encode()) % 3 == 0), "length": float(short)}
