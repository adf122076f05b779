"""The towers on files: train_clip's resume and texts, prompt files, probes and the whole protocol on real tiles."""
import json
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
