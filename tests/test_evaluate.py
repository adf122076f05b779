"""Intervals against scipy and a coverage simulation, tables and blind guessers by hand, a small model end to end."""

import json
import math
import os
import signal
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from nanopatho import benchmark as bench
from nanopatho import chat, evaluate, faithful, presets
from nanopatho.evaluate import (answers, ask, blind, caption_claims, heatmap, interval, judge, paired_gain,
                                read_lexicon, show_samples, table)
from nanopatho.data import LETTERS, DataError, Images, question_text
from nanopatho.generate import Generation
from nanopatho.log import ConfigError
from nanopatho.vlm import PathoVLM

LEXICON = {"H&E": {"material": {"fat": ["fat"], "mucin": ["mucin pools"], "!mucin": ["no mucin"]},
                   "mitoses": {"frequent": ["frequent mitoses"], "absent": ["no mitoses"]}}}


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_equals_scipys_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for values in (rng.random(300) < 0.3, rng.normal(2, 3, 50), rng.integers(0, 9, 40) / 8):
        values = values.astype(float)
        mean, (low, high) = interval(values)
        want = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
        assert mean == pytest.approx(values.mean(), abs=1e-12)
        width = want.high - want.low
        assert max(abs(low - want.low), abs(high - want.high)) < 0.07 * width        # quantiles of 2,000 draws


def test_interval_is_normal_for_many_values():
    values = np.random.default_rng(1).random(2000)
    mean, (low, high) = interval(values)
    half = 1.959964 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(mean - half, abs=0.08 * half) and high == pytest.approx(mean + half, abs=0.08 * half)
    assert interval([0.25] * 7) == (0.25, [0.25, 0.25])
    assert interval(values) == interval(values.tolist())               # one fixed seed
    assert math.isnan(interval([])[0])


def test_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        _, (low, high) = interval(rng.random(60) < 0.6, resamples=300)
        hits += low <= 0.6 <= high
    assert 0.90 < hits / 300 < 0.985                                   # 0.95 asked for; of 60 a little less


def test_paired_gain():
    before, after = [0, 0, 1, 0.5], [1, 0, 1, 0.75]
    gain, (low, high) = paired_gain(before, after)
    assert gain == pytest.approx((1 + 0 + 0 + 0.25) / 4) and low >= 0 and high <= 1
    assert paired_gain(before, before) == (0.0, [0.0, 0.0])
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5                                       # hard for both: pairing helps
    better = np.where(rng.random(400) < 0.05, 1.0, hard)
    _, (low, high) = paired_gain(hard, better)
    wide = [interval(x)[1] for x in (hard, better)]
    assert low > 0 and high - low < 0.3 * (wide[0][1] - wide[0][0])


# --- one answer, and the table ----------------------------------------------------------------------------------------


def record(i=0, **changes):
    return {"id": f"q{i}", "question": "Which material?", "options": ["fat", "mucin pools", "keratin"], "answer": "B",
            "level": "easy", "subfield": "H&E", "topic": "skin", "facts": {"material": "mucin", "mitoses": "absent"},
            **changes}


def say(think, answer):
    return f"<think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("text,want", [
    (say("I see mucin pools, no mitoses.", "B"),
     dict(correct=True, format=True, words=6, true=2, recall=1.0, contradiction=False)),
    (say("mucin pools and frequent mitoses", "A"),
     dict(correct=False, format=True, true=1, recall=0.5, contradiction=True)),
    (say("no mucin, so fat", "A"), dict(correct=False, true=0, recall=0.0, contradiction=False)),
    (say("no mitoses", "fat or mucin"), dict(correct=False, format=True, true=1, recall=0.5, contradiction=None)),
    ("B", dict(correct=False, format=False, true=0, recall=0.0, contradiction=None)),
    ("<answer>B</answer>", dict(correct=False, format=False, contradiction=None)),
    ("<think>mucin pools", dict(correct=False, format=False, true=1, recall=0.5)),  # cut off: what it said counts
    (say("nothing known", "B") + " mucin pools", dict(correct=False, format=False, true=0)),  # only <think> is read
    (say("fat mucin pools", "B"), dict(correct=True, true=1, recall=0.5)),  # both named: one is false
])
def test_judge(text, want):
    got = judge(text, record(), LEXICON)
    assert {k: got[k] for k in want} == want


def test_judge_marks_claims_in_the_text():
    text = say("No mucin but mucin pools", "B")
    claims = judge(text, record(), LEXICON)["claims"]
    assert [(a, v, text[s:e], true) for a, v, s, e, true in claims] == [
        ("material", "!mucin", "No mucin", False), ("material", "mucin", "mucin pools", True)]
    for without in (record(facts=None), record(subfield="gross"), {k: v for k, v in record().items() if k != "facts"}):
        got = judge(text, without, LEXICON)
        assert got["claims"] == [] and got["recall"] is None and got["correct"]  # a question of real tissue


def test_bare_answers_are_read_where_no_reasoning_was_asked_for():
    """The ablation without reasoning must lose by its accuracy, not by a missing tag."""
    got = judge("<answer>B</answer>", record(), LEXICON, bare=True)
    assert got["correct"] and got["format"] and got["contradiction"] is None
    assert not judge("<answer>A</answer>", record(), LEXICON, bare=True)["correct"]
    assert judge(say("mucin pools", "B"), record(), LEXICON, bare=True)["correct"]             # reasoning does no harm
    for wrong in ("B", "<answer>B", "<answer>B</answer> or <answer>A</answer>", "well <answer>B</answer>",
                  "<think><answer>B</answer>"):
        assert not judge(wrong, record(), LEXICON, bare=True)["format"]


def test_table_by_hand():
    records = [record(0), record(1, level="hard", answer="A", facts={"material": "fat", "mitoses": "frequent"}),
               record(2, level="hard", topic="lung")]
    texts = [[say("mucin pools", "B"), say("fat, frequent mitoses", "B")],         # claims 1 of 1, 0 of 2
             [say("frequent mitoses and fat", "A"), "fat"],                      # 2 of 2, 1 of 1 (no tags: all is read)
             [say("no idea", "B"), say("frequent mitoses, it is keratin", "A")]]   # 0 of 0, 0 of 1
    out, accuracy, judged = table(records, texts, LEXICON)
    assert accuracy == [1.0, 0.5, 0.5] and out["accuracy"][0] == pytest.approx(2 / 3) and (out["n"], out["k"]) == (3, 2)
    assert out["format"] == pytest.approx(5 / 6)
    assert out["words"] == pytest.approx((2 + 3 + 4 + 1 + 2 + 5) / 6)
    assert out["claims"][0] == pytest.approx(4 / 7) and out["claims_per_answer"] == pytest.approx(7 / 6)
    # findings named rightly, of two: 1, 0 | 2, 1 | 0, 0
    assert out["claim_recall"] == pytest.approx((0.5 + 0 + 1 + 0.5 + 0 + 0) / 6)
    # five answers are read and have reasoning; two of them conclude on another option ("fat" -> B, "keratin" -> A)
    assert out["contradiction"] == pytest.approx(2 / 5)
    assert out["by_level"]["easy"]["accuracy"] == 1.0 and out["by_level"]["hard"] == {
        "accuracy": 0.5, "ci": [0.5, 0.5], "n": 2}
    assert {k: v["n"] for k, v in out["by_topic"].items()} == {"lung": 1, "skin": 2} and len(judged[2]) == 2
    low, high = out["claims"][1]
    assert 0 <= low < 4 / 7 < high <= 1


def test_claim_interval_is_that_of_a_ratio():
    """Questions with many claims and questions with few: the interval must resample questions, then divide."""
    rng = np.random.default_rng(0)
    records, texts, pairs = [], [], []
    for i in range(60):
        n, p = (6, 0.2) if i % 3 == 0 else (1, 0.9)
        said = ["mucin pools" if rng.random() < p else "fat" for _ in range(n)]
        records.append(record(i))
        texts.append([say(", ".join(said), "B")])
        pairs.append((said.count("mucin pools"), n))
    pairs = np.array(pairs)
    means = []
    for _ in range(3000):                                              # the slow way
        some = pairs[rng.choice(60, 60)]
        means.append(some[:, 0].sum() / some[:, 1].sum())
    value, (low, high) = table(records, texts, LEXICON)[0]["claims"]
    assert value == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())
    assert abs(low - np.quantile(means, 0.025)) < 0.015 and abs(high - np.quantile(means, 0.975)) < 0.015


# --- guessers without eyes --------------------------------------------------------------------------------------------


def pool(n, seed, clue=False, words=40):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        options = [f"w{w}" + " long" * int(rng.integers(3)) for w in rng.choice(words, 4, replace=False)]
        right = int(rng.integers(4))
        if clue:
            options[right] += " probably"
        out.append(record(i, options=options, answer=LETTERS[right]))
    return out


def test_letter_length_and_chance_by_brute_force():
    train, test = pool(50, 0), pool(200, 1) + [record(options=["a", "bb"], answer="B")]
    got = blind(train, test)
    counts = {x: sum(r["answer"] == x for r in train) for x in LETTERS}
    letter = max(counts, key=counts.get)
    assert sorted(counts.values())[-2] < counts[letter]                # no tie in this draw
    assert got["most_frequent_letter"] == pytest.approx(sum(r["answer"] == letter for r in test) / 201)
    longest = 0
    for r in test:
        best = max(range(len(r["options"])), key=lambda i: (len(r["options"][i]), -i))
        longest += r["answer"] == LETTERS[best]
    assert got["longest_option"] == pytest.approx(longest / 201)
    assert got["random"] == pytest.approx((200 / 4 + 1 / 2) / 201)


def test_text_only_finds_a_word_that_tells_and_nothing_else():
    assert blind(pool(200, 0, clue=True), pool(200, 1, clue=True))["text_only"] > 0.97
    assert abs(blind(pool(400, 2), pool(600, 3))["text_only"] - 0.25) < 0.07                   # 4 standard errors
    always = []
    for r in pool(100, 4):
        right = r["options"].pop(LETTERS.index(r["answer"]))
        always.append(dict(r, options=[right, *r["options"]], answer="A"))
    assert blind(always[:50], always[50:])["text_only"] > 0.9          # a place that tells
    hinted = [dict(r, question="Is it fat?" if r["answer"] in "AB" else "Is it mucin?",
                   options=["fat yes", "fat no", "mucin yes", "mucin no"]) for r in pool(400, 5)]
    assert abs(blind(hinted[:200], hinted[200:])["text_only"] - 0.5) < 0.12   # the question rules out two of four


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return chat.train_tokenizer([question_text({**record(), "image": "x"}), say("I see mucin pools and fat.", "B")] * 3,
                                presets.TINY_BPE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PathoVLM({**presets.VLM["smoke"], "initializer_range": 0.3}).train()


@pytest.fixture
def data(tmp_path):
    """A data folder with test.jsonl and val.jsonl: questions of other lengths, two sizes, one record of two pictures."""
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (56, 56 + 28 * (i % 2), 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    rows = [record(i, id=f"case/{i}", image=f"{i % 4}.png", question="Which" + " fat" * (i % 3) + "?",
                   level=("easy", "hard")[i % 2]) for i in range(7)]
    rows[2]["image"] = ["1.png", "2.png"]
    for name in ("test", "val"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "lexicon.json").write_text(json.dumps(LEXICON))
    return tmp_path


def read(data):
    return evaluate.read_records(data / "test.jsonl", use="question")


def test_answers_do_not_depend_on_the_batch(model, tokenizer, data):
    records = read(data)
    together = answers(model, tokenizer, records, max_new_tokens=12)
    alone = answers(model, tokenizer, records, max_new_tokens=12, rows=1)
    assert together == alone and [len(g) for g in together] == [1] * 7 and model.training
    assert len({g[0] for g in together}) > 1
    draw = dict(k=3, temperature=1.0, max_new_tokens=8)
    sampled = [answers(model, tokenizer, records[:3], seed=seed, **draw) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and [len(g) for g in sampled[0]] == [3, 3, 3]
    special = set(chat.SPECIAL)
    assert not any(token in text for group in sampled[2] for text in group for token in special)


def test_evaluate_gives_the_promised_numbers(model, tokenizer, data, monkeypatch):
    """What the model says is fixed here; the numbers follow by hand."""
    greedy = [[say("mucin pools", "B")]] * 4 + [[say("fat", "A")]] * 3
    drawn = [[say("mucin pools", "B"), say("fat", "A")], ["x", "x"], [say("fat", "A")] * 2]
    asked = []

    def made(model, tokenizer, records, *, k=1, temperature=0.0, prompt, **more):
        asked.append((len(records), k, temperature, prompt))
        return greedy if k == 1 else drawn

    monkeypatch.setattr(evaluate, "answers", made)
    out, each = evaluate.evaluate(model, tokenizer, data, samples=2, sample_items=3, max_new_tokens=5)
    assert asked == [(7, 1, 0.0, "cot"), (3, 2, 1.0, "cot")]
    assert out["n"] == 7 and out["greedy_accuracy"] == pytest.approx(4 / 7) and out["format"] == 1.0
    assert (out["samples"], out["sampled_n"]) == (2, 3) and out["sampled_accuracy"] == pytest.approx(1 / 6)
    assert out["sampled_format"] == pytest.approx(4 / 6) and out["pass_at_k"] == pytest.approx(1 / 3)
    assert out["claim_accuracy"] == pytest.approx(1 / 4) and out["greedy_claim_accuracy"] == pytest.approx(4 / 7)
    assert out["claims_per_answer"] == pytest.approx(4 / 6) and out["claim_recall"] == pytest.approx(0.5 / 6)
    assert each["ids"] == [f"case/{i}" for i in range(7)] and each["greedy"] == [1.0] * 4 + [0.0] * 3
    assert each["sampled"] == [0.5, 0.0, 0.0]
    assert out["by_level"]["hard"]["n"] == 3 and out["by_level"]["hard"]["greedy_accuracy"] == pytest.approx(2 / 3)
    assert all(len(out[f"{k}_ci"]) == 2 for k in ("greedy_accuracy", "sampled_accuracy", "claim_accuracy"))
    json.dumps(out, allow_nan=False)

    greedy = [["<answer>B</answer>"]] * 5                              # the ablation: bare answers to a bare prompt
    out, _ = evaluate.evaluate(model, tokenizer, data, items=5, samples=0, prompt="bare")
    assert out["greedy_accuracy"] == 1.0 and out["format"] == 1.0 and asked[-1] == (5, 1, 0.0, "bare")
    assert "sampled_accuracy" not in out and "claim_accuracy" not in out


def test_caption_claims_by_hand(model, tokenizer, data, monkeypatch):
    says = ["Fat.", "mucin pools, no mitoses", "nothing", "frequent mitoses, mucin pools"]
    records = [dict(r, image="0.png") for r in map(json.loads, open(data / "test.jsonl"))][:4]
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def made(model, input_ids, **more):
        assert not model.training
        rows = [torch.tensor([*tokenizer.encode(text), tokenizer.end_id]) for text in says[:len(input_ids)]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        return Generation(ids, torch.zeros(ids.shape), mask)

    monkeypatch.setattr(faithful, "generate", made)
    out = caption_claims(model, tokenizer, data, 100)
    assert out["n"] == 4 and out["claim_accuracy"] == pytest.approx(3 / 5)      # the image holds mucin and no mitoses
    assert out["claim_recall"] == pytest.approx(3 / 8)                          # of material and mitoses, four times
    assert out["by_finding"] == {"H&E material": 0.5, "H&E mitoses": 0.25} and model.training
    assert [e["caption"] for e in out["examples"]] == says
    says[:] = ["nothing"] * 4                                          # no claim at all: no number, and valid JSON
    assert caption_claims(model, tokenizer, data, 2)["claim_accuracy"] is None
    json.dumps(caption_claims(model, tokenizer, data, 2), allow_nan=False)
    (data / "lexicon.json").unlink()
    assert caption_claims(model, tokenizer, data, 2) == {} and read_lexicon(data) == {}


def test_captions_are_written_for_real(model, tokenizer, data):
    rows = [dict(r, image="0.png") for r in map(json.loads, open(data / "test.jsonl"))]
    (data / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert caption_claims(model, tokenizer, data, 3)["n"] == 3


def test_heatmap_is_the_change_of_the_loss_when_a_cell_grows(tokenizer, data):
    """|gradient x input| of a cell = |d loss / d s| when its features are scaled by s; here by differences."""
    torch.manual_seed(1)
    model = PathoVLM({**presets.VLM["smoke"], "initializer_range": 0.15}).eval()
    r, text, images = read(data)[1], say("fat", "B"), Images()
    spelled = heatmap(model, tokenizer, r, "<image>" + text, images)   # a model may write the mark
    assert spelled == heatmap(model, tokenizer, r, text, images)
    heat = torch.tensor(heatmap(model, tokenizer, r, text, images))
    assert heat.shape == (2, 3) and heat.max() == 1.0 and (heat >= 0).all()
    turns = [*ask(r)[1], {"role": "assistant", "content": text}]
    batch = evaluate.vlm_batch([(r, turns, "chat")], tokenizer, model.config, images=images)
    labels = batch["labels"].clone()
    labels[:, :-8] = -100
    slow = []
    with torch.no_grad():
        seen = model.visual(batch["pixel_values"], batch["image_grid_thw"])
        for cell in range(len(seen)):
            loss = []
            for s in (1.05, 0.95):
                scaled = seen.clone()
                scaled[cell] *= s
                hidden = model.hidden_states(batch["input_ids"], image_embeds=scaled,
                                             image_grid_thw=batch["image_grid_thw"])
                loss.append(model.loss(hidden, labels))
            slow.append(abs(float(loss[0] - loss[1])) / 0.1)
    slow = torch.tensor(slow) / max(slow)
    torch.testing.assert_close(heat.flatten(), slow, atol=0.03, rtol=0)


def test_samples_for_the_page(model, tokenizer, data, tmp_path):
    out = tmp_path / "run"
    score = lambda text, r: {"format": 0.0, "reward": float(len(text))}
    show_samples(model, tokenizer, data, out, questions=5, k=2, max_new_tokens=6, score=score)
    shown = json.loads((out / "samples" / "questions.json").read_text())
    assert [q["level"] for q in shown] == ["easy", "hard"] * 3         # the same number of each level
    for q in shown:
        assert (tmp_path / q["image"]).is_file() and q["heatmap"] and q["answer"] == "B"
        assert [a["reward"] for a in q["answers"]] == [float(len(a["text"])) for a in q["answers"]]
        a = [x["advantage"] for x in q["answers"]]
        assert abs(sum(a)) < 1e-5 and (a[0] == 0 or abs(abs(a[0]) - 0.5 ** 0.5) < 1e-4)      # two answers: +-1/sqrt 2
    assert "case/0" in (out / "samples" / "questions.txt").read_text()


def test_command_line(model, tokenizer, data, tmp_path, capsys):
    model.save_pretrained(tmp_path / "weights")
    tokenizer.save(tmp_path / "weights")
    evaluate.main(["--model", str(tmp_path / "weights"), "--data", str(data), "--items", "2", "--samples", "2",
                   "--max_new_tokens", "4"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["n"] == 2 and 0 <= printed["greedy_accuracy"] <= 1 and printed["samples"] == 2
    with pytest.raises(ConfigError, match="--model: .*nowhere: no such folder"):
        evaluate.main(["--model", str(tmp_path / "nowhere"), "--data", str(data)])
    with pytest.raises(DataError, match="other.jsonl: no such file"):
        evaluate.main(["--model", str(tmp_path / "weights"), "--data", str(data), "--pool", "other"])


# --- a benchmark ------------------------------------------------------------------------------------------------------


def settings(**changes):
    return Namespace(**{"prompt": "cot", "samples": 3, "temperature": 1.0, "loglik": "text", "without_image": True,
                        "rows": 6, "max_new_tokens": 6, "max_pixels": evaluate.MAX_PIXELS, "seed": 0, **changes})


@pytest.fixture
def benchmark(data):
    """30 questions: choices with two to five options, closed and open ones, in three subsets."""
    rows, words = [], ["fat", "mucin pools", "keratin", "fat mucin", "keratin fat"]
    for i in range(30):
        row = {"id": f"b{i}", "image": f"{i % 4}.png", "question": "Which" + " fat" * (i % 4) + "?",
               "subset": "PEA"[i % 3], "level": ("easy", "hard")[i % 2], "options": words[:2 + i % 4], "answer": "AB"[i % 2]}
        if i % 5 == 0:
            del row["options"]
            row["answer"] = ("Yes", "no.", "mucin pools of fat")[i // 5 % 3]
        rows.append(row)
    (data / "bench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return data / "bench.jsonl"


def test_kinds_of_questions_and_their_prompts(benchmark):
    records = bench.read_benchmark(benchmark)
    assert [r["_kind"] for r in records[::5]] == ["closed", "closed", "open"] * 2 and records[1]["_kind"] == "choice"
    closed = [bench.as_choice(r) for r in records[:6:5]]
    assert [(r["options"], r["answer"]) for r in closed] == [(["yes", "no"], "A"), (["yes", "no"], "B")]
    assert bench.as_choice(records[10]) is None and bench.as_choice(records[1]) is records[1]
    user = lambda r, **more: evaluate.ask(r, **more)[1][1]["content"]
    assert user(records[0]) == "<image>Which?" and user(records[1]) == question_text(records[1])
    assert user({**records[1], "image": None}) == question_text(records[1]).removeprefix("<image>")
    assert ask(records[1], "Look well.")[1][0]["content"] == "Look well."              # a system turn of one's own
    lines = benchmark.read_text().splitlines()
    benchmark.write_text("\n".join([lines[0], json.dumps({"id": "x", "question": "Why?", "image": "0.png"})]) + "\n")
    with pytest.raises(DataError, match=r"bench.jsonl:2 id=x: field 'answer' is missing"):
        bench.read_benchmark(benchmark)


def test_max_pixels_is_obeyed(model, tokenizer, data):
    rows = read(data)[:2]
    grids = [evaluate.prompts(model, tokenizer, rows, "cot", Images(), most)["image_grid_thw"].prod(1).tolist()
             for most in (evaluate.MAX_PIXELS, 3136)]
    assert grids[0] == [16, 24] and max(grids[1]) <= 16 and grids[1] != grids[0]


def test_option_logps_equal_one_plain_pass_for_each_option(tokenizer, benchmark):
    torch.manual_seed(2)
    model = PathoVLM({**presets.VLM["smoke"], "initializer_range": 0.15}).eval()
    records = [bench.as_choice(r) for r in bench.read_benchmark(benchmark)[1:7] if bench.as_choice(r)]
    replies = ["<think>I see fat.</think><answer>B</answer>", "<think>cut off in the", ""] * 2
    images = Images()
    for form in ("text", "letter"):
        got = bench.option_logps(model, tokenizer, records, replies, form, "cot", images, evaluate.MAX_PIXELS)
        for record, reply, scores in zip(records, replies, got):
            head = reply.split("<answer>")[0] if "</think>" in reply else reply and reply + "</think>"
            totals, shown = [], LETTERS[:len(record["options"])] if form == "letter" else record["options"]
            for x in shown:
                turns = [*ask(record)[1], {"role": "assistant", "content": f"{head}<answer>{x}</answer>"}]
                batch = evaluate.vlm_batch([(record, turns, "chat")], tokenizer, model.config, images=images)
                labels = batch.pop("labels")[0]
                with torch.no_grad():
                    logits = model(**batch)[0]
                logits[:, list(tokenizer.banned_ids)] = float("-inf")
                where = (labels != -100).nonzero().flatten()
                totals.append([float(logits[t - 1].log_softmax(-1)[labels[t]]) for t in where])
            replies_of = [tokenizer.encode(f"{head}<answer>{x}</answer>") for x in shown]
            lead = next(n for n in range(99) if len({ids[n] for ids in replies_of}) > 1)
            for (total, tokens), logps in zip(scores, totals):
                assert total == pytest.approx(sum(logps[lead:]), abs=2e-4) and tokens == len(logps) - lead


def test_killed_five_times_and_on_two_ranks_the_table_is_the_same(model, tokenizer, benchmark, tmp_path):
    """Real kills: a forked process answers and dies by SIGKILL once a few lines of the journal are written."""
    records, c, mark = bench.read_benchmark(benchmark), settings(without_image=False), {"made": "for a test"}

    def work(name, rank=0, world=1, load=lambda: (model, tokenizer)):
        (tmp_path / name).mkdir(exist_ok=True)
        return bench.answer_all(load, records, c, tmp_path / name, mark, rank=rank, world=world)

    def table(entries):
        return json.dumps([bench.score_item(r, entries[r["id"]], {}, LEXICON) for r in records])

    want = table(work("whole"))
    journal, lines = tmp_path / "broken" / "journal-0.jsonl", 1
    for kill in range(5):
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                work("broken")
            finally:
                os._exit(0)
        lines += 2
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        with open(journal, "ab") as file:                              # the line it was writing
            file.write(b'{"batch": 14, "entries": [{"id": "b' * (kill % 2))
    assert table(work("broken")) == want
    assert work("two", 0, 2) is None                                   # the other half is not there yet
    assert table(work("two", 1, 2)) == want
    assert table(work("two", load=None)) == want                       # complete: no model is loaded
    mark = {"made": "for another"}
    with pytest.raises(ConfigError, match="journal-0.jsonl holds answers with other settings: made was 'for a test'"):
        work("whole")
    journal.write_bytes(journal.read_bytes().replace(b'"batch": 3', b'"batch": x'))
    with pytest.raises(ConfigError, match=r"broken.*journal-0.jsonl, line \d+: not JSON"):
        bench.read_journal(tmp_path / "broken", {})


def entry(text, *samples, cut=False, **more):
    return {"greedy": (text, cut), "samples": [(t, False) for t in samples], **more}


def test_items_and_table_by_hand():
    records = [record(0, subset="P", _kind="choice", _root=""), record(1, subset="P", _kind="choice", _root=""),
               record(2, subset="S", _kind="closed", options=None, answer="No.", _root=""),
               record(3, subset="S", _kind="open", options=None, answer="mucin pools", _root="")]
    entries = [entry(say("mucin pools", "B"), say("x", "B"), say("x", "B"), say("x", "A"), "x",
                     loglik=[(-3, 1), (-2, 1), (-9, 9)]),
               entry("I say B", say("x", "A"), say("x", "B"), "", "", cut=True, blind=(say("x", "B"), False)),
               entry(say("x", "no, none")), entry(say("x", "pools"))]
    items = [bench.score_item(r, e, {"random": 1 / 3}, LEXICON) for r, e in zip(records, entries)]
    n = [i["numbers"] for i in items]
    assert n[0] == pytest.approx({
        "accuracy": 1, "unreadable": 0, "lenient": 1, "sampled": 0.5, "sampled_unreadable": 0.25, "majority": 1,
        "pass@2": 1 - 1 / 6, "pass@4": 1, "loglik": 1, "loglik_per_token": 0, "blind: random": 1 / 3})
    assert n[1]["accuracy"] == n[1]["lenient"] == 0 and n[1]["majority"] == 0.5 and n[1]["without_image"] == 1
    assert items[1]["why"] == "cut off at --max_new_tokens" and items[0]["why"] is None
    assert n[2]["accuracy"] == 1 and n[3] == {"f1": pytest.approx(2 / 3), "recall": 0.5, "open_unreadable": 0}
    out = bench.tabulate(items, {"P": 1, "S": 3})
    assert out["overall"]["accuracy"]["value"] == pytest.approx(2 / 3) and out["overall"]["f1"]["n"] == 1
    assert out["by_subset"]["P"]["accuracy"]["value"] == 0.5 and out["by_kind"]["closed"]["accuracy"]["n"] == 1
    assert out["size_weighted"]["accuracy"]["value"] == pytest.approx(0.25 * 0.5 + 0.75 * 1)
    assert out["calibration"]["brier"] == pytest.approx((0.5 ** 2 + 0.25 ** 2) / 2)
    assert out["why"] == {items[1]["why"]: 1}
    json.dumps(out, allow_nan=False)
    other = [dict(i, numbers=dict(i["numbers"], accuracy=1.0)) if "accuracy" in i["numbers"] else i for i in items]
    test = bench.compare(items, other)
    assert test["accuracy"]["gain"] == pytest.approx(1 / 3) and test["accuracy, P"]["better"] == test["f1"]["p"] == 1
    with pytest.raises(ConfigError, match="1 of 4 questions are not the same.*'q3'"):
        bench.compare(items, [*other[:3], dict(other[3], answer="fat")])


@pytest.mark.parametrize("text,why,lenient", [
    ("B", "no <answer> block", 1), ("<think>x</think><answer>B", "not closed", 1),
    (say("x", "A") + "<answer>B</answer>", "several", 1), ("<answer>B</answer>", "no <think> block", 1),
    ("so " + say("x", "B"), "outside the blocks", 1), (say("", "B"), "an empty block", 1),
    (say("x", "A or B"), "names no option", None), ("<think>it is B</think> (B)", "no <answer> block", 1)])
def test_why_an_answer_is_not_read(text, why, lenient):
    item = bench.score_item(record(_kind="choice", _root=""), entry(text), {}, {})
    assert why in item["why"] and item["numbers"]["unreadable"] == 1 and item["numbers"]["accuracy"] == 0
    assert item["numbers"]["lenient"] == float(lenient == 1)


def test_command_qa(model, tokenizer, benchmark, tmp_path, capsys):
    model.save_pretrained(tmp_path / "weights"), tokenizer.save(tmp_path / "weights")
    fields = dict(model=tmp_path / "weights", data=benchmark, max_new_tokens=4, samples=2, loglik="letter", items=12)
    call = lambda **more: evaluate.main(["qa", "--without_image", *[
        x for k, v in {**fields, **more}.items() for x in (f"--{k}", str(v))]])
    call(out=tmp_path / "one")
    assert "image withheld" in capsys.readouterr().out and (tmp_path / "one" / "report.html").is_file()
    call(out=tmp_path / "two", compare=tmp_path / "one", benchmark="pathmmu-test")
    shown = capsys.readouterr().out
    assert "NOT RUN HERE" in shown and "Patho-R1-7B" in shown and "p = 1" in shown
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["overall"] == results[1]["overall"] and results[0]["overall"]["blind: random"]["n"] == 11
    with pytest.raises(ConfigError, match="--benchmark none: not in"):
        call(benchmark="none")
    with pytest.raises(ConfigError, match="other settings: .*seed was 0, is 1"):
        call(out=tmp_path / "one", seed=1)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="other settings: .*model was"):
        call(out=tmp_path / "one")
