"""Pointing by brute force, heat of a claim by differences, sensitivity with readers that see all, nothing, or lie."""

import json

import numpy as np
import pytest
import torch

from data_prep import questions, render, world as facts_of
from nanopatho import chat, evaluate, faithful, presets
from nanopatho.data import DataError, Images, question_text, read_records
from nanopatho.vlm import PathoVLM


def test_pointing_against_brute_force():
    rng = np.random.default_rng(0)
    for rows, cols, size in ((4, 4, 112), (3, 5, 31), (8, 8, 64)):
        heat, mask = rng.random((rows, cols)), rng.random((size, size)) < 0.3
        cell = lambda edge, n, i: (int(np.round(edge * i / n)), int(np.round(edge * (i + 1) / n)))
        inside = 0.0
        for r in range(rows):
            for c in range(cols):
                (a, b), (x, y) = cell(size, rows, r), cell(size, cols, c)
                inside += heat[r, c] * mask[a:b, x:y].mean()
                if heat[r, c] == heat.max():
                    hottest = mask[a:b, x:y].mean()
        energy, hit, chance = faithful.pointing(heat, mask)
        assert (energy, hit, chance) == pytest.approx((inside / heat.sum(), hottest, mask.mean()))
    half = np.zeros((16, 16), bool)
    half[:, :8] = True
    assert faithful.pointing(np.ones((4, 4)), half) == (0.5, 0.5, 0.5)              # a flat map points nowhere
    assert faithful.pointing(np.eye(4)[[0]], half)[0] == 1.0 and faithful.pointing(np.zeros((4, 4)), half)[0] == 0


def test_a_finding_is_gone_and_nothing_else():
    for subfield in facts_of.SUBFIELDS:
        for attribute in facts_of.ATTRIBUTES[subfield]:
            for facts, _ in facts_of.space(subfield)[::7]:
                gone = faithful.without(facts, attribute)
                if gone is None:
                    assert attribute not in faithful.ABSENT or facts[attribute] == faithful.ABSENT[attribute]
                    continue
                changed = {k for k in facts if facts[k] != gone[k]}
                assert attribute in changed and changed <= {attribute, *faithful.WITH_IT.get(attribute, ())}
                assert any(gone == f for f, _ in facts_of.space(subfield)), gone           # a case of this world
    facts = {**next(f for f, _ in facts_of.space("H&E") if f["mitoses"] == "frequent" and f["material"] == "fat"),
             "seed": 7, "um_per_px": 1.0, "stain_shift": False}
    for attribute, mask in (("mitoses", "mitoses"), ("material", "material")):
        assert mask in render.draw(facts, 112)[1]
        assert mask not in render.draw(faithful.without(facts, attribute), 112)[1]


@pytest.fixture(scope="module")
def records(world):
    return read_records(world / "test.jsonl", use="question")


@pytest.fixture(scope="module")
def drawn(records):
    return faithful.redraw(records, Images())


def test_new_truth_is_that_of_the_rules(records, drawn):
    assert [d[0]["id"] for d in drawn if d[1] is None] == [r["id"] for r in records]
    removed = [d for d in drawn if d[1]]
    assert len(removed) > 10 and {d[3] == d[0]["answer"] for d in removed} == {True, False}
    for record, gone, _, right in removed:
        kind = next(k for k in questions.kinds(record["subfield"], record["level"]) if k.name == record["kind"])
        assert kind.label(faithful.without(record["facts"], gone)) == record["options"]["ABCD".index(right)]
    with pytest.raises(DataError, match="test.jsonl:1 .*facts.*microworld"):
        faithful.redraw([dict(records[0], kind="opinion")], Images())


@pytest.mark.parametrize("reader,sensitivity,follows,stability", [
    ("sees", 1.0, 1.0, 1.0), ("blind", 0.0, 0.0, 1.0), ("contrary", 1.0, 0.0, 0.0)])
def test_readers_of_known_faith(records, drawn, world, monkeypatch, reader, sensitivity, follows, stability):
    truth = {d[0]["_array"].tobytes(): d[3] for d in drawn}
    before = {d[0]["id"]: d for d in drawn if d[1] is None}

    def answers(model, tokenizer, asked, **more):
        out = []
        for r in asked:
            new, old = truth[r["_array"].tobytes()], r["answer"]
            same = np.array_equal(r["_array"], before[r["id"]][0]["_array"])
            other = next(x for x in "ABCD" if x not in (new, old))
            letter = {"sees": new, "blind": old, "contrary": old if same else other}[reader]
            out.append([f"<think>I look.</think><answer>{letter}</answer>"])
        return out

    monkeypatch.setattr(evaluate, "answers", answers)
    got = faithful.faithfulness(None, None, world, items=0)
    assert got["accuracy"] == 1.0 and got["n"] == len(records)
    want = dict(sensitivity=sensitivity, follows=follows, stability=stability)
    assert {name: got[name]["value"] for name in want} == want
    assert got["claim_precision"] is None and "pointing: energy" not in got          # it named nothing
    assert got["sensitivity"]["n"] + got["stability"]["n"] == len(truth) - len(records)


@pytest.fixture(scope="module")
def small(records):
    torch.manual_seed(1)
    texts = [question_text(r) for r in records[:20]] + ["<think>I see mucin pools and fat.</think><answer>B</answer>"]
    model = PathoVLM({**presets.VLM["smoke"], "initializer_range": 0.15}).eval()
    return model, chat.train_tokenizer(texts, presets.TINY_BPE)


def test_heat_of_a_claim_is_that_of_its_words(small, records):
    """By differences of the log-probability of exactly the tokens of the phrase, which is found here by its ids."""
    model, tokenizer = small
    text, r, images = "<think>I see mucin pools and fat.</think><answer>B</answer>", records[0], Images()
    start = text.index("mucin")
    claim = ("material", "mucin", start, start + len("mucin pools"))
    heat = torch.tensor(faithful.claim_heat(model, tokenizer, r, text, claim, images))
    turns = [*evaluate.ask(r)[1], {"role": "assistant", "content": text}]
    batch = evaluate.vlm_batch([(r, turns, "chat")], tokenizer, model.config, images=images)
    ids = batch["input_ids"][0].tolist()
    words = [list(tokenizer.encode(" mucin pools")), list(tokenizer.encode("<think>I see mucin pools"))]
    assert words[1][-len(words[0]):] == words[0]                      # the phrase is whole tokens
    at = next(i for i in range(len(ids) - 1, 0, -1) if ids[i:i + len(words[0])] == words[0])
    slow = []
    with torch.no_grad():
        seen = model.visual(batch["pixel_values"], batch["image_grid_thw"])
        for cell in range(len(seen)):
            values = []
            for s in (1.05, 0.95):
                scaled = seen.clone()
                scaled[cell] *= s
                logits = model(batch["input_ids"], image_embeds=scaled, image_grid_thw=batch["image_grid_thw"])
                logp = logits.log_softmax(-1)[0]
                values.append(sum(float(logp[i - 1, ids[i]]) for i in range(at, at + len(words[0]))))
            slow.append(abs(values[0] - values[1]))
    torch.testing.assert_close(heat.flatten().float(), torch.tensor(slow) / max(slow), atol=0.03, rtol=0)


def test_command_end_to_end(small, world, tmp_path, capsys):
    model, tokenizer = small
    model.save_pretrained(tmp_path / "weights"), tokenizer.save(tmp_path / "weights")
    evaluate.main(["faithful", "--model", str(tmp_path / "weights"), "--data", str(world), "--items", "4",
                   "--max_new_tokens", "4", "--out", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out" / "faithful.json").read_text())
    assert saved == json.loads(capsys.readouterr().out) and saved["n"] == 4 and saved["accuracy"] == 0.0
