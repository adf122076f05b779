"""Zero-shot, retrieval, probe against brute force, closed forms and scikit-learn; train_clip's resume; real tiles."""
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
from nanopatho import presets
from nanopatho.clip import CLIP
from nanopatho.data import DataError

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


def test_auc_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y, score = rng.integers(2, size=200), rng.integers(0, 12, 200).astype(float)       # ties
    assert ev.auc(torch.tensor(score), torch.tensor(y) == 1) == pytest.approx(metrics.roc_auc_score(y, score))
    three = rng.dirichlet([1, 1, 1], 60)
    y = rng.integers(3, size=60)
    want = metrics.roc_auc_score(y, three, multi_class="ovr")
    assert ev.mean_auc(torch.tensor(three), torch.tensor(y)) == pytest.approx(want)
    assert math.isnan(ev.mean_auc(torch.tensor(three), torch.zeros(60, dtype=torch.long)))


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
    weight, bias = ev.probe_fit(torch.tensor(x), torch.tensor(y), C, balanced=balanced)
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
    weight, bias = (p.clone().requires_grad_() for p in ev.probe_fit(x, y, 0.5))   # 1 / 2C = 1
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
    scores, chosen = ev.leave_one_group_out(candidates, y, groups)
    assert set(chosen.values()) == {"true"} and float((scores.argmax(1) == y).double().mean()) > 0.7
    torch.testing.assert_close(scores.sum(1), torch.ones(90, dtype=torch.float64))
    other = y.clone()
    other[groups == "b"] = 1 - other[groups == "b"]
    again, _ = ev.leave_one_group_out(candidates, other, groups)
    assert torch.equal(again[groups == "b"], scores[groups == "b"])
    by_hand = ev.probe_scores(true[groups != "b"], y[groups != "b"], true[groups == "b"], 1.0, balanced=True)
    assert torch.equal(scores[groups == "b"], by_hand)
    with pytest.raises(ValueError, match="needs 3 groups"):
        ev.leave_one_group_out(candidates, y, ["a"] * 90)


def test_full_retrieval_against_brute_force_with_doubles():
    g = torch.Generator().manual_seed(4)
    image = torch.randn(40, 6, generator=g)
    text = image + 1.5 * torch.randn(40, 6, generator=g)
    captions, pictures = [f"c{i % 33}" for i in range(40)], [f"p{i // 2}" if i < 6 else f"p{i}" for i in range(40)]
    text[33:] = text[:7]                                              # one caption, one vector
    got = ev.full_retrieval(image, text, captions, pictures, ks=(1, 5), rows=16)
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
    got = ev.image_retrieval(x, y, groups, ks=(1, 5))
    unit, hits, votes = torch.nn.functional.normalize(x, dim=1).numpy(), {1: [], 5: []}, []
    for i in range(60):
        order = sorted((j for j in range(60) if groups[j] != groups[i]), key=lambda j: -unit[i] @ unit[j])
        for k in hits:
            hits[k].append(any(y[j] == y[i] for j in order[:k]))
        votes.append(sum(int(y[j] == y[i]) for j in order[:5]) >= 3)
    assert got == pytest.approx({"r1": np.mean(hits[1]), "r5": np.mean(hits[5]), "majority5": np.mean(votes)})
    assert ev.image_retrieval(x, y)["r1"] > got["r1"] + 0.3           # with the own slide allowed it finds neighbours


def blobs(n=240, groups=6, shift=0.0, seed=0):
    """Features of three classes; each group adds a place of its own (shift), as slides do."""
    rng = np.random.default_rng(seed)
    y, which = rng.integers(3, size=n), rng.integers(groups, size=n)
    x = rng.normal(size=(n, 8)) + 1.2 * np.eye(8)[y] + shift * rng.normal(size=(groups, 8))[which]
    return torch.tensor(x), torch.tensor(y), [f"g{w}" for w in which]


def test_few_shot_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, groups = blobs()
    got = ev.few_shot(x, y, groups, shots=(2, 8), subsets=3)
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
                w, b = ev.probe_fit(x[inside], y[inside], 1.0, 3)
                np.testing.assert_allclose((x[judged] @ w.T + b).softmax(1), fit.predict_proba(x[judged]), atol=1e-6)
            found.append(float((guess == y.numpy()).mean()))
        assert got[str(n)]["accuracy"] == pytest.approx(np.mean(found))
        assert got[str(n)]["std"] == pytest.approx(np.std(found))
    assert got["8"]["subsets"] == 3 and got["all"]["accuracy"] > got["2"]["accuracy"]


def test_few_shot_traps_leak_and_failed_subsets():
    x, y, groups = blobs(shift=4.0)
    # a slide has mostly one class
    y = torch.tensor([int(g[1]) % 3 if i % 10 else int(y[i]) for i, g in enumerate(groups)])
    leaking, grouped = (ev.few_shot(x, y, g, shots=(8,), subsets=2) for g in (None, groups))
    assert "WARNING" in leaking["split"] and "6 groups" in grouped["split"]
    assert leaking["all"]["accuracy"] > grouped["all"]["accuracy"] + 0.3
    scarce = ev.few_shot(x, torch.where(torch.arange(240) < 6, 3, y), groups, shots=(2, 128), subsets=2)
    assert "only" in scarce["128"]["impossible"] and "accuracy" not in scarce["128"]    # told, not left out
    train = ev.few_shot(x[:40], y[:40], train=(x[40:], y[40:]), shots=(2,), subsets=2)
    assert train["split"] == "the training part that was given" and 0 < train["2"]["accuracy"] <= 1


def test_crop_comes_after_the_resize():
    """PLIP's preparation cuts with coordinates of the picture before it was resized: off centre, or beyond the edge."""
    from nanopatho.image import clip_pixels
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255                                         # the middle third is white
    assert float(clip_pixels([picture], 50).amin()) > 1.5             # 100 x 300 -> 50 x 150 -> its middle 50


# --- on files ---------------------------------------------------------------------------------------------------------
LEXICON = {"H&E": {"material": {"fat": ["fat"], "mucin": ["mucin pools"], "!fat": ["no fat"]},
                   "mitoses": {"absent": ["no mitoses"], "frequent": ["frequent mitoses"]}}}


def write_world(folder, n=24):
    """A data folder of coloured noise: what is in the pictures does not matter here."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    captions, test = [], []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
        facts = {"material": ("fat", "mucin")[i % 2], "mitoses": ("absent", "frequent")[i // 2 % 2],
                 "tissue": ("fat", "mucin pools")[i % 2]}
        said = ", ".join(LEXICON["H&E"][a][facts[a]][0] for a in LEXICON["H&E"])
        base = {"id": f"r{i}", "image": f"images/{i}.png", "subfield": "H&E", "facts": facts}
        captions.append({**base, "caption": f"H&E, skin: {said}. This is case {i}.", "morphology": said})
        test.append({**base, "question": "Which?", "options": ["a", "b"], "answer": "A"})
    for name, rows in (("captions", captions), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "lexicon.json").write_text(json.dumps(LEXICON))
    return folder


def arguments(data, out, **more):
    more = dict(preset="smoke", data=data, out=out, batch_size=8, steps_morphology=3, steps_all=3, save_every=2,
                threads=1, partial=0.5, warmup=2, optimizer="muon", stain=0.2, **more)
    return [x for name, value in more.items() for x in (f"--{name}", str(value))]


def test_resume_is_bitwise(tmp_path, monkeypatch):
    """6 steps == 5 steps and a kill (the checkpoint keeps 4), then the rest; step 2 begins with the fourth."""
    data = write_world(tmp_path / "data")
    trained = []                                                      # one tokenizer for both: the weights are compared
    make = train_clip.clip_tokenizer
    monkeypatch.setattr(train_clip, "clip_tokenizer",
                        lambda *a: trained[0] if trained else trained.append(make(*a)) or trained[0])
    train_clip.main(arguments(data, tmp_path / "whole"))
    train_step = train_clip.Run.step

    def killed(self, number, **numbers):
        train_step(self, number, **numbers)
        if number == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_clip.Run, "step", killed)
        train_clip.main(arguments(data, tmp_path / "broken"))
    trained[:] = [None]                                               # a resumed run reads the one it saved
    train_clip.main(arguments(data, tmp_path / "broken"))
    one, two = (CLIP.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken")]
    assert all(row.pop("time") >= 0 for rows in lines for row in rows)
    assert lines[0] == lines[1] and [row["phase"] for row in lines[0]] == [1, 1, 1, 2, 2, 2]
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["zero_shot_accuracy_n"] == 24 and results["pool"] == 4       # four distinct findings texts
    assert set(results["i2t"]) == {"r1", "r5", "r10"} and len(results["recall_at_1_ci"]) == 2
    again = tmp_path / "again"                                        # its own output is a start for a next run
    train_clip.main(arguments(data, again, init=tmp_path / "whole", eval_items=0))
    assert json.loads((again / "results.json").read_text()).keys() == {"seconds"}


def test_texts_and_what_else_is_true():
    assert train_clip.phrases("Fat, no mitoses. This fits: adenoma.") == ["Fat", "no mitoses", "This fits", "adenoma"]
    rng = np.random.default_rng(0)
    text = "a b, c, d e, f"
    cut = {train_clip.shorten(text, rng) for _ in range(500)}
    assert text in cut and "c" in cut and "" not in cut
    assert all([p for p in train_clip.phrases(text) if p in t.split(", ")] == t.split(", ") for t in cut)   # in order
    rows = [{"caption": "H&E: fat, no mitoses.", "morphology": "fat, no mitoses"},
            {"caption": "x", "morphology": "fat"}, {"caption": "IHC: no fat.", "morphology": "no fat"}]
    texts, also = train_clip.draw_texts(rows, False, 0.0, rng)
    assert texts == ["fat, no mitoses", "fat", "no fat"]              # "fat" fits picture 0, not the other way round
    assert also.tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    both = {t for _ in range(50) for t in train_clip.draw_texts(rows, True, 0.0, rng)[0]}
    assert both == {r[name] for r in rows for name in ("caption", "morphology")}


def test_bad_input_is_named(tmp_path):
    data = write_world(tmp_path / "data")
    rows = [json.loads(line) for line in open(data / "captions.jsonl")]
    (data / "captions.jsonl").write_text("".join(json.dumps({k: v for k, v in r.items() if k != "morphology"}) + "\n"
                                                 for r in rows))
    with pytest.raises(DataError, match="steps_morphology 0"):
        train_clip.main(arguments(data, tmp_path / "out"))
    with pytest.raises(ValueError, match="CLASSNAME"):
        (data / "zero_shot.json").write_text('{"0": {"classnames": {"fat": ["fat"]}, "templates": ["no mark"]}}')
        ev.read_prompts(data / "zero_shot.json")
    with pytest.raises(ValueError, match="r9.*add a caption"):
        ev.text_of({"id": "r9", "subfield": "H&E", "facts": {}}, LEXICON)
    assert ev.text_of({"subfield": "H&E", "facts": {"material": "fat", "mitoses": "frequent"}}, LEXICON) == \
        "fat, frequent mitoses"
    with pytest.raises(ValueError, match="two or more classes"):
        ev.real_tissue_probe(None, tmp_path)


def test_prompt_file_decides_the_classes(tmp_path):
    data = write_world(tmp_path / "data")
    prompts = {"0": {"classnames": {"fat": ["fat", "fat cells"], "mucin pools": ["mucin"], "bone": ["bone"]},
                     "templates": ["CLASSNAME", "I see CLASSNAME."]}}
    (data / "zero_shot.json").write_text(json.dumps(prompts))
    torch.manual_seed(0)
    model = CLIP(presets.CLIP["smoke"]).eval()
    tokenizer = train_clip.clip_tokenizer(["fat cells", "mucin pools", "I see bone."], 1024)
    names, vectors = ev.class_features(model, tokenizer, ev.read_prompts(data / "zero_shot.json"))
    assert names == ["fat", "mucin pools", "bone"]
    ev.text_features(model, tokenizer, ["!!!! ! !!", "!"])            # "!" has the id of padding: not cut off
    with torch.no_grad():
        texts = ["fat", "I see fat.", "fat cells", "I see fat cells."]
        f = model.encode_text(train_clip.clip_ids(tokenizer, texts, 48))
    mean = (f / f.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(vectors[0], mean / mean.norm(), atol=1e-6, rtol=0)
    assert ev.evaluate_pool(model, tokenizer, data)["zero_shot_accuracy"]["n"] == 24


def test_real_tissue_probe_on_made_tiles(tmp_path):
    """Brightness differs by class, hue by region: a probe must find the first in a region it has never seen."""
    rng = np.random.default_rng(0)
    for i in range(36):
        region, kind = i % 3, i // 3 % 2
        tile = rng.normal(90 + 60 * kind, 20, (40, 40, 3)) + 25 * np.eye(3)[region]
        folder = tmp_path / ("dark", "light")[kind]
        folder.mkdir(exist_ok=True)
        Image.fromarray(tile.clip(0, 255).astype(np.uint8)).save(folder / f"roi{region}_{i}.png")
    torch.manual_seed(0)
    out = ev.real_tissue_probe(CLIP(presets.CLIP["smoke"]), tmp_path)
    assert out["classes"] == ["dark", "light"] and out["majority"]["value"] == 0.5
    assert out["tower"]["value"] > 0.9 and out["colour"]["value"] > 0.9
    assert set(out["tower"]["by_region"]) == {"roi0", "roi1", "roi2"} and out["tower"]["auc"] > 0.95


def test_real_tiles():
    """The numbers a tower is compared with; a trained tower's own number is in the README (it needs a run)."""
    folder = Path(os.environ.get("NANOPATHO_SHARED", ROOT.parent / "shared")) / "data" / "bcss"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the real H&E tiles are not part of the repository (set NANOPATHO_SHARED)")
    torch.manual_seed(0)
    out = ev.real_tissue_probe(CLIP(presets.CLIP["smoke"]), folder)
    assert out["classes"] == ["non_tumor", "tumor"] and out["majority"]["n"] == 218
    assert out["majority"]["value"] == pytest.approx(118 / 218)
    assert 0.5 < out["colour"]["value"] < 0.65 and out["tower"]["n"] == 218


def test_protocol_on_the_real_tiles(tmp_path, capsys):
    """All of Patho-CLIP's protocol on tiles of three regions; numbers of a random tower, so only what holds for any."""
    folder = Path(os.environ.get("NANOPATHO_SHARED", ROOT.parent / "shared")) / "data" / "bcss"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the real H&E tiles are not part of the repository (set NANOPATHO_SHARED)")
    torch.manual_seed(0)
    CLIP(presets.CLIP["smoke"]).save_pretrained(tmp_path / "clip")
    train_clip.clip_tokenizer(["tumor tissue, other tissue"], 1024).save(str(tmp_path / "clip" / "tokenizer.json"))
    prompts = {"0": {"classnames": {"tumor": ["tumor", "carcinoma"], "non_tumor": ["stroma"], "bone": ["bone"]},
                     "templates": ["CLASSNAME", "CLASSNAME tissue"]}}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    call = ["--model", str(tmp_path / "clip"), "--protocol", str(folder), "--subsets", "2", "--labels",
            "non_tumor=other tissue"]
    ev.main([*call, "--prompts", str(tmp_path / "prompts.json"), "--out", str(tmp_path)])
    out = json.loads((tmp_path / "clip.json").read_text())["protocol"]
    assert out["groups"] == ["roi1008", "roi1015", "roi1019"] and out["n"] == 218 and out["majority"] == 118 / 218
    assert set(out["zero_shot"]) == {"file", "quiltnet", "plip", "pathgen", "ours"}
    assert out["zero_shot"]["file"]["recall"]["bone"] is None
    for numbers in out["zero_shot"].values():
        assert numbers["accuracy_ci"][0] <= numbers["accuracy"] <= numbers["accuracy_ci"][1]
    few = out["few_shot"]
    assert "3 groups" in few["split"] and "impossible" in few["128"] and few["16"]["subsets"] == 2
    assert out["pictures_with_own_group"]["r1"] > out["pictures"]["r1"]            # neighbours find each other
    prompts["0"]["classnames"].pop("tumor")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(DataError, match="prompts.json: has no class tumor"):
        ev.main([*call, "--prompts", str(tmp_path / "prompts.json")])


def test_restain_scales_optical_density():
    picture = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    out = train_clip.restain(picture, 0.5, np.random.default_rng(3))
    scale = np.exp(np.random.default_rng(3).uniform(-0.5, 0.5, 3))
    want = 255 * np.exp(scale * np.log(np.maximum(picture, 1e-9) / 255))
    assert out.dtype == np.uint8 and np.abs(out - want).max() <= 0.51
    assert (train_clip.restain(np.full((2, 2, 3), 255, np.uint8), 0.5, np.random.default_rng(0)) == 255).all()  # no dye
