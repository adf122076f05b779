"""Numbers of an evaluation against scikit-learn, scipy, enumeration, simulation; traps of public evaluators."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from nanopatho import metrics, rewards

def test_interval_in_parts_is_the_plain_bootstrap():
    values = np.random.default_rng(0).random(3000)                    # 2000 x 3000 draws: computed in two parts
    plain = values[np.random.default_rng(0).integers(3000, size=(2000, 3000))].mean(1)
    assert metrics.interval(values)[1] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=1e-15)


def test_interval_of_groups_covers_and_the_plain_one_does_not():
    """20 slides with a rate of their own each, 15 tiles a slide: tiles of one slide are not independent."""
    rng, hits = np.random.default_rng(0), {"groups": 0, "tiles": 0}
    slides = np.repeat(np.arange(20), 15)
    for _ in range(200):
        values = rng.random(300) < rng.beta(1, 1, 20)[slides]
        for name, groups in (("groups", slides), ("tiles", None)):
            low, high = metrics.interval(values, resamples=300, groups=groups)[1]
            hits[name] += low <= 0.5 <= high
    assert hits["groups"] / 200 > 0.88 and hits["tiles"] / 200 < 0.75
    few = np.tile([1, 0, 1, 1], 15)                                   # three groups that agree to the last digit
    assert metrics.interval(few, groups=np.repeat(["a", "b", "c"], 20))[1] == metrics.interval(few)[1]


def test_mcnemar_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n, shift in ((40, 0.0), (40, 0.2), (400, 0.1)):
        before, after = rng.random(n) < 0.5, rng.random(n) < 0.5 + shift
        got = metrics.paired_test(before, after)
        b, w = int((after & ~before).sum()), int((before & ~after).sum())
        assert (got["better"], got["worse"], got["n"]) == (b, w, n) and got["gain"] == pytest.approx((b - w) / n)
        assert got["p"] == pytest.approx(stats.binomtest(b, b + w).pvalue, rel=1e-9)
    assert metrics.paired_test([1, 0, 1], [1, 0, 1])["p"] == 1.0
    with pytest.raises(ValueError, match="same items"):
        metrics.paired_test([1], [1, 0])


def test_sign_flips_equal_all_flips_and_keep_their_level():
    change = np.array([0.5, -0.25, 0.75, 0.125, 0.25, -0.125, 0.625, 0.375])
    got = metrics.paired_test(np.zeros(8), change)
    every = [abs(sum(s * c for s, c in zip(signs, change))) >= abs(change.sum()) - 1e-12
             for signs in itertools.product((-1, 1), repeat=8)]
    assert got["p"] == pytest.approx(np.mean(every), abs=0.01) and "flips" in got["method"]
    rng, rejected = np.random.default_rng(1), 0
    for _ in range(200):                                              # no difference: 5 % of the tests may say so
        x = rng.integers(0, 9, (2, 60)) / 8
        rejected += metrics.paired_test(*x, flips=200)["p"] < 0.05
    assert rejected / 200 < 0.09


def test_size_weighted():
    rng = np.random.default_rng(0)
    parts = {"PubMed": rng.random(300) < 0.7, "PathCLS": rng.random(60) < 0.3}
    total, (low, high) = metrics.size_weighted(parts)
    assert total == pytest.approx(np.mean(np.concatenate(list(parts.values()))))          # = the mean over all items
    assert total != pytest.approx(np.mean([v.mean() for v in parts.values()]), abs=0.05)   # the unweighted one differs
    half = 1.96 * math.sqrt(sum((len(v) / 360) ** 2 * v.var() / len(v) for v in parts.values()))
    assert low == pytest.approx(total - half, abs=0.15 * half) and high == pytest.approx(total + half, abs=0.15 * half)
    published, _ = metrics.size_weighted(parts, {"PubMed": 100, "PathCLS": 300})           # a copy that lost images
    assert published == pytest.approx(0.25 * parts["PubMed"].mean() + 0.75 * parts["PathCLS"].mean())


def test_pass_at_k_equals_enumeration():
    for n, right in ((5, 2), (8, 0), (8, 8), (6, 1)):
        answers = [i < right for i in range(n)]
        for k in range(1, n + 1):
            want = np.mean([any(some) for some in itertools.combinations(answers, k)])
            assert metrics.pass_at_k(right, n, k) == pytest.approx(want, abs=1e-12)


def test_majority_by_hand():
    assert metrics.majority([1, 1, 0, 2], 1) == (1.0, 0.5) and metrics.majority([1, 1, 0, 2], 0) == (0.0, 0.5)
    assert metrics.majority([1, 0, 0, 1], 0) == (0.5, 0.5)            # a tie is shared, whatever came first
    assert metrics.majority([None, None, 2, None], 2) == (1.0, 0.25)  # unreadable: no vote, but less sure
    assert metrics.majority([None] * 4, 0) == (0.0, 0.0)


def test_calibration_equals_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    confidence = rng.random(500) * 0.98 + 0.01
    correct = rng.random(500) < confidence ** 2
    got = metrics.calibration(confidence, correct)
    true, said = calibration.calibration_curve(correct, confidence, n_bins=10)
    assert [b["accuracy"] for b in got["bins"]] == pytest.approx(true)
    assert [b["confidence"] for b in got["bins"]] == pytest.approx(said)
    from sklearn.metrics import brier_score_loss
    assert got["brier"] == pytest.approx(brier_score_loss(correct, confidence))
    assert got["ece"] == pytest.approx(sum(b["n"] * abs(t - s) for b, t, s in zip(got["bins"], true, said)) / 500)
    exact = metrics.calibration([0.25] * 4 + [1.0], [1, 0, 0, 0, 1])
    assert exact["ece"] == 0 and [b["n"] for b in exact["bins"]] == [4, 1]
    assert metrics.calibration([0.2, 3 * 0.1], [0, 0])["bins"][0]["high"] == 0.2


@pytest.mark.filterwarnings("ignore")
def test_classification_equals_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n, K in ((200, 4), (30, 9), (50, 2)):
        y, guess = rng.integers(K, size=n), rng.integers(K, size=n)
        y[y == K - 1] = 0                                             # a class that is guessed and never occurs
        got = metrics.classification(y, guess, K)
        assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, guess))
        assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, guess))
        assert got["weighted_f1"] == pytest.approx(sk.f1_score(y, guess, average="weighted", zero_division=0))
        assert got["recall"][K - 1] is None


def test_traps_of_reading_an_answer():
    """The wrong way of a public evaluator first, then ours."""
    # PathMMU's prompt code splits options at ")" and loses the rest of 92 of them; its key may be a bare letter
    assert "B) Cytomegalovirus (CMV) infection".split(")")[1].strip() == "Cytomegalovirus (CMV"
    options = ["Herpes", "Cytomegalovirus (CMV) infection"]
    assert {rewards.choice(said, options) for said in ("B", "B) " + options[1], options[1])} == {1}
    # PathMMU's evaluator draws a letter where it can read none: a mute model gets a quarter
    rng, key = np.random.default_rng(0), np.random.default_rng(1).integers(4, size=2000)
    assert abs(np.mean(rng.integers(4, size=2000) == key) - 0.25) < 0.04
    assert all(rewards.choice(said, ["a b", "c d", "e f", "g h"]) is None for said in ("", "A or B", "I cannot tell"))
    # Quilt-LLaVA's evaluator takes all without "no" or "not" for yes
    wrong = lambda text: "no" if {"no", "not"} & set(text.lower().split()) else "yes"
    assert wrong("") == wrong("The image shows a kidney") == "yes" and wrong("Yes, there is no doubt") == "no"
    ours = lambda text: rewards.choice(text, ["yes", "no"])
    assert ours("") is None and ours("The image shows a kidney") is None and ours("Yes, without doubt") == 0
    assert ours("No.") == 1 and ours("Yes, there is no doubt") is None             # it holds both: not guessed


def test_trap_repeating_a_word():
    """LLaVA-Med's F1 counts every repetition of a matching word as a hit."""
    said, wanted = "carcinoma carcinoma carcinoma", "ductal carcinoma"
    hits = said.split().count("carcinoma")                            # the wrong way: precision 3/3, recall 3/(3 + 1)
    assert hits / 3 == 1 and hits / (hits + 1) == 0.75
    assert metrics.token_scores(said, wanted) == pytest.approx({"precision": 1 / 3, "recall": 0.5, "f1": 0.4})


def test_token_scores_by_hand():
    assert metrics.token_scores("The mild epithelial hyperplasia.", "mild Epithelial-hyperplasia")["f1"] == 1
    got = metrics.token_scores("a duct with mild atypia", "severe atypia of the duct")
    assert got == {"precision": 0.5, "recall": 0.5, "f1": 0.5}        # duct and atypia, of four words each
    for said, wanted in (("", "fat"), ("fat", ""), ("bone", "fat")):
        assert set(metrics.token_scores(said, wanted).values()) == {0.0}


def test_blind_means_and_cross_fitting():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        options = [f"w{w}" for w in rng.choice(50, 4, replace=False)]
        right = int(rng.integers(4))
        options[right] += " probably" if i % 2 else ""
        rows.append({"id": f"q{i}", "question": "Which?", "options": options, "answer": "ABCD"[right]})
    each = metrics.blind_each(rows[:200], rows[200:])
    assert metrics.blind(rows[:200], rows[200:]) == {name: v.mean() for name, v in each.items()}
    got = metrics.blind_without_training(rows)
    assert got["text_only"][1::2].mean() > 0.95 and abs(got["text_only"][::2].mean() - 0.25) < 0.12
    leaking = metrics.blind_each(rows, rows)["text_only"]              # learnt from the questions it is asked
    assert leaking[::2].mean() > got["text_only"][::2].mean() + 0.05
    letters = [r["answer"] for r in rows]
    assert got["most_frequent_letter"].mean() == max(letters.count(x) for x in "ABCD") / 400
    twins = [dict(r, id=f"{r['id']}-{n}", group=r["id"]) for r in rows[:20] for n in range(3)]
    points = metrics.blind_without_training(twins)["text_only"]
    fold = lambda r: metrics.zlib.crc32(r["group"].encode()) % 5
    assert len({fold(r) for r in twins}) > 1 and len(points) == 60
    for i, r in enumerate(twins):                                     # a group is never on both sides
        rest = [t for t in twins if fold(t) != fold(r)]
        assert points[i] == metrics.blind_each(rest, [r])["text_only"][0]


def test_published_numbers_are_whole():
    """reference.json: every table names its source; totals are the size-weighted means of its own columns."""
    data = json.loads((Path(metrics.__file__).parent / "reference.json").read_text())
    assert "NOT RUN HERE" in data["about"] and len({t["benchmark"] for t in data["tables"]}) == len(data["tables"])
    for table in data["tables"]:
        assert table["source"] and table["rows"] and table["metric"]
        for row in table["rows"].values():
            assert all(0 <= v <= 100 for v in row.values())
            if table.get("sizes") and set(table["sizes"]) <= set(row):
                total = sum(row[s] * n for s, n in table["sizes"].items()) / sum(table["sizes"].values())
                assert row["all"] == pytest.approx(total, abs=0.051)
    assert {t["benchmark"]: sum(t["sizes"].values()) for t in data["tables"] if "sizes" in t} == {
        "pathmmu-test": 8454, "pathmmu-test-tiny": 1139, "pathmmu-all": 9677}      # pools differ: never mixed
