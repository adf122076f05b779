"""report.py and page.py: a small made-up run becomes a valid, self-contained, escaped page; broken files are named."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from nanopatho import page, report

VOID = {"meta", "img", "br", "input", "link", "hr"}
EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Checks that tags balance, and collects elements, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def parse(path):
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    tags.close()
    assert not tags.open, f"never closed: {tags.open}"
    return tags, " ".join(" ".join(tags.text).split())


def answers_of(run, stage):
    text = f"<think>large nuclei, no keratin {EVIL}</think><answer>B</answer>"
    claims = [{"start": 7, "end": 19, "attribute": "nuclear_size", "value": "large", "true": True},
              {"start": 21, "end": 31, "attribute": "material", "value": "!keratin", "true": False},
              {"start": 21, "end": 31, "attribute": "other", "value": "x", "true": True}]
    good = {"text": text, "reward": 1.0, "parts": {"format": 1.0, "accuracy": 1.0}, "advantage": 2.4749,
            "correct": True, "claims": claims}
    bad = {"text": "no format", "reward": 0.0, "parts": {"format": 0.0, "accuracy": 0.0}, "advantage": -0.3536,
           "correct": False, "claims": []}
    return [{"id": "q1", "image": f"{stage}/samples/q1.jpg", "question": f"Which one? {EVIL}",
             "options": ["fat", "mucin"], "answer": "B", "level": "hard", "subfield": "H&E",
             "answers": [bad] * 7 + [good],
             "heatmap": [[0.0, 0.5], [1.0, 0.2]]}]


def fake_run(run, names=tuple(report.STAGES)):
    """A small run folder with the given stages, as the training scripts leave it behind."""
    stages = {"clip": {"zero_shot_accuracy": {"value": 0.913, "low": 0.88, "high": 0.94}, "recall_at_1": 0.561,
                       "recall_at_1_ci": [0.51, 0.61], "seconds": 95},
              "pretrain": {"claim_accuracy": 0.864, "claim_accuracy_ci": [0.85, 0.88], "claim_recall": 0.7,
                           "seconds": 200, "by_finding": {"H&E nuclear_size": 0.777}}}
    for i, s in enumerate(report.QUESTION_STAGES):
        a = 0.612 + 0.05 * i
        stages[s] = {"greedy_accuracy": a, "greedy_accuracy_ci": [a - 0.04, a + 0.04], "sampled_accuracy": a - 0.1,
                     "sampled_accuracy_ci": [a - 0.12, a - 0.08], "claim_accuracy": 0.8, "claim_recall": 0.6,
                     "contradiction": 0.02, "mean_length": 24.5 + i, "seconds": 100 + i, "n": 500,
                     "by_level": {"hard": {"greedy_accuracy": 0.415, "ci": [0.3, 0.5], "n": 123}},
                     "by_subfield": {"H&E": {"greedy_accuracy": 0.5, "n": 77}},
                     "by_topic": {"lung": {"greedy_accuracy": 0.5}},
                     "pools": {"test_combo": {"greedy_accuracy": 0.39, "n": 55}}}
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "results.json", {"preset": "tiny", "seconds": 1000, "machine": f"2 cores {EVIL}",
                                      "stages": {k: v for k, v in stages.items() if k in names},
                                      "blind": {"random": 0.25, "text_only": 0.268}})
    for s in names:
        (run / s / "samples").mkdir(parents=True)
        write_json(run / s / "run.json", {"lr": 1e-4, "out": EVIL})
        rows = [{"step": i, "time": 2.0 * i, "loss": 3 / (i + 1), "accuracy": i / 40, "length": 20.5, "odd_number": i,
                 "entropy": float("nan") if i == 5 else 0.4, "kl": 0.0} for i in range(30)]
        (run / s / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if s in report.QUESTION_STAGES:
            Image.new("RGB", (112, 84), (200, 90, 160)).save(run / s / "samples" / "q1.jpg")
            write_json(run / s / "samples" / "questions.json", answers_of(run, s))
    return run


def write_json(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ the page

def test_page_shows_the_numbers(tmp_path):
    path = report.write(fake_run(tmp_path / "demo"))
    assert path == tmp_path / "demo" / "report.html"
    tags, text = parse(path)
    for shown in ("91.3 %", "88–94", "56.1 %", "51–61", "86.4 %", "61.2 %", "57–65", "51.2 %", "66.2 %", "71.2 %",
                  "24.5", "26.5", "1 min 35 s", "16 min 40 s", "preset tiny", "text only 27", "random 25", "77.7 %",
                  "123", "30 steps in", "1 of 8 right", "SFT 1/8 → DAPO 1/8 right", "+2.47", "-0.35", "large nuclei",
                  "combo", "not a medical device"):
        assert shown in text, shown
    assert "Still to come" not in text and "SFT" in text and "Words used here" in text
    assert text.count("Before: SFT") == text.count("After: DAPO") == 1 and "The same question after GRPO" in text


def test_page_is_self_contained_and_escaped(tmp_path):
    path = report.write(fake_run(tmp_path / "demo"))
    source = path.read_text(encoding="utf-8")
    tags, text = parse(path)
    assert "script" not in tags.seen and "link" not in tags.seen and "iframe" not in tags.seen
    assert text.count(EVIL) >= 4 and EVIL not in source        # as text: machine, settings, question, answers
    assert not re.search(r"https?:|//[a-z]|@import|src=(?!\")", source)
    for name, value in tags.attributes:
        assert not name.startswith("on") and name not in ("src", "href")
    assert re.findall(r"url\((?!data:image/jpeg;base64,)", source) == []
    assert source.count("base64,") == 1                                  # one question, shown three times, stored once
    assert "--shape:1.333" in source


def test_claims_are_told_by_more_than_colour(tmp_path):
    source = report.write(fake_run(tmp_path / "demo")).read_text(encoding="utf-8")
    assert ('<mark class="yes" title="nuclear_size large: true of this image">large nuclei'
            '<i aria-label="true">✓</i>') in source
    assert ('<mark class="no" title="material not keratin and other x: false of this image">no keratin'
            '<i aria-label="false">✗</i>') in source
    assert '<span class="tag">&lt;think&gt;</span>' in source
    assert source.count('class="heat"') == 2 and source.count('opacity="0.72"') == 2


@pytest.mark.parametrize("names, coming", [
    (["clip"], ["Continued pretraining", "Fine-tuning (SFT)", "RL: GRPO", "RL: DAPO"]),
    (["clip", "pretrain", "sft"], ["RL: GRPO", "RL: DAPO"]), (["sft", "grpo"], ["Patho-CLIP", "RL: DAPO"]),
    (["dapo"], []),
])
def test_page_after_some_stages(tmp_path, names, coming):
    run = fake_run(tmp_path / "demo", names)
    _, text = parse(report.write(run))
    later = text.split("Still to come:")[1].split(".")[0]
    assert all(name in later for name in coming)
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_only_folders_and_no_summary(tmp_path):
    """Before any stage has finished: curves from metrics.jsonl alone; then a stage's own results.json is enough."""
    run = tmp_path / "demo"
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "metrics.jsonl").write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "lo')      # still being written
    assert "Fine-tuning (SFT): Loss" in parse(report.write(run))[1]
    (run / "grpo").mkdir()
    (run / "grpo" / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.6}\n')
    (run / "grpo" / "speed.jsonl").write_text('{"step": 0, "rollout_tokens_s": 7}\n{"step": 1, "rollout_tokens_s": 8}\n'
                                              '{"step": 1, "rollout_tokens_s": 9}\n')   # resumed: the last counts
    assert [row["rollout_tokens_s"] for row in report.read_run(run)[1]["grpo"]["metrics"]] == [7, 9]
    assert "Sampling speed" in parse(report.write(run))[1]
    write_json(run / "sft" / "results.json", {"greedy_accuracy": 0.333, "seconds": 61})
    text = parse(report.write(run))[1]
    assert "33.3 %" in text and "1 min 1 s" in text
    assert not list(run.glob("*.tmp"))


def test_missing_picture_and_odd_answers(tmp_path):
    run = fake_run(tmp_path / "demo", ["sft"])
    (run / "sft" / "samples" / "q1.jpg").unlink()
    questions = answers_of(run, "sft")
    questions[0]["answers"] = [{"text": "x" * 9000}, {"text": ""}]
    questions[0]["answer"] = "Z"
    write_json(run / "sft" / "samples" / "questions.json", questions)
    text = parse(report.write(run))[1]
    assert "image not found" in text and "5000 more characters" in text and "0 of 2 right" in text


def test_pictures_are_shrunk_not_stretched(tmp_path):
    Image.new("CMYK", (3000, 1000)).save(tmp_path / "big.jpg")
    uri, shape = page.thumbnail(tmp_path / "big.jpg")
    assert shape == 3 and len(uri) < 50_000 and uri.startswith("data:image/jpeg")
    Image.new("RGBA", (20, 30)).save(tmp_path / "small.webp")
    assert page.thumbnail(tmp_path / "small.webp")[0].startswith("data:image/jpeg")
    assert page.thumbnail(tmp_path / "none.png") == (None, 1.0)


# -------------------------------------------------------------------------------------------------------- broken files

def test_broken_files_are_named(tmp_path):
    run = fake_run(tmp_path / "demo", ["sft"])
    samples = run / "sft" / "samples" / "questions.json"

    def fails(path, content, *words):
        kept = path.read_bytes()
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(report.ReportError) as error:
            report.write(run)
        for word in (str(path), *words):
            assert word in str(error.value)
        path.write_bytes(kept)

    def changed(**fields):
        return [{**answers_of(run, "sft")[0], **fields}]
    fails(run / "results.json", b'{"preset": ', "cannot be read")
    fails(run / "results.json", [1], "holds a list")
    fails(run / "sft" / "run.json", b"\xff\xfe", "cannot be read")
    fails(run / "sft" / "metrics.jsonl", b'{"step": 0}\n{"step": \n{"step": 2}\n', "line 2", "not JSON")
    fails(run / "sft" / "metrics.jsonl", b'{"loss": 1}\n', "line 1", "'step'")
    fails(samples, {"id": 1}, "holds a dict")
    fails(samples, changed(options="fat"), "question 1 (q1)", "'options'")
    fails(samples, [{k: v for k, v in changed()[0].items() if k != "answers"}], "'answers' is missing")
    fails(samples, changed(answers=[{"reward": 1}]), "'text' is missing")
    fails(samples, changed(answers=[{"text": None}]), "question 1 (q1)")
    claim = dict(start=1, end=3, attribute="a", value="b", true=True)
    fails(samples, changed(answers=[{"text": "ab", "claims": [claim]}]), "claim 1 to 3")
    fails(samples, changed(heatmap=[[1], [1, 2]]), "heatmap")
    fails(samples, ["x"], "question 1")
    fails(run / "sft" / "samples" / "q1.jpg", b"no picture", "no picture that can be opened")


def test_wrong_folders_and_usage(tmp_path):
    with pytest.raises(report.ReportError, match="no such folder"):
        report.write(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(report.ReportError, match="none of the stage folders"):
        report.write(tmp_path / "empty")
    with pytest.raises(SystemExit, match="usage"):
        report.main([])
    with pytest.raises(SystemExit, match="no such folder"):
        report.main([str(tmp_path / "none")])


def test_command_line(tmp_path):
    run = fake_run(tmp_path / "my demo", ["clip"])
    done = subprocess.run([sys.executable, "-m", "nanopatho.report", str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html"), done.stderr


# ------------------------------------------------------------------------------------------------------------- drawing

@pytest.mark.parametrize("low, high", [(0, 1), (0.613, 0.655), (-3, 7), (0, 2.3e-5), (0, 148000), (99.5, 100)])
def test_ticks_are_few_and_inside(low, high):
    found = page.ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low - 1e-9 <= t <= high * (1 + 1e-9) + 1e-12 for t in found)
    steps = [b - a for a, b in zip(found, found[1:])]
    assert max(steps) - min(steps) < 1e-9 * max(1, abs(high))


def test_smoothing_and_thinning():
    assert page.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    ramp = page.smooth([float(i) for i in range(101)], 0.1)
    assert ramp[50] == pytest.approx(50) and len(ramp) == 101           # centred: no lag
    xs, ys = page.thin(list(range(1000)), list(range(1000)), 100)
    assert len(xs) == len(ys) == 100 and sum(xs) / 100 == pytest.approx(499.5)
    assert page.thin([1], [2]) == ([1], [2])


def test_labels_do_not_overlap():
    for ys in ([5, 5, 5], [0, 100, 99], [50], [98, 99, 100]):
        out = page.spread(ys, 12, 0, 100)
        ordered = [out[i] for i in sorted(range(len(ys)), key=lambda i: ys[i])]
        assert all(b - a >= 12 - 1e-9 for a, b in zip(ordered, ordered[1:])) and max(out) <= 100


def test_charts_with_little_or_no_data():
    assert page.line_chart("t", [("sft", [], [])]) == "" == page.dot_chart("t", [("a", [("sft", None, None)], "")])
    assert page.line_chart("t", [("sft", [1, 2], [float("nan"), None])]) == ""
    for values in ([1.0], [0.0, 0.0], [5, 5, 5], [-1e9, 1e9], [1e-9, 2e-9]):
        assert "NaN" not in page.line_chart("t", [("sft", list(range(len(values))), values)])
    assert "<path" in page.dot_chart("t", [("a", [("sft", 0.0, [0.0, 0.0])], "0")], percent=False)


def test_numbers_as_text():
    assert page.number(0.6132, True) == "61.3 %" and page.number(None) == "–" and page.number(float("nan")) == "–"
    assert page.number(24.51) == "24.5" and page.number(1234.5) == "1234"
    assert page.interval([0.57, 0.652]) == "57–65" and page.interval(None) == ""
    said = [page.duration(s) for s in (0.4, 59.4, 95, 120, 3600, 7260)]
    assert said == ["0 s", "59 s", "1 min 35 s", "2 min", "1 h 0 min", "2 h 1 min"]
    assert page.esc('<a b="c">&') == "&lt;a b=&quot;c&quot;&gt;&amp;"
