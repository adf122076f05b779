"""The page of an evaluation: what it must show, by parsing it; texts from outside stay text."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from nanopatho import benchmark as bench
from nanopatho import eval_page
from nanopatho.log import ConfigError

EVIL = "<script>alert(1)</script>"


class Reader(html.parser.HTMLParser):
    """Every tag closed; collects texts and tags."""
    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make(folder, right, extra=False):
    folder.mkdir()
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "a.png")
    items = []
    for i, ok in enumerate(right):
        numbers = {"accuracy": float(ok), "unreadable": float(i == 0), "sampled": ok / 2, "majority": float(ok),
                   "blind: random": 0.25, "blind: text_only": 0.3, "pass@2": float(ok)}
        items.append({"id": f"q{i}", "question": f"Which {EVIL} {i}?", "options": ["fat", EVIL], "answer": "A",
                      "kind": "choice", "subset": "PS"[i % 2], "level": "easy", "image": [str(folder / "a.png")],
                      "text": f"<think>fat {EVIL}</think><answer>A</answer>", "share": 0.5, "numbers": numbers,
                      "why": "no <answer> block" if i == 0 else None,
                      "claims": [{"start": 7, "end": 10, "true": True, "attribute": "material", "value": "fat"}]})
    results = {"model": "m", "questions": "q.jsonl", "reference": bench.reference("pathmmu-test") if extra else None,
               **bench.tabulate(items)}
    if extra:
        before = bench.read_items(folder.parent / "one")
        results["compare"] = {"with": "the first", **bench.compare(before, items)}
        (folder / "faithful.json").write_text(json.dumps({"sensitivity": {"value": 0.625, "ci": [0.5, 0.75], "n": 8}}))
        (folder / "clip.json").write_text(json.dumps({"recall_at_1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}))
    (folder / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in items))
    (folder / "results.json").write_text(json.dumps(results))
    return results


def test_page_of_two_runs(tmp_path):
    make(tmp_path / "one", [0, 0, 1, 1, 0, 1])
    results = make(tmp_path / "two", [0, 1, 1, 0, 1, 1], extra=True)
    page = eval_page.write(tmp_path / "two", tmp_path / "one").read_text()
    read = Reader(page)
    text = " ".join(" ".join(read.text).split())
    assert "script" not in read.tags and "http" not in page.split("</style>")[1].replace("https://github.com", "")
    assert EVIL in text                                               # shown as text, never as a tag
    for shown in ("66.7 %", "25.0 %", "chance", "text only", "no <answer> block", "Published, not run here", "63.4",
                  "Patho-R1-7B", "Calibration of the vote", "0.625", "0.5–0.75", "Right now, not in the other run: 2",
                  "Right in the other run, not now: 1", "Not readable: 1", "Wrong: 1", "Right: 4", "The other run",
                  "McNemar, exact"):
        assert shown in text, shown
    low, high = results["overall"]["accuracy"]["ci"]
    assert f"{100 * low:.0f}–{100 * high:.0f}" in text
    assert page.count("data:image/png;base64,") == 6 + 3              # each question once in each drawer that it is in
    alone = Reader(eval_page.write(tmp_path / "one").read_text())
    assert "The other run" not in " ".join(alone.text)
    lines = eval_page.as_text(results)
    assert all(said in lines for said in ("Subset P", "right 66.7", "NOT RUN HERE, on 8454", "p = "))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="items.jsonl: no such file.*evaluate qa --out"):
        eval_page.write(tmp_path)
    make(tmp_path / "one", [1, 0])
    make(tmp_path / "two", [1, 0, 1])
    with pytest.raises(ConfigError, match="is of other questions"):
        eval_page.write(tmp_path / "two", tmp_path / "one")
