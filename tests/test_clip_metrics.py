"""Wilson, ranks, retrieval, zero-shot, AUC, probes and few-shot against brute force, closed forms and scikit-learn."""
import math

import numpy as np
import pytest
import torch

from nanopatho import clip_metrics as cm


def test_wilson_against_its_definition():
    """The interval's ends are the p at which the observed share is exactly z standard errors away."""
    for correct, n in ((9, 10), (1, 7), (50, 100)):
        w = cm.wilson(correct, n)
        assert w["value"] == correct / n and w["n"] == n
        for end in (w["low"], w["high"]):
            assert abs(correct / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert cm.wilson(0, 5)["low"] == 0 and cm.wilson(5, 5)["high"] == 1
    with pytest.raises(ValueError, match="no items"):
        cm.wilson(0, 0)


def test_ranks_against_brute_force_and_ties():
    g = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 6, (40, 40), generator=g).float()  # many ties
    want = []
    for i, row in enumerate(similarity.tolist()):
        want.append(sum(1 for j, s in enumerate(row) if j != i and s >= row[i]))
    assert cm.ranks(similarity).tolist() == want
    assert cm.ranks(torch.zeros(5, 5)).tolist() == [4] * 5            # a collapsed model finds nothing


def test_pools_are_disjoint_and_without_twins():
    captions = [f"c{i % 37}" for i in range(200)]
    pools = cm.pools_of(captions, 20, seed=3)
    flat = [i for p in pools for i in p]
    assert len(flat) == len(set(flat)) and len(pools) >= 8
    for p in pools:
        assert len({captions[i] for i in p}) == len(p) == 20
    small = cm.pools_of(captions, 100)
    assert len(small) == 1 and len(small[0]) == 37                    # fewer texts than places


def test_retrieval_against_brute_force():
    g = torch.Generator().manual_seed(1)
    image = torch.randn(60, 8, generator=g)
    text = image + 1.2 * torch.randn(60, 8, generator=g)
    captions = [f"c{i}" for i in range(60)]
    out = cm.retrieval(image, text, captions, pool=30, ks=(1, 5), seed=0)
    pools = cm.pools_of(captions, 30, 0)
    assert out["pool"] == 30 and out["n_pools"] == 2
    for name, (query, key) in {"i2t": (image, text), "t2i": (text, image)}.items():
        for k in (1, 5):
            hits = []
            for pool in pools:
                for i in pool:
                    cosine = {j: float(torch.cosine_similarity(query[i], key[j], dim=0)) for j in pool}
                    hits.append(i in sorted(pool, key=lambda j: -cosine[j])[:k])
            assert out[name][f"r{k}"] == pytest.approx(np.mean(hits))
    assert out["i2t"] != out["t2i"]                                   # the directions are not the same thing
    assert out["recall_at_1"]["value"] == pytest.approx(min(out["i2t"]["r1"], out["t2i"]["r1"]))
    assert cm.retrieval(image, image, captions, pool=30)["i2t"]["r1"] == 1


def test_zero_shot_against_brute_force():
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randn(n, 6, generator=g, dtype=torch.float64) * 5 for n in (3, 1, 4)]
    images = torch.randn(50, 6, generator=g, dtype=torch.float64)
    want = []
    for image in images.numpy():
        scores = []
        for group in prompts:
            mean = np.mean([p / np.linalg.norm(p) for p in group.numpy()], axis=0)
            scores.append(image @ mean / np.linalg.norm(mean) / np.linalg.norm(image))
        want.append(int(np.argmax(scores)))
    assert cm.zero_shot(images, cm.ensemble(prompts)).tolist() == want
    assert cm.zero_shot(images * 7, cm.ensemble(prompts)).tolist() == want


def test_auc_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y, score = rng.integers(2, size=200), rng.integers(0, 12, 200).astype(float)       # ties
    assert cm.auc(torch.tensor(score), torch.tensor(y) == 1) == pytest.approx(metrics.roc_auc_score(y, score))
    three = rng.dirichlet([1, 1, 1], 60)
    y = rng.integers(3, size=60)
    want = metrics.roc_auc_score(y, three, multi_class="ovr")
    assert cm.mean_auc(torch.tensor(three), torch.tensor(y)) == pytest.approx(want)
    assert math.isnan(cm.mean_auc(torch.tensor(three), torch.zeros(60, dtype=torch.long)))


@pytest.mark.parametrize("classes,C,balanced", [(2, 1.0, False), (2, 0.01, True), (4, 0.3, False), (4, 0.3, True)])
def test_probe_equals_scikit_learn(classes, C, balanced):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 7)), np.minimum(rng.integers(classes + 2, size=120), classes - 1)     # unequal shares
    x[:, 0] += y
    reference = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=10000,
                                                class_weight="balanced" if balanced else None)
    if classes == 2:                                                  # its binary form: one weight row, half the price
        reference.set_params(C=C * 2)
    reference.fit(x, y)
    weight, bias = cm.probe_fit(torch.tensor(x), torch.tensor(y), C, balanced=balanced)
    if classes == 2:
        got, b = weight[1] - weight[0], bias[1] - bias[0]
        np.testing.assert_allclose(got, reference.coef_[0], atol=2e-5)
        np.testing.assert_allclose(b, reference.intercept_[0], atol=2e-5)
    else:
        np.testing.assert_allclose(weight, reference.coef_, atol=2e-5)
        np.testing.assert_allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-5)


def test_probe_is_at_the_minimum_of_its_objective():
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(80, 5, generator=g, dtype=torch.float64), torch.randint(3, (80,), generator=g)
    weight, bias = (p.clone().requires_grad_() for p in cm.probe_fit(x, y, 0.5))   # 1 / 2C = 1
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="sum") + weight.square().sum()
    for grad in torch.autograd.grad(loss, (weight, bias)):
        assert grad.abs().max() < 1e-4


def test_leave_one_group_out_never_trains_on_the_group():
    """The labels of the left-out group must not matter to its predictions."""
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c"], 30)
    y = torch.tensor(rng.integers(2, size=90))
    true = torch.tensor(rng.normal(size=(90, 3))) + y[:, None]
    noise = torch.tensor(rng.normal(size=(90, 3)))
    candidates = {"noise": (noise, 1.0), "true": (true, 1.0)}
    scores, chosen = cm.leave_one_group_out(candidates, y, groups)
    assert set(chosen.values()) == {"true"} and float((scores.argmax(1) == y).double().mean()) > 0.7
    torch.testing.assert_close(scores.sum(1), torch.ones(90, dtype=torch.float64))
    other = y.clone()
    other[groups == "b"] = 1 - other[groups == "b"]
    again, _ = cm.leave_one_group_out(candidates, other, groups)
    assert torch.equal(again[groups == "b"], scores[groups == "b"])
    by_hand = cm.probe_scores(true[groups != "b"], y[groups != "b"], true[groups == "b"], 1.0, balanced=True)
    assert torch.equal(scores[groups == "b"], by_hand)
    with pytest.raises(ValueError, match="needs 3 groups"):
        cm.leave_one_group_out(candidates, y, ["a"] * 90)


def test_full_retrieval_against_brute_force_with_doubles():
    g = torch.Generator().manual_seed(4)
    image = torch.randn(40, 6, generator=g)
    text = image + 1.5 * torch.randn(40, 6, generator=g)
    captions, pictures = [f"c{i % 33}" for i in range(40)], [f"p{i // 2}" if i < 6 else f"p{i}" for i in range(40)]
    text[33:] = text[:7]                                              # one caption, one vector
    got = cm.full_retrieval(image, text, captions, pictures, ks=(1, 5), rows=16)
    assert got["n"] == 40 and got["duplicates"] == 14                 # seven captions stand twice
    for name, (query, key) in {"i2t": (image, text), "t2i": (text, image)}.items():
        for k in (1, 5):
            hits, own = [], []
            for i in range(40):
                cosine = [float(torch.cosine_similarity(query[i], key[j], dim=0)) for j in range(40)]
                good = [j for j in range(40) if captions[j] == captions[i] or pictures[j] == pictures[i]]
                best = max(cosine[j] for j in good)
                hits.append(sum(c >= best - 1e-7 for j, c in enumerate(cosine) if j not in good) < k)
                own.append(sum(c >= cosine[i] - 1e-7 for j, c in enumerate(cosine) if j != i) < k)
            assert got[name][f"r{k}"] == pytest.approx(np.mean(hits))
            assert got[name][f"r{k}_own"] == pytest.approx(np.mean(own))
    # the trap of the published script: doubles are misses, and one direction stands for both
    assert got["i2t"]["r1_own"] < got["i2t"]["r1"] and got["i2t"] != got["t2i"]


def test_image_retrieval_against_brute_force_and_the_leak():
    rng = np.random.default_rng(0)
    groups = [f"g{i // 10}" for i in range(60)]
    y = torch.tensor([i // 10 % 2 for i in range(60)])
    x = torch.tensor(rng.normal(size=(60, 5)) + 6 * np.repeat(rng.normal(size=(6, 5)), 10, 0))   # as slides do
    got = cm.image_retrieval(x, y, groups, ks=(1, 5))
    unit, hits, votes = torch.nn.functional.normalize(x, dim=1).numpy(), {1: [], 5: []}, []
    for i in range(60):
        order = sorted((j for j in range(60) if groups[j] != groups[i]), key=lambda j: -unit[i] @ unit[j])
        for k in hits:
            hits[k].append(any(y[j] == y[i] for j in order[:k]))
        votes.append(sum(int(y[j] == y[i]) for j in order[:5]) >= 3)
    assert got == pytest.approx({"r1": np.mean(hits[1]), "r5": np.mean(hits[5]), "majority5": np.mean(votes)})
    assert cm.image_retrieval(x, y)["r1"] > got["r1"] + 0.3           # with the own slide allowed it finds neighbours


def blobs(n=240, groups=6, shift=0.0, seed=0):
    """Features of three classes; each group adds a place of its own (shift), as slides do."""
    rng = np.random.default_rng(seed)
    y, which = rng.integers(3, size=n), rng.integers(groups, size=n)
    x = rng.normal(size=(n, 8)) + 1.2 * np.eye(8)[y] + shift * rng.normal(size=(groups, 8))[which]
    return torch.tensor(x), torch.tensor(y), [f"g{w}" for w in which]


def test_few_shot_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, groups = blobs()
    got = cm.few_shot(x, y, groups, shots=(2, 8), subsets=3)
    for n in (2, 8, "all"):
        found = []
        for s in range(3 if n != "all" else 1):
            rng, guess = np.random.default_rng(42 + s), np.empty(240, int)
            for g in sorted(set(groups)):
                inside, judged = (np.array(groups) != g).nonzero()[0], (np.array(groups) == g).nonzero()[0]
                if n != "all":
                    inside = np.concatenate([inside[y[inside] == k][rng.choice(int((y[inside] == k).sum()), n, False)]
                                             for k in range(3)])
                fit = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(x[inside], y[inside])
                guess[judged] = fit.predict(x[judged])
                w, b = cm.probe_fit(x[inside], y[inside], 1.0, 3)
                np.testing.assert_allclose((x[judged] @ w.T + b).softmax(1), fit.predict_proba(x[judged]), atol=1e-6)
            found.append(float((guess == y.numpy()).mean()))
        assert got[str(n)]["accuracy"] == pytest.approx(np.mean(found))
        assert got[str(n)]["std"] == pytest.approx(np.std(found))
    assert got["8"]["subsets"] == 3 and got["all"]["accuracy"] > got["2"]["accuracy"]


def test_few_shot_traps_leak_and_failed_subsets():
    x, y, groups = blobs(shift=4.0)
    # a slide has mostly one class
    y = torch.tensor([int(g[1]) % 3 if i % 10 else int(y[i]) for i, g in enumerate(groups)])
    leaking, grouped = (cm.few_shot(x, y, g, shots=(8,), subsets=2) for g in (None, groups))
    assert "WARNING" in leaking["split"] and "6 groups" in grouped["split"]
    assert leaking["all"]["accuracy"] > grouped["all"]["accuracy"] + 0.3
    scarce = cm.few_shot(x, torch.where(torch.arange(240) < 6, 3, y), groups, shots=(2, 128), subsets=2)
    assert "only" in scarce["128"]["impossible"] and "accuracy" not in scarce["128"]    # told, not left out
    train = cm.few_shot(x[:40], y[:40], train=(x[40:], y[40:]), shots=(2,), subsets=2)
    assert train["split"] == "the training part that was given" and 0 < train["2"]["accuracy"] <= 1
