"""Zero-shot, retrieval and probe against brute force, closed forms and scikit-learn; train_clip's resume; real tiles."""
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_clip
from nanopatho import evaluate_clip as ev
from nanopatho.clip import CLIP

ROOT = Path(__file__).resolve().parents[1]


def test_wilson_against_its_definition():
    """The interval's ends are the p at which the observed share is exactly z standard errors away."""
    for correct, n in ((9, 10), (1, 7), (50, 100)):
        w = ev.wilson(correct, n)
        assert w["value"] == correct / n and w["n"] == n
        for end in (w["low"], w["high"]):
            assert abs(correct / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert ev.wilson(0, 5)["low"] == 0 and ev.wilson(5, 5)["high"] == 1
    with pytest.raises(ValueError, match="no items"):
        ev.wilson(0, 0)


def test_ranks_against_brute_force_and_ties():
    g = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 6, (40, 40), generator=g).float()  # many ties
    want = []
    for i, row in enumerate(similarity.tolist()):
        want.append(sum(1 for j, s in enumerate(row) if j != i and s >= row[i]))
    assert ev.ranks(similarity).tolist() == want
    assert ev.ranks(torch.zeros(5, 5)).tolist() == [4] * 5            # a collapsed model finds nothing


def test_pools_are_disjoint_and_without_twins():
    captions = [f"c{i % 37}" for i in range(200)]
    pools = ev.pools_of(captions, 20, seed=3)
    flat = [i for p in pools for i in p]
    assert len(flat) == len(set(flat)) and len(pools) >= 8
    for p in pools:
        assert len({captions[i] for i in p}) == len(p) == 20
    small = ev.pools_of(captions, 100)
    assert len(small) == 1 and len(small[0]) == 37                    # fewer texts than places


def test_retrieval_against_brute_force():
    g = torch.Generator().manual_seed(1)
    image = torch.randn(60, 8, generator=g)
    text = image + 1.2 * torch.randn(60, 8, generator=g)
    captions = [f"c{i}" for i in range(60)]
    out = ev.retrieval(image, text, captions, pool=30, ks=(1, 5), seed=0)
    pools = ev.pools_of(captions, 30, 0)
    assert out["pool"] == 30 and out["pools"] == 2
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
    assert ev.retrieval(image, image, captions, pool=30)["i2t"]["r1"] == 1


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
    assert ev.zero_shot(images, ev.ensemble(prompts)).tolist() == want
    assert ev.zero_shot(images * 7, ev.ensemble(prompts)).tolist() == want


@pytest.mark.parametrize("classes,C", [(2, 1.0), (2, 0.01), (4, 0.3)])
def test_probe_equals_scikit_learn(classes, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 7)), rng.integers(classes, size=120)
    x[:, 0] += y
    reference = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=10000)
    if classes == 2:                                                  # its binary form has one weight row and half the penalty
        reference.set_params(C=C * 2)
    reference.fit(x, y)
    weight, bias = ev.probe_fit(torch.tensor(x), torch.tensor(y), C)
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
    weight, bias = (p.clone().requires_grad_() for p in ev.probe_fit(x, y, 0.5))
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="sum") + weight.square().sum() / (2 * 0.5)
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
    guess, chosen = ev.leave_one_group_out(candidates, y, groups)
    assert set(chosen.values()) == {"true"} and float((guess == y).double().mean()) > 0.8
    other = y.clone()
    other[groups == "b"] = 1 - other[groups == "b"]
    again, _ = ev.leave_one_group_out({"true": (true, 1.0)}, other, groups)
    once, _ = ev.leave_one_group_out({"true": (true, 1.0)}, y, groups)
    assert torch.equal(again[groups == "b"], once[groups == "b"])
    by_hand = ev.probe_predict(true[groups != "b"], y[groups != "b"], true[groups == "b"], 1.0)
    assert torch.equal(once[groups == "b"], by_hand)
    with pytest.raises(ValueError, match="two groups"):
        ev.leave_one_group_out(candidates, y, ["a"] * 90)
