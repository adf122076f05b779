"""Intervals against scipy and a coverage simulation, tables and blind guessers by hand, a small model end to end."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nanopatho import chat, evaluate, presets
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

    monkeypatch.setattr(evaluate, "generate", made)
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
