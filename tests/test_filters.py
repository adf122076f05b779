"""data_prep/filters.py, copies.py: each gate on cases made for it; planted copies and contamination, counted at last."""

import io
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import copies, filters, records
from nanopatho.data import DataError

SHARED = Path(os.environ.get("NANOPATHO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
real = pytest.mark.skipif(not SHARED.is_dir(),
                          reason=f"no real samples at {SHARED}: set NANOPATHO_SHARED to their root")
WORDS = ("tumour glands stroma nuclei atypia mitoses necrosis lymphocytes epithelium invasion margin lesion cells "
         "pattern of in and with marked focal dense irregular small large duct lobule "
         "collagen muscle vessel oedema fat nerve mucin").split()


def tissue(seed, side=112):
    """A picture with the colours and the frequencies of a section, from random fields: no two seeds are alike."""
    rng = np.random.default_rng(seed)
    field = lambda n: np.asarray(Image.fromarray(rng.random((n, n), np.float32)).resize((side, side),
                                                                                        Image.Resampling.BICUBIC))
    layout, middle, fine = field(int(rng.integers(3, 9))), field(int(rng.integers(12, 24))), field(40)
    h = 0.1 + 1.3 * np.clip((fine + 0.35 * layout - 0.75) * 6, 0, 1)
    e = 0.2 + 0.5 * layout + 0.25 * middle
    od = h[..., None] * [.62, .68, .32] + e[..., None] * [.22, .90, .38]
    return Image.fromarray(np.clip(243 * np.exp(-od) + rng.normal(0, 2, (side, side, 1)), 0, 255).astype(np.uint8))


def edited(image, rng):
    """Cropped to 78-100 % a side, resized to another shape, one of the 8 symmetries, JPEG 30-95."""
    w, h = image.size
    size = rng.uniform(0.78, 1, 2) * (w, h)
    at = rng.uniform(0, 1, 2) * ((w, h) - size)
    image = image.crop((*at.astype(int), *(at + size).astype(int)))
    image = image.resize([int(s * rng.uniform(1.15, 1.5)) for s in image.size], Image.Resampling.BICUBIC)
    k, data = int(rng.integers(8)), io.BytesIO()
    array = np.rot90(np.asarray(image), k % 4)
    Image.fromarray(np.ascontiguousarray(array[:, ::-1] if k >= 4 else array)).save(data, "JPEG",
                                                                                    quality=int(rng.integers(30, 95)))
    return Image.open(data).convert("RGB")


def caption(seed, n=20):
    rng = random.Random(seed)
    return "Section with " + " ".join(rng.choices(WORDS, k=rng.randint(12, n + 20))) + "."


def reworded(text, rng):
    """Other case and punctuation, a figure number before it, and one word in twenty exchanged."""
    words = text.split()
    for _ in range(1 + len(words) // 20):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return f"Figure {rng.randrange(9)}: " + ", ".join(words).upper()


# --- the gates of one record ------------------------------------------------------------------------------------------


def test_tissue_and_what_is_none():
    chart = Image.new("RGB", (300, 200), "white")
    for i, colour in enumerate(((200, 60, 120), (90, 60, 160), (230, 120, 170))):
        chart.paste(colour, (20 + 90 * i, 30 + 20 * i, 90 + 90 * i, 190))
    data = io.BytesIO()
    chart.save(data, "JPEG", quality=85)
    grey = Image.fromarray(np.random.default_rng(0).integers(40, 220, (150, 150), dtype=np.uint8)).convert("RGB")
    leaf = Image.fromarray(np.asarray(tissue(0))[..., [1, 0, 1]])          # green
    for name, image, words in (("chart", chart, "flat"), ("chart as JPEG", Image.open(data).convert("RGB"), "flat"),
                               ("gel", grey, "grey"), ("grey section", tissue(1).convert("L").convert("RGB"), "grey"),
                               ("blank", Image.new("RGB", (100, 100), (243, 240, 243)), "flat"),
                               ("leaf", leaf, "0.0 %"),
                               ("black", Image.fromarray(np.asarray(grey) // 12), "dark")):
        assert words in (filters.tissue_problem(filters.look(image)) or "none"), name
    assert all(filters.tissue_problem(filters.look(tissue(seed))) is None for seed in range(20))
    spots = np.random.default_rng(1).integers(0, 12, (120, 120, 3), dtype=np.uint8)
    spots[40:60, 40:60] = 20, 40, 200
    spots[48:52, 48:52] = 230, 30, 40
    seen = filters.look(Image.fromarray(spots))
    assert filters.tissue_problem(seen) is None and filters.subfield_of(seen, "cells") == "FISH"


@real
def test_real_tiles_pass():
    for path in [*sorted((SHARED / "bcss").glob("*/*"))[::10], *sorted((SHARED / "stain").glob("*.png"))]:
        seen = filters.look(Image.open(path).convert("RGB"))
        assert filters.tissue_problem(seen) is None, path
        assert filters.subfield_of(seen, "a section") == ("IHC" if "ihc" in path.name else "H&E"), path


def test_subfield_by_words_then_colour():
    plain, brown = {"dark": 0, "brown": 0}, {"dark": 0, "brown": 0.5}
    for text, seen, kind in (("Ki-67 immunohistochemistry", plain, "IHC"), ("H&E and Ki-67 stain", brown, "IHC"),
                             ("H&E and Ki-67 stain", plain, "H&E"), ("fine-needle aspirate", plain, "cytology"),
                             ("肝穿刺涂片", plain, "cytology"),
                             ("Gross specimen", plain, "gross"), ("Masson trichrome", plain, "other"),
                             ("no word", brown, "IHC"),
                             ("HER2 FISH", plain, "FISH"), ("大体标本", plain, "gross"), ("Fishbone", plain, "H&E")):
        assert filters.subfield_of(seen, text) == kind, text


@pytest.mark.parametrize("text, words", [
    ("Tubular adenoma of the colon", None), ("肝小叶结构紊乱，肝细胞坏死", None), ("Figure 3.", "words"),
    ("The weather is nice here today", "histology"),
    ("cell " * 20, "differ"),
    ("Adenoma of the colon with glands ++++ ////// ****** 12345678 90123456 78901234 56789012 345", "symbols")])
def test_captions(text, words):
    problem = filters.caption_problem(text)
    assert problem is None if words is None else words in problem


# --- copies -----------------------------------------------------------------------------------------------------------


def test_symmetries_in_frequencies_are_those_of_pixels():
    """Coefficients against a cosine sum written out, and under the 8 symmetries against turning the picture itself."""
    image = np.random.default_rng(0).random((32, 32))
    transform = lambda a: copies.BASES[:6] @ a @ copies.BASES[:6].T
    at = (np.arange(32) + 0.5) / 32
    for v, u in ((0, 1), (2, 3), (5, 5)):
        want = (image * np.cos(np.pi * v * at)[:, None] * np.cos(np.pi * u * at)).sum()
        assert transform(image)[v, u] == pytest.approx(want, abs=1e-4)
    for s in range(8):
        turned = np.rot90(image, s % 4)
        turned = turned[:, ::-1] if s >= 4 else turned
        assert np.allclose(copies.turned(transform(image), s), transform(turned), atol=1e-4)


def test_a_window_is_the_crop():
    """The coefficients of a window of a smooth picture against those of the picture cropped and shrunk by Pillow."""
    y, x = np.mgrid[:448, :448] / 448
    image = Image.fromarray((128 + 60 * np.sin(7 * x + 2 * y) + 50 * np.cos(5 * y - 3 * x)).astype(np.uint8))
    start, size = 3 / 28, 22 / 28
    window = copies.basis(start, size)
    edge = (round(448 * start), round(448 * (start + size)))
    crop = copies.thumbnail(image.crop((edge[0], edge[0], edge[1], edge[1]))).astype(float)
    a = copies.unit((window @ copies.thumbnail(image) @ window.T).reshape(-1))
    b = copies.unit((copies.BASES[:6] @ crop @ copies.BASES[:6].T).reshape(-1))
    assert a @ b > 0.999


def test_plain_pictures_are_nobodys_copy():
    thumbs, alive = np.full((9, 32, 32), 99, np.uint8), np.ones(9, bool)
    assert list(copies.pairs(copies.build_index(thumbs, alive), thumbs, alive)) == []


@real
def test_copies_of_real_tiles():
    """218 tiles of breast, each with a copy: 99 % found, and no pair of different tiles taken for copies."""
    rng, tiles = np.random.default_rng(0), [Image.open(p).convert("RGB") for p in sorted((SHARED / "bcss").glob("*/*"))]
    thumbs = np.stack([copies.thumbnail(t) for t in tiles] + [copies.thumbnail(edited(t, rng)) for t in tiles])
    found = set()
    for i, j, _ in copies.pairs(copies.build_index(thumbs, np.ones(len(thumbs), bool)), thumbs,
                                np.ones(len(thumbs), bool)):
        found |= {(min(i, j), max(i, j))} if i != j else set()
    true = {(i, i + len(tiles)) for i in range(len(tiles))}
    print(f"{len(found & true)} of {len(true)} copies found, {len(found - true)} false pairs")
    assert len(found & true) >= 0.99 * len(true) and not found - true


# --- wording ----------------------------------------------------------------------------------------------------------


def test_known_texts():
    base = "Sections show nests of pleomorphic tumour cells within a desmoplastic stroma and focal necrosis."
    known = copies.Texts([base, "What is present?", "Is this a section of normal liver or of kidney?"])
    assert known.find("FIG 1 - " + base.upper().replace(" ", "; "))
    assert known.find("Then nests of pleomorphic tumour cells within a desmoplastic stroma, focal calcification")
    assert known.find("is this a section of NORMAL liver, or of kidney") and not known.find("What is present?")
    assert not known.find("Sections show sheets of uniform cells with scant cytoplasm and no necrosis in the stroma.")


@real
def test_texts_on_real_captions():
    """200 captions as a benchmark: copies with words exchanged are found to 99 %, none of 800 others of other slides is
    dropped."""
    rows = [json.loads(line) for line in open(SHARED / "text" / "pathgen_captions_1000.jsonl", encoding="utf-8")]
    slides = {r["wsi_id"] for r in rows[:200]}
    known, rng = copies.Texts([r["caption"] for r in rows[:200]]), random.Random(0)
    again = [bool(known.find(reworded(r["caption"], rng))) for r in rows[:200]]
    others = [r["caption"] for r in rows[200:] if r["wsi_id"] not in slides]
    false = [t for t in others if known.find(t)]
    print(f"{sum(again)} of 200 found, {len(false)} of {len(others)} others dropped")
    assert sum(again) >= 198 and not false


def test_ids():
    ids = filters.ids_of({"id": "x/TCGA-AB-1234-01A", "group": "roi7", "image": "images/PMC123456_F1.jpg"})
    assert ids == {"tcga-ab-1234", "pmc123456"}  # "roi7" is too short to mean anything elsewhere
    assert filters.ids_of({"id": "a", "group": "slide-00017"}) == {"slide-00017"}


# --- the whole funnel -------------------------------------------------------------------------------------------------


def planted(folder, clean, copies):
    """Records in order: clean ones, then copies of them, of pictures and texts of a benchmark, of its groups."""
    (folder / "images").mkdir(parents=True)
    rng, words, rows, bench = np.random.default_rng(1), random.Random(1), [], []

    def add(kind, image, text, group="", to=rows):
        name = f"images/{kind}{len(to)}.jpg"
        image.save(folder / name, quality=90)
        to.append({"id": f"{kind}/{len(to)}", "image": name, "caption": text,
                   "group": group or f"slide-{len(to)}-{id(to)}"})

    for i in range(60):
        add("bench", tissue(10 ** 6 + i), caption(10 ** 6 + i), f"TCGA-AB-{i:04d}", bench)
    for i in range(clean):
        add("clean", tissue(i), caption(i))
    for i in range(copies):
        add("copy", edited(tissue(i), rng), caption(2 * 10 ** 6 + i))
        add("seen", edited(tissue(10 ** 6 + i % 60), rng), caption(3 * 10 ** 6 + i))
        add("said", tissue(4 * 10 ** 6 + i), reworded(bench[i % 60]["caption"], words))
    for i in range(20):
        add("from", tissue(5 * 10 ** 6 + i), caption(5 * 10 ** 6 + i), f"TCGA-AB-{i:04d}-01Z")
    records.write(folder / "bench.jsonl", bench)
    return rows


def test_planted_copies_and_contamination(tmp_path):
    """99 % of each kind found, under 0.1 % of the rest dropped; the page shows it and loads nothing; nothing is done
    twice."""
    rows = planted(tmp_path / "raw", 1000, 120)
    records.write(tmp_path / "raw" / "a.jsonl", rows)
    card = filters.run([tmp_path / "raw" / "a.jsonl"], tmp_path / "out", benchmarks=[tmp_path / "raw" / "bench.jsonl"])
    dropped = [json.loads(line) for line in open(tmp_path / "out" / "dropped.jsonl")]
    count = {}
    for d in dropped:
        kind = re.search(r"id=(\w+)/", d["where"])[1]
        count[kind, d["why"]] = count.get((kind, d["why"]), 0) + 1
    print(count, card["seconds"])
    assert count.get(("copy", "duplicate"), 0) >= 119
    assert count.get(("seen", "benchmark image"), 0) + count.get(("seen", "duplicate"),
                                                                 0) >= 119  # copies of each other too
    assert count.get(("said", "benchmark text"), 0) >= 119 and count[("from", "benchmark id")] == 20
    assert sum(n for (kind, _), n in count.items() if kind == "clean") <= 1
    left = records.read(tmp_path / "out" / "captions.jsonl")
    assert card["records"] == len(left) and card["read"] == len(rows) == len(left) + len(dropped)
    assert all(r["subfield"] == "H&E" for r in left) and not (tmp_path / "out" / "work").exists()
    assert records.validate(tmp_path / "out" / "captions.jsonl") == []
    page = (tmp_path / "out" / "funnel.html").read_text(encoding="utf-8")
    assert f"{len(left):,} of {len(rows):,} records" in page and "data:image/jpeg;base64" in page
    assert "http" not in page and "<script" not in page
    with pytest.raises(DataError, match="finished funnel"):
        filters.run([tmp_path / "raw" / "a.jsonl"], tmp_path / "out")


def test_hostile_records_are_named(tmp_path):
    """Broken lines, names and images stop at the first gate, told in dropped.jsonl; one file under two captions is
    kept."""
    tissue(0).save(tmp_path / "a.png"), tissue(1).save(tmp_path / "b.png"), tissue(2, 80).save(tmp_path / "small.png")
    Image.new("L", (1_000_000, 2)).save(tmp_path / "wide.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    rows = [{"id": "1", "image": "a.png", "caption": "One gland with tall columnar cells <b>&"},
            {"id": "2", "image": "a.png", "caption": "The same file, another text on glands"},
            {"id": "3", "image": "a.png", "caption": "One gland with tall columnar cells <b>&"},
            {"id": "4", "image": "b\0.png", "caption": caption(1)},
            {"id": "5", "image": "wide.png", "caption": caption(2)},
            {"id": "6", "image": "cut.png", "caption": caption(3)},
            {"id": "7", "image": "small.png", "caption": caption(4)},
            {"id": "8", "image": "gone.png", "caption": caption(5)}, {"id": "9", "caption": caption(6)}]
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text + b'{"id": "10", "caption": "\xff\xfe"}\nnull\n' + b"[" * 100_000 + b"\n")
    card = filters.run([tmp_path / "a.jsonl"], tmp_path / "out")
    told = (tmp_path / "out" / "dropped.jsonl").read_text()
    assert [r["id"] for r in records.read(tmp_path / "out" / "captions.jsonl")] == ["1", "2"]
    assert card["dropped"] == {"unreadable": 8, "duplicate": 1, "size": 1}
    for words in ("NUL byte", "1000000 x 2", "cut.png", "gone.png: no such file", "'image' is missing", "not UTF-8",
                  "80 x 80", "id=3"):
        assert words in told, words
    page = (tmp_path / "out" / "funnel.html").read_text(encoding="utf-8")
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    with pytest.raises(DataError, match="no such file"):
        filters.run([tmp_path / "none.jsonl"], tmp_path / "x")


def test_the_first_pass_goes_on(tmp_path):
    """Cut off in the middle of a line and of a thumbnail, the first pass ends with the same bytes as an uninterrupted
    one."""
    rows = planted(tmp_path / "raw", 12, 1)
    records.write(tmp_path / "raw" / "a.jsonl", rows)
    files, fail = [tmp_path / "raw" / "a.jsonl"], lambda *fault: pytest.fail(str(fault))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        assert filters.first_pass(files, tmp_path / name, 1, fail) == len(rows)
    want = [(tmp_path / "whole" / f).read_bytes() for f in ("measured.jsonl", "thumbs")]
    for lines, pixels in ((0.5, 0.7), (0.8, 0.3)):
        for name, whole, share in zip(("measured.jsonl", "thumbs"), want, (lines, pixels)):
            (tmp_path / "cut" / name).write_bytes(whole[:int(share * len(whole))])
        assert filters.first_pass(files, tmp_path / "cut", 1, fail) == len(rows)
        assert [(tmp_path / "cut" / f).read_bytes() for f in ("measured.jsonl", "thumbs")] == want


def test_clip_gate(tmp_path):
    """With a Patho-CLIP: the cosines are those of one record at a time, and the lowest fifth stops there."""
    import torch
    from nanopatho import presets
    from nanopatho.chat import clip_ids, clip_tokenizer
    from nanopatho.clip import CLIP
    from nanopatho.image import clip_pixels
    torch.manual_seed(0)
    rows = [{"id": str(i), "image": f"{i}.png", "caption": caption(i)} for i in range(20)]
    for i in range(20):
        tissue(i).save(tmp_path / f"{i}.png")
    records.write(tmp_path / "a.jsonl", rows)
    model, tokenizer = CLIP(presets.CLIP["smoke"]).eval(), clip_tokenizer([r["caption"] for r in rows], 1024)
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save(str(tmp_path / "clip" / "tokenizer.json"))
    with torch.no_grad():
        want = [torch.cosine_similarity(model.encode_image(clip_pixels(tissue(i), 112)),
                                        model.encode_text(clip_ids(tokenizer, [r["caption"]], 48))).item() for i,
                r in enumerate(rows)]
    got = [s for _, scores in filters.clip_scores(tmp_path / "clip", ((i, r, tmp_path) for i, r in enumerate(rows)),
                                                  7) for s in scores]
    assert np.allclose(got, want, atol=1e-5)
    filters.run([tmp_path / "a.jsonl"], tmp_path / "out", clip=tmp_path / "clip", clip_drop=0.2)
    left = {r["id"] for r in records.read(tmp_path / "out" / "captions.jsonl")}
    assert left == {str(i) for i in np.argsort(want)[4:]}
