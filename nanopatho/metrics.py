"""The numbers of an evaluation as pure functions: intervals, paired tests, votes, classification, blind guessers.

numpy and the standard library only; may be copied alone. No function drops an item or guesses an answer. Where a public
evaluator counts otherwise, the docstring says so, and tests/test_metrics.py shows both ways.

Letters: N items, k answers to each item, K classes.
"""
import collections
import math
import re
import zlib

import numpy as np

LETTERS = "ABCDEFGHIJ"

# --- intervals and paired tests ---------------------------------------------------------------------------------------


def interval(values, resamples=2000, seed=0, groups=None):
    """Mean of per-item values and its 95 % bootstrap interval -> (mean, [low, high]); NaN where there are no values.

    groups: N names (slide, region, patient): whole groups are resampled, since items of one group are not independent.
    Fewer than ten groups can agree by luck: then the interval reaches at least as far as that of single items.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return float("nan"), [float("nan")] * 2
    sums, counts = values, np.ones(len(values))
    if groups is not None:
        _, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        sums, counts = np.bincount(which, values), np.bincount(which).astype(float)
    rng, means, rows = np.random.default_rng(seed), [], max(1, 4_000_000 // len(sums))
    for at in range(0, resamples, rows):                             # in parts: 2000 x 10,000 indices would be 160 MB
        drawn = rng.integers(len(sums), size=(min(rows, resamples - at), len(sums)))
        means.append(sums[drawn].mean(1) if groups is None else sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = (float(x) for x in np.quantile(np.concatenate(means), [0.025, 0.975]))
    if groups is not None and len(sums) < 10:
        least = interval(values, resamples, seed)[1]
        low, high = min(low, least[0]), max(high, least[1])
    return float(values.mean()), [low, high]


def paired_gain(before, after, resamples=2000, seed=0):
    """Mean of after - before over the same questions and its 95 % bootstrap interval."""
    return interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), resamples, seed)


def paired_test(before, after, flips=10_000, seed=0):
    """Do two runs differ on the same N items? -> {"gain", "ci", "p", "method", "n", "better", "worse"}, p two-sided.

    Right or wrong on each item: McNemar's exact test, which asks whether the items that changed are a fair coin. Shares
    of right answers: random flips of the signs of the differences. Both assume nothing but that items are independent.
    """
    before, after = (np.asarray(x, dtype=np.float64) for x in (before, after))
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(f"paired_test: {len(before)} items against {len(after)}; give the same items, one or more")
    change = after - before
    gain, ci = interval(change, seed=seed)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    if np.isin(change, (-1, 0, 1)).all():
        n, few = better + worse, min(better, worse)
        p, method = min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2 ** n), "McNemar, exact"
    else:
        rng, seen, moved = np.random.default_rng(seed), 0, change[change != 0]
        for _ in range(flips):
            signs = rng.integers(2, size=len(moved)) * 2 - 1
            seen += abs(float(signs @ moved)) >= abs(float(moved.sum())) - 1e-12
        p, method = (seen + 1) / (flips + 1), f"sign flips, {flips}"
    return {"gain": gain, "ci": ci, "p": float(p), "method": method, "n": len(change), "better": better, "worse": worse}


def size_weighted(by_subset, sizes=None, resamples=2000, seed=0):
    """{subset: values} -> (total, [low, high]): each subset's mean weighted by its size; resampled inside subsets.

    sizes: {subset: published number of items}, for a copy that lacks some (lost images); default: those at hand, which
    is the mean over all items. An unweighted mean of subsets is another number.
    """
    weights = {name: (sizes or {}).get(name, len(values)) for name, values in by_subset.items()}
    rng, total = np.random.default_rng(seed), sum(weights.values())
    mean, draws = 0.0, np.zeros(resamples)
    for name, values in sorted(by_subset.items()):
        values, share = np.asarray(values, dtype=np.float64), weights[name] / total
        mean += share * values.mean()
        draws += share * np.array([rng.choice(values, len(values)).mean() for _ in range(resamples)])
    return float(mean), [float(x) for x in np.quantile(draws, [0.025, 0.975])]


# --- k answers to one question ----------------------------------------------------------------------------------------


def pass_at_k(right, n, k):
    """Chance that at least one of k answers, drawn from n of which `right` are right, is right (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(chosen, right):
    """chosen: option index or None (not readable) of each of k answers -> (score, share of k that agree).

    The option named most often answers; two that tie share the point, so nothing depends on an order. Answers that
    cannot be read vote for nothing, but stay in k: they make the vote less sure.
    """
    votes = collections.Counter(c for c in chosen if c is not None)
    if not votes:
        return 0.0, 0.0
    most = max(votes.values())
    winners = [c for c, n in votes.items() if n == most]
    return float(right in winners) / len(winners), most / len(chosen)


def calibration(confidence, correct, bins=10):
    """Confidence against truth -> {"ece", "brier", "bins": [{"low", "high", "n", "confidence", "accuracy"}]}.

    Bins of equal width (low, high], the first holds 0; ECE = mean gap between confidence and accuracy, weighted by n.
    """
    confidence, correct = (np.asarray(x, dtype=np.float64) for x in (confidence, correct))
    which, rows = np.clip(np.ceil(confidence * bins - 1e-9).astype(int) - 1, 0, bins - 1), []
    for b in range(bins):
        inside = which == b
        if inside.any():
            rows.append({"low": b / bins, "high": (b + 1) / bins, "n": int(inside.sum()),
                         "confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean())})
    gap = sum(r["n"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / max(1, len(confidence))
    return {"ece": gap, "brier": float(((confidence - correct) ** 2).mean()), "bins": rows}


# --- open answers -----------------------------------------------------------------------------------------------------


def plain_words(text):
    """Lower case, no punctuation, no articles (as SQuAD) -> list of words. "T-cell" is two words, in both texts."""
    return [w for w in re.findall(r"[^\W_]+", text.lower()) if w not in ("a", "an", "the")]


def token_scores(prediction, reference):
    """Overlap of words -> {"precision", "recall", "f1"}, each word counted at most as often as in the other text.

    LLaVA-Med's and Quilt-LLaVA's script counts every repetition of a matching word as another hit: "carcinoma carcinoma
    carcinoma" for "ductal carcinoma" has precision 1 and recall 3/4 there, 1/3 and 1/2 here.
    """
    said, wanted = collections.Counter(plain_words(prediction)), collections.Counter(plain_words(reference))
    hits = sum((said & wanted).values())
    if not hits:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision, recall = hits / said.total(), hits / wanted.total()
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


# --- classes ----------------------------------------------------------------------------------------------------------


def classification(y, guess, K=None):
    """(N,), (N,) class indices -> accuracy, balanced_accuracy (mean recall of the classes that occur), weighted_f1, and
    recall: one value a class, None where the class has no item."""
    y, guess = np.asarray(y), np.asarray(guess)
    K = K or int(max(y.max(), guess.max())) + 1
    table = np.zeros((K, K))                                          # rows: truth, columns: guess
    np.add.at(table, (y, guess), 1)
    hits, true, said = table.diagonal(), table.sum(1), table.sum(0)
    recall = np.divide(hits, true, out=np.zeros(K), where=true > 0)
    f1 = np.divide(2 * hits, true + said, out=np.zeros(K), where=true + said > 0)
    return {"accuracy": float(hits.sum() / len(y)), "balanced_accuracy": float(recall[true > 0].mean()),
            "weighted_f1": float((f1 * true).sum() / len(y)),
            "recall": [float(r) if t else None for r, t in zip(recall, true)]}


# --- guessers without eyes --------------------------------------------------------------------------------------------


def blind_each(train, test):
    """What guessers without eyes get on each question of `test` -> {name: (N,) array of points}.

    text_only is a naive Bayes over (word of question, word of option) pairs, fitted on the training questions `train`:
    the strongest cheap cue a text-only model could pick up.
    """
    letters = collections.Counter(r["answer"] for r in train).most_common(1)
    frequent = letters[0][0] if letters else "A"
    counts = collections.defaultdict(lambda: np.ones(2))
    words = lambda r, i: {(f"{r['question']}", w) for w in r["options"][i].lower().split()} | {("", f"at{i}")}
    for r in train:
        for i in range(len(r["options"])):
            for pair in words(r, i):
                counts[pair][int(LETTERS[i] == r["answer"])] += 1
    total = np.array([1.0, 1.0]) + sum((np.array([len(r["options"]) - 1, 1.0]) for r in train), np.zeros(2))
    guess = lambda r: LETTERS[int(np.argmax([sum(math.log(c[1] / total[1]) - math.log(c[0] / total[0]) for c in (
        counts[p] for p in words(r, i) if p in counts)) for i in range(len(r["options"]))]))]
    points = lambda f: np.array([float(f(r) == r["answer"]) for r in test])
    return {"random": np.array([1 / len(r["options"]) for r in test]),
            "most_frequent_letter": points(lambda r: frequent),
            "longest_option": points(lambda r: LETTERS[int(np.argmax([len(o) for o in r["options"]]))]),
            "text_only": points(guess)}


def blind(train, test):
    """Means of blind_each -> {"random", "most_frequent_letter", "longest_option", "text_only"}."""
    return {name: float(np.mean(points)) for name, points in blind_each(train, test).items()}


def blind_without_training(test, folds=5):
    """blind_each for a benchmark that has no training questions: the letter is the most frequent one of the benchmark
    itself (as its official tables do), text_only learns from the other folds. Folds by group, else by id."""
    fold = np.array([zlib.crc32(str(r.get("group") or r["id"]).encode()) % folds for r in test])
    out = blind_each(test, test)
    for f in range(folds):
        inside = (fold == f).nonzero()[0]
        if len(inside):
            rest = [r for r, g in zip(test, fold) if g != f]
            out["text_only"][inside] = blind_each(rest, [test[i] for i in inside])["text_only"]
    return out
