"""Every adapter on files in the published schema, made here, with the traps of each set; and on real samples where they are.

Truth: what was written into the fixture, item by item. Each set goes through `convert`, so records are checked as a user
gets them, and every item that is dropped must be counted with its reason.
"""

import csv
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import __main__ as command
from data_prep import adapters, records, shards, sources
from data_prep.sources import SOURCES
from nanopatho.data import DataError
from test_archives import huge_png

SHARED = Path(os.environ.get("NANOPATHO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real samples at {SHARED}: set NANOPATHO_SHARED to their root")


def picture(seed=0, size=(40, 32), kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def lay(root, files):
    """{name: bytes, text, list (JSONL if the name says so, else JSON), dict} -> files; an image if the value is None."""
    for name, body in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if body is None:
            body = picture(len(name), kind={".png": "PNG", ".tif": "TIFF"}.get(path.suffix, "JPEG"))
        elif name.endswith(".jsonl") and isinstance(body, list):
            body = "".join((b if isinstance(b, str) else json.dumps(b)) + "\n" for b in body)
        elif isinstance(body, (list, dict)):
            body = json.dumps(body, indent=1)
        path.write_bytes(body if isinstance(body, bytes) else body.encode("utf-8", "surrogateescape"))


def sheet(columns, *rows):
    file = io.StringIO()
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue()


def convert(name, tmp_path, files=None, leaks=0):
    """-> (records by id, {reason: count}); validate must find them in order, images included, but for a published leak."""
    lay(tmp_path / "raw", files or {})
    card = sources.convert(name, tmp_path / "raw", tmp_path / "out").data
    out = tmp_path / "out" / "records.jsonl"
    problems = records.validate(out)
    assert len(problems) == leaks and all("that leaks" in p for p in problems), problems
    rows = {r["id"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert len(rows) == card["records"] and all(r["source"] == name and r["license"] and r["group"] for r in rows.values())
    assert sum(card["dropped"].values()) == len((tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    if SOURCES[name]["use"] == "test only":
        assert {r["split"] for r in rows.values()} <= {"val", "test"}
    return rows, card["dropped"]


# ---------------------------------------------------------------- image and caption

def test_quilt1m(tmp_path):
    columns = ["", "caption", "image_path", "subset", "split", "pathology", "roi_text", "noisy_text",
               "corrected_text", "med_umls_ids", "magnification", "height", "width", "single_wsi", "not_histology"]
    row = lambda n, caption, image, split="train", topic="['Renal', 'Bone']", no="0": [
        n, caption, image, "quilt", split, topic, "[]", "", "", "[]", "1.0", "512", "512", "1", no]
    video = "_KJZm1orOvU_roi_0a-1.jpg"
    rows, dropped = convert("quilt1m", tmp_path, {
        "quilt_1M_lookup.csv": sheet(columns, row(0, "A, \"quoted\"\ncaption", video),
                                     row(1, "Same image", video, "val", "[]"),
                                     row(2, "", video), row(3, "nan", video), row(4, "A chart", video, no="1"),
                                     row(5, "Lost", "gone.jpg"), row(6, "Up", "../../etc/passwd"),
                                     row(7, "Blurred", "b_image_b.jpg"), row(8, "=HYPERLINK(1)", "PMC77_Fig1.jpg"),
                                     [9, "short"]) + "10,bad\udcff utf,x.jpg" + ",0" * 12 + "\n",
        "predictions_quiltcleaner.csv": sheet(["Filename", "Any impairment"], ["b_image_b.jpg", "0.51"], [video, "0.49"]),
        f"images_part_1/quilt_1m/{video}": None, "PMC77_Fig1.jpg": None, "b_image_b.jpg": None, "x.jpg": None}, leaks=1)
    assert {i: (r["group"], r.get("topic"), r["split"]) for i, r in rows.items()} == {
        "quilt1m-0": ("youtube-_KJZm1orOvU", "Renal", "train"), "quilt1m-1": ("youtube-_KJZm1orOvU", None, "val"),
        "quilt1m-8": ("PMC77", "Renal", "train")}
    assert rows["quilt1m-0"]["caption"] == "A, \"quoted\"\ncaption" and rows["quilt1m-8"]["caption"] == "=HYPERLINK(1)"
    assert sum(dropped.values()) == 8 and dropped["no caption"] == 2 and dropped["impaired, says QuiltCleaner"] == 1
    assert dropped["its image is not there"] == 1 and dropped["it leads out of the folder"] == 1
    assert any("no UTF-8" in why for why in dropped) and dropped["a line with too many or too few fields"] == 1


def test_pathgen(tmp_path, monkeypatch):
    slide = Image.fromarray(np.random.default_rng(1).integers(0, 255, (900, 1000, 3), np.uint8))
    slide.save(tmp_path / "s.tif")
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)      # PIL's way; openslide's is tried on the real slide
    item = lambda x, y, key="wsi_id", slide="TCGA-AA-0001-01Z-00-DX1.B": {
        key: slide, "position": [str(x), str(y)], "caption": "Nests.", "file_id": "f"}
    rows, dropped = convert("pathgen", tmp_path, {
        "PathGen-1.6M.json": [item(10, 20), item(300, 228, "WSI_id"), item(400, 0), item(0, 0, slide="TCGA-BB-1"),
                              item("-1", 0), {"caption": "x"}, 7, item(5, 5, slide="cut")],
        "f/TCGA-AA-0001-01Z-00-DX1.B.svs": (tmp_path / "s.tif").read_bytes(), "crops/cut_5_5.jpg": None})
    a, b, c = rows.values()
    assert a["group"] == b["group"] == "TCGA-AA-0001" and c["group"] == "cut" and "crops/cut_5_5.jpg" in c["image"]
    for r, box in ((a, (10, 20, 682, 692)), (b, (300, 228, 972, 900))):    # the wrong key of the README's code is read too
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / r["image"])), np.asarray(slide.crop(box)))
    assert dropped == {"the region cannot be cut out": 1, "its image is not there": 1, "no wsi_id or position": 2,
                       "not a JSON object": 1}


def test_pathcap_and_pmc_oa(tmp_path):
    rows, dropped = convert("pathcap", tmp_path / "a", {
        "data.json": [{"image": "p_1.jpg", "caption": "Fat.", "pmc_id": "212319"}, {"caption": "no image"},
                      {"figure_fn": "PMC9_f.jpg", "caption": "x"}, {"image": "p_1.jpg", "caption": None}],
        "images/p_1.jpg": None, "images/PMC9_f.jpg": None})
    assert [r["group"] for r in rows.values()] == ["PMC212319", "PMC9"] and sum(dropped.values()) == 2
    rows, dropped = convert("pmc_oa", tmp_path / "b", {
        "pmc_oa.jsonl": [{"image": "PMC212319_Fig3_4.jpg", "caption": "A nest"}, '{"image": "cut', "[1]", "[" * 100_000,
                         {"image": "wide.png", "caption": "x"}, {"image": "f.jpg", "caption": "B\0", "pmcid": "PMC5"},
                         {"image": "f.jpg", "caption": "C", "pmcid": "PMC5"}],
        "caption/images/PMC212319_Fig3_4.jpg": None, "f.jpg": None, "wide.png": huge_png(1_000_000, 1)})
    assert [(r["group"], r["caption"]) for r in rows.values()] == [("PMC212319", "A nest"), ("PMC5", "C")]
    assert dropped["an image of N x N pixels: more than N, or a stripe over N:N"] == 1
    assert dropped["not valid JSON"] == 2 and dropped["not a JSON object"] == 1 and any("NUL byte" in w for w in dropped)


def test_arch(tmp_path):
    rows, dropped = convert("arch", tmp_path, {
        "books_set/captions.json": {"0": {"figure_id": "f1", "letter": "A", "caption": "(A) Fat. (B) Mucin.", "uuid": "u1"},
                                    "1": {"figure_id": "f1", "letter": "B", "caption": "(A) Fat. (B) Mucin.", "uuid": "u2"},
                                    "2": {"figure_id": "f2", "letter": "Single", "caption": "Bone.", "uuid": "lost"}},
        "pubmed_set/captions.json": {"0": {"caption": "Same", "uuid": "v1"}, "1": {"caption": "Same", "uuid": "v2"}},
        "books_set/images/u1.png": None, "books_set/images/u2.jpg": None, "pubmed_set/images/v1.jpg": None,
        "pubmed_set/images/v2.jpg": None})
    assert dropped == {"its image is not there": 1} and len({r["group"] for r in rows.values()}) == 2
    assert {i: r["facts"]["panel"] for i, r in rows.items()} == {"arch-u1": "A", "arch-u2": "B", "arch-v1": "Single",
                                                                "arch-v2": "Single"}


# ---------------------------------------------------------------- conversations and questions

def test_quilt_instruct(tmp_path):
    say = lambda *texts: [{"from": "gpt" if i % 2 else "human", "value": t} for i, t in enumerate(texts)]
    base = {"id": "1", "image": "abcdefghijk_roi_1.jpg"}
    rows, dropped = convert("quilt_instruct", tmp_path, {"quilt_instruct_107k.json": [
        {**base, "conversations": say("Which?\n<image>", "Fat.")},
        {**base, "conversations": say("<image>\nA?", "B.", "C?", "D.")},
        {**base, "conversations": say("No mark?", "Yes.")}, {**base, "conversations": say("Open?")},
        {**base, "conversations": [{"from": "robot", "value": "x"}]},
        {**base, "image": "not_in_zip.jpg", "conversations": say("A?", "B.")}],
        "quilt_1m/abcdefghijk_roi_1.jpg": None})
    assert [r["messages"][0]["content"] for r in rows.values()] == ["<image>Which?", "<image>A?", "<image>No mark?"]
    assert [r["task"] for r in rows.values()] == ["reasoning", "conversation", "reasoning"] and sum(dropped.values()) == 3
    assert {r["group"] for r in rows.values()} == {"youtube-abcdefghijk"}


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, extra: data")
    import pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_pathvqa(tmp_path):
    row = lambda seed, q, a: {"image": {"bytes": picture(seed, kind="JPEG"), "path": None}, "question": q, "answer": a}
    data = tmp_path / "raw" / "data"
    parquet(data / "train-00000-of-00001.parquet", [row(1, "Is it fat?", "yes"), row(1, "What?", "fat"), row(2, "Is it?", "No.")])
    parquet(data / "validation-00000-of-00001.parquet", [row(3, "Where?", "no necrosis is seen")])
    parquet(data / "test-00000-of-00001.parquet", [row(4, "Is it bone?", "yes"), {"image": None, "question": "x", "answer": "y"},
                                                   {"image": {"bytes": b"no image", "path": "x"}, "question": "x", "answer": "y"}])
    rows, dropped = convert("pathvqa", tmp_path)
    by = {r["question"]: r for r in rows.values()}
    assert {q: r["split"] for q, r in by.items()} == {"Is it fat?": "train", "What?": "train", "Is it?": "train", "Where?": "val",
                                                      "Is it bone?": "test"}
    assert [(by[q].get("options"), by[q]["answer"]) for q in ("Is it fat?", "What?", "Is it?", "Where?")] == [
        (["yes", "no"], "A"), (None, "fat"), (["yes", "no"], "B"), (None, "no necrosis is seen")]
    assert by["Is it fat?"]["image"] == by["What?"]["image"] and by["What?"]["group"] != by["Is it?"]["group"]
    assert (tmp_path / "out" / by["What?"]["image"]).read_bytes() == picture(1, kind="JPEG")
    assert dropped == {"no image in the row": 1, "not an image PIL knows": 1}
    (data / "test-00000-of-00001.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match="test-00000.*cannot be read as parquet"):
        sources.convert("pathvqa", tmp_path / "raw", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_quilt_vqa_is_a_test_set_whatever_its_split_is_called(tmp_path):
    parquet(tmp_path / "raw" / "data" / "train-0.parquet", [
        {"image": {"bytes": picture(5), "path": "abcdefghijk_roi_1.jpg"}, "question": "Is it?", "answer": a, "answer_type": "CLOSED",
         "context": "c"} for a in ("Yes", "It cannot be told")])
    rows, _ = convert("quilt_vqa", tmp_path)
    assert [r["split"] for r in rows.values()] == ["test"] * 2 and [r.get("options") for r in rows.values()] == [["yes", "no"], None]
    assert {r["group"] for r in rows.values()} == {"youtube-abcdefghijk"}


def test_pathmmu(tmp_path):
    options = ["A) Herpes (HSV) infection", "B) Cytomegalovirus (CMV) infection", "C) A) odd", "D) Vitamin B deficiency"]
    item = lambda n, answer, **more: {"No": n, "img": f"i{n}.jpg", "question": "Which?", "options": options,
                                      "answer": answer, "explanation": "e", **more}
    rows, dropped = convert("pathmmu", tmp_path, {"data.json": {
        "SocialPath": {"test": [item(1, "B) Cytomegalovirus (CMV) infection", tw_id="99"), item(2, "D"), item(3, "E) none"),
                                item(4, "A) Cytomegalovirus (CMV) infection"), item(9, "A) Herpes (HSV) infection")]},
        "PubMed": {"test_tiny": [item(1, "b) cytomegalovirus (CMV) infection"), item(1, "Vitamin B deficiency")],
                   "val": [item(5, "C) A) odd")]},
        "Atlas": {"test": [item(7, "A) Herpes (HSV) infection", source_img="books_set/images/u1.png")]}},
        "images/i1.jpg": None, "images/i2.jpg": None, "i5.jpg": None, "arch/books_set/images/u1.png": None})
    assert {i: (r["answer"], r["split"], r["group"]) for i, r in rows.items()} == {
        "pathmmu-SocialPath-test-0": ("B", "test", "tweet-99"), "pathmmu-SocialPath-test-1": ("D", "test", "i2"),
        "pathmmu-PubMed-test_tiny-0": ("B", "test", "i1"), "pathmmu-PubMed-test_tiny-1": ("D", "test", "i1"),
        "pathmmu-PubMed-val-0": ("C", "val", "i5"), "pathmmu-Atlas-test-0": ("A", "test", "arch-u1")}
    assert rows["pathmmu-PubMed-val-0"]["options"] == ["Herpes (HSV) infection", "Cytomegalovirus (CMV) infection",
                                                       "A) odd", "Vitamin B deficiency"]
    assert options[1].split(")")[1].strip() == "Cytomegalovirus (CMV"      # what the official script makes of it
    assert sorted(dropped.values()) == [1, 2] and dropped["its image is not there"] == 1


def test_medxpertqa(tmp_path):
    listed = [{"letter": c, "content": f"option ({c})"} for c in "BACDE"]
    item = lambda n, options, label, images: {"id": f"MM-{n}", "question": "Which?\nAnswer Choices: (A) option (A) (B) option (B)",
                                              "options": options, "label": label, "images": images, "medical_task": "Diagnosis",
                                              "body_system": "Skeletal", "question_type": "Reasoning"}
    rows, dropped = convert("medxpertqa_mm", tmp_path, {
        "MM/test.jsonl": [item(1, listed, ["B"], [{"image_path": "a.jpeg"}, {"image_path": "b.jpeg"}]),
                          item(2, {o["letter"]: o["content"] for o in listed}, "E", ["a.jpeg"]), item(3, listed, ["F"], ["a.jpeg"]),
                          item(4, listed, ["A"], [])], "images/a.jpeg": None, "images/b.jpeg": None})
    one, two = rows.values()
    assert one["question"] == "Which?" and one["options"] == two["options"] == [f"option ({c})" for c in "ABCDE"]
    assert (one["answer"], two["answer"]) == ("B", "E") and len(one["image"]) == 2 and isinstance(two["image"], str)
    assert sum(dropped.values()) == 2


def test_omnimedvqa(tmp_path):
    item = lambda n, kind="modality_type", say="Microscopy Images", gt="Fat", **more: {
        "dataset": "BioMediTech", "question_id": f"q{n}", "question_type": "Disease Diagnosis", "question": "Which?",
        "gt_answer": gt, "image_path": "Images/B/1.png", "option_A": "Bone", "option_B": "fat", "option_C": "Skin", kind: say, **more}
    rows, dropped = convert("omnimedvqa", tmp_path, {
        "OmniMedVQA/QA_information/Open-access/B.json": [item(1), item(2, "modality"), item(3, say="CT"), item(4, gt="none"),
                                                         item(5, option_D="Fat"), item(6, "Modality_Type")],
        "OmniMedVQA/Images/B/1.png": None})
    assert [r["answer"] for r in rows.values()] == ["B"] * 3 and {r["license"] for r in rows.values()} == {"Open-access"}
    assert dropped == {"not microscopy": 1, "the answer is not exactly one of the options": 2}


# ---------------------------------------------------------------- classes

FOLDERS = {
    "nct_crc": (["NCT-CRC-HE-100K/ADI/ADI-AAAMHQMK.tif", "CRC-VAL-HE-7K/TUM/TUM-TCGA-AA.tif"],
                [("train", "adipose tissue", "ADI-AAAMHQMK"), ("test", "colorectal adenocarcinoma epithelium", "TUM-TCGA-AA")]),
    "bach": (["ICIAR2018_BACH_Challenge/Photos/InSitu/is001.tif", "ICIAR2018_BACH_Challenge/Photos/Normal/n1.tif"],
             [(None, "breast carcinoma in situ", "is001"), (None, "normal breast tissue", "n1")]),
    "wsss4luad": (["1.training/436141-100-3-[1, 1, 0].png", "1.training/5-1-[0 0 1].png", "1.training/unlabelled.png"],
                  [("train", "lung tumor tissue", "wsss4luad-436141"), ("train", "normal lung tissue", "wsss4luad-5")]),
    "renalcell": (["tissue_classification/blood/FIMM6_14_ML1.mrxs_BloodTile 1.png",
                   "tissue_classification/cancer/TCGA-A3-3306_Tile2.png"],
                  [("test", "red blood cells", "renalcell-FIMM6_14_ML1"), ("train", "renal cell carcinoma", "TCGA-A3-3306")]),
    "folder": (["train/tumor/roi1_x.jpg", "test/non_tumor/roi2_y.jpg"], [("train", "tumor", "roi1"), ("test", "non tumor", "roi2")]),
    "lc25000": (["lung_image_sets/lung_n/lungn1.jpeg", "lung_image_sets/lung_n/lungn2.jpeg", "colon_image_sets/colon_n/colonn1.jpeg",
                 "colon_image_sets/colon_n/colonn9.jpeg"],
                [(None, "benign colonic tissue", "lc25000-0"), *[(None, "benign lung tissue", "lc25000-7")] * 2]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_classes_in_folders(tmp_path, name):
    files, wanted = FOLDERS[name]
    head = ["stem", "filename", "label", "tissue", "local_cluster_label", "group_id"]
    groups = sheet(head, ["lungn1", "lungn1.jpeg", "lung_n", "lung", 0, 7], ["lungn2", "lungn2.jpeg", "lung_n", "lung", 0, 7],
                   ["colonn1", "colonn1.jpeg", "colon_n", "colon", 0, 0])
    more = {"lc25000_image_groups.csv": groups} if name == "lc25000" else {}
    rows, dropped = convert(name, tmp_path, {**dict.fromkeys(files), **more})
    got = [(r.get("split"), r["facts"]["tissue"], r["group"]) for r in rows.values()]
    assert sorted(got, key=str) == sorted(wanted, key=str)
    assert sum(dropped.values()) == (name in ("lc25000", "wsss4luad"))


def test_lc25000_without_its_duplicate_groups_is_refused(tmp_path):
    lay(tmp_path, {"lung_n/lungn1.jpeg": None})
    with pytest.raises(DataError, match="lc25000_image_groups.csv: no such file"):
        sources.convert("lc25000", tmp_path, tmp_path / "out")


def test_mhist_osteo_skincancer(tmp_path):
    votes = "Number of Annotators who Selected SSA (Out of 7)"
    rows, dropped = convert("mhist", tmp_path / "m", {
        "annotations.csv": sheet(["Image Name", "Majority Vote Label", votes, "Partition"], ["MHIST_aaa.png", "SSA", 6, "train"],
                                 ["MHIST_aab.png", "HP", 1, "test"], ["MHIST_aac.png", "?", 1, "test"]),
        "images/MHIST_aaa.png": None, "images/MHIST_aab.png": None})
    assert [(r["facts"], r["split"]) for r in rows.values()] == [
        ({"tissue": "sessile serrated adenoma", "code": "SSA", "votes_ssa": "6"}, "train"),
        ({"tissue": "hyperplastic polyp", "code": "HP", "votes_ssa": "1"}, "test")] and sum(dropped.values()) == 1
    rows, dropped = convert("osteo", tmp_path / "o", {
        "ML_Features_1144.csv": sheet(["", "image.name", "classification"], [1, "Case-3-A10-27438-13141", "Non-Tumor"],
                                      [2, "Case 48 - P5 - C1", "Non-Viable-Tumor"], [3, "Case-3-A1", "viable: non-viable"]),
        "Training-Set-1/set1/Case-3-A10-27438-13141.jpg": None, "Training-Set-2/Case-48-P5-C1.jpg": None})
    assert [(r["group"], r["facts"]["tissue"]) for r in rows.values()] == [("osteo-case-3", "non-tumor bone tissue"),
                                                                          ("osteo-case-48", "necrotic osteosarcoma")]
    assert dropped == {"a mixed or unknown class": 1}
    tile = "tiles/nontumor_skin_dermis_dermis/nontumor_skin_dermis_dermis_ws_44_1.jpg"
    rows, dropped = convert("skincancer", tmp_path / "s", {
        "data/tiles-v2.csv": sheet(["file", "class", "set", "malignicy"], [tile, "nontumor_skin_dermis_dermis", "Test", "nontumor"],
                                   [tile, "x_unknown", "Test", ""]), f"data/{tile}": None})
    assert [(r["group"], r["split"], r["facts"]["tissue"]) for r in rows.values()] == [("skincancer-44", "test", "dermis")]
    assert dropped == {"unknown class or set": 1}


def test_sicapv2(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="SICAPv2's tables need openpyxl, extra: data")
    lay(tmp_path / "raw", {f"images/16B{i + 1}_Block_Region_{i}.jpg": None for i in range(2)})
    for part, rows in (("Train", [("16B1_Block_Region_0.jpg", 0, 1, 1, 0, 1)]),
                       ("Test", [("16B2_Block_Region_1.jpg", 1, 0, 0, 0, 0), (None,) * 6])):
        book = openpyxl.Workbook()
        for row in [("image_name", "NC", "G3", "G4", "G5", "G4C"), *rows]:
            book.active.append(row)
        (tmp_path / "raw" / "partition" / "Test").mkdir(parents=True, exist_ok=True)
        book.save(tmp_path / "raw" / "partition" / "Test" / f"{part}.xlsx")
    rows, dropped = convert("sicapv2", tmp_path)
    assert [(r["split"], r["facts"]["code"], r["facts"]["one_hot"], r["group"]) for r in rows.values()] == [
        ("train", "G3", False, "sicapv2-16B1"), ("test", "NC", True, "sicapv2-16B2")]


def test_patchcamelyon(tmp_path):
    h5py = pytest.importorskip("h5py", reason="PatchCamelyon's files need h5py, extra: data")
    x = np.random.default_rng(0).integers(0, 255, (3, 96, 96, 3), np.uint8)
    columns = ["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"]
    meta = sheet(columns, *[[i, 1, 2, True, True, f"camelyon16_test_00{i // 2}"] for i in range(3)])
    lay(tmp_path / "raw", {"camelyonpatch_level_2_split_test_meta.csv": meta})
    for part, value in (("x", x), ("y", np.array([1, 0, 1]).reshape(3, 1, 1, 1))):
        with h5py.File(tmp_path / "raw" / f"camelyonpatch_level_2_split_test_{part}.h5", "w") as file:
            file[part] = value
    rows, dropped = convert("patchcamelyon", tmp_path)
    assert [r["facts"]["code"] for r in rows.values()] == ["1", "0", "1"] and len({r["group"] for r in rows.values()}) == 2
    for r, tile in zip(rows.values(), x):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / r["image"])), tile)
    assert dropped == {"this split is not there": 2}


def test_bcss(tmp_path):
    mask = np.zeros((448, 672), np.uint8)          # six tiles: tumor, tumor half, outside | stroma, excluded, 52 % fat
    mask[:224, :224], mask[:224, 224:336], mask[224:, :224], mask[224:, 224:448], mask[224:, 448:564] = 1, 1, 2, 7, 9
    mask[:224, 336:410] = 2
    image = np.random.default_rng(0).integers(0, 255, (448, 672, 3), np.uint8)
    names = ["TCGA-OL-A5RW-DX1_x.png", "TCGA-A1-A0SK-DX1_y.png"]
    for name in names:
        for folder, array in (("rgbs_colorNormalized", image), ("masks", mask)):
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "raw" / folder / name)
    codes = "label\tGT_code\noutside_roi\t0\ntumor\t1\nstroma\t2\nexclude\t7\nfat\t9\n"
    rows, dropped = convert("bcss", tmp_path, {"meta/gtruth_codes.tsv": codes})
    got = sorted((r["group"], r["split"], r["facts"]["tissue"]) for r in rows.values())
    assert got == [(*roi, tissue) for roi in (("TCGA-A1-A0SK", "train"), ("TCGA-OL-A5RW", "test"))
                   for tissue in ("fat", "stroma", "tumor", "tumor")] and sum(dropped.values()) == 4
    first = rows["bcss/TCGA-A1-A0SK-DX1_y-448-224"]
    assert first["facts"]["tissue"] == "fat"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / first["image"])), image[224:, 448:])


# ---------------------------------------------------------------- reading, commands, real samples

def test_a_list_in_json_is_read_in_pieces(tmp_path):
    things = [{"n": i, "text": "é] }, {" * 700 + "\u2028"} for i in range(400)]      # 4 MB: pieces end inside items, letters
    for indent in (None, 1):
        (tmp_path / "l.json").write_text(json.dumps(things, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
        assert [r for _, r in adapters.items(tmp_path / "l.json", None)] == things
    lost = []
    (tmp_path / "l.json").write_text(json.dumps(things)[:-40])
    assert [r for _, r in adapters.items(tmp_path / "l.json", lambda *a: lost.append(a))] == things[:-1]
    assert len(lost) == 1 and "item 400" in lost[0][0] and "cut off" in lost[0][1]


def test_wrong_folders_and_names_end_in_one_message(tmp_path, capsys):
    for name in SOURCES:
        with pytest.raises((DataError, SystemExit), match="no such f|holds no images|not one record|pip install"):
            sources.convert(name, tmp_path / "nowhere", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    lay(tmp_path / "raw", {"quilt_1M_lookup.csv": "a,b\n1,2\n"})
    with pytest.raises(DataError, match="has no column caption.*its columns are"):
        command.main(["convert", "quilt1m", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    assert command.main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(f"python -m data_prep fetch {name} " in told and s["licence"] in told for name, s in SOURCES.items())
    with pytest.raises(DataError, match="no set quilt;"):
        command.main(["list", "quilt"])


def test_no_adapter_stumbles_over_odd_values(tmp_path):
    """Fields of the published names with values of every other kind: each item is kept or counted as dropped."""
    rng = random.Random(0)
    names = ("image img caption pmc_id pmcid uuid figure_id letter conversations id wsi_id position file_id options "
             "answer question label images tw_id source_img modality_type gt_answer image_path option_A option_B dataset question_id").split()

    def value(depth=0):
        inner = lambda: value(depth + 1)
        deep = [[inner(), inner()], {rng.choice(names): inner()}, {"from": "human", "value": inner()},
                {"letter": "A", "content": inner()}] if depth < 2 else []
        return rng.choice([None, "", 5, -1.5, True, "a.jpg", "A", "../x", "\0", "\ud800", *deep])
    files = {"pathcap": "data.json", "pmc_oa": "pmc_oa.jsonl", "arch": "books_set/captions.json", "pathmmu": "data.json",
             "quilt_instruct": "quilt_instruct_107k.json", "medxpertqa_mm": "MM/test.jsonl", "pathgen": "PathGen-1.json",
             "omnimedvqa": "QA_information/Open-access/x.json"}
    good = {"pathmmu": {"question": "?", "options": ["A) a", "B) b"], "answer": "A", "img": "a.jpg"},
            "omnimedvqa": {"modality_type": "Microscopy", "question": "?", "gt_answer": "a", "option_A": "a",
                           "option_B": "b", "image_path": "a.jpg"},
            "medxpertqa_mm": {"id": "g", "question": "?", "options": {"A": "a", "B": "b"}, "label": "A", "images": ["a.jpg"]},
            "quilt_instruct": {"image": "a.jpg", "conversations": [{"from": "human", "value": "?"},
                                                                   {"from": "gpt", "value": "a"}]},
            "pathgen": {"wsi_id": "s", "position": ["1", "2"], "caption": "a"}, "arch": {"uuid": "a", "caption": "a"}}
    for name, file in files.items():
        odd = [{k: value() for k in rng.sample(names, rng.randrange(2, 20))} for _ in range(100)]
        odd.append(good.get(name, {"image": "a.jpg", "caption": "a"}))
        body = {"S": {"test": odd}} if name == "pathmmu" else dict(enumerate(odd)) if name == "arch" else odd
        lay(tmp_path / name / "raw", {file: body, "a.jpg": None, "s_1_2.jpg": None, "books_set/images/a.jpg": None})
        card = sources.convert(name, tmp_path / name / "raw", tmp_path / name / "out").data
        assert card["records"] >= 1 and card["records"] + sum(card["dropped"].values()) >= 101
        assert not [p for p in records.validate(tmp_path / name / "out" / "records.jsonl") if "leaks" not in p]


@real
def test_real_captions_and_slide(tmp_path):
    lines = (SHARED / "text" / "pathgen_captions_1000.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "PathGen-sample.jsonl").write_text("\n".join(lines + [json.dumps(
        {"wsi_id": "cmu1_small_region", "position": ["700", "1500"], "caption": "Skin.", "file_id": "f"})]))
    (tmp_path / "raw" / "cmu1_small_region.svs").symlink_to(SHARED / "slide" / "cmu1_small_region.svs")
    for r in items[:50]:
        lay(tmp_path / "raw", {f"crops/{r['wsi_id']}_{r['position'][0]}_{r['position'][1]}.jpg": None})
    rows, dropped = convert("pathgen", tmp_path)
    assert len(rows) == 51 and dropped == {"its image is not there": 950}
    cut = np.asarray(Image.open(tmp_path / "out" / rows["pathgen-cmu1_small_region-700-1500"]["image"])).astype(int)
    slide = np.asarray(Image.open(SHARED / "slide" / "cmu1_small_region.svs").convert("RGB")).astype(int)[1500:2172, 700:1372]
    assert cut.shape == (672, 672, 3) and np.abs(cut - slide).mean() < 1   # openslide and PIL decode JPEG with other rounding


@real
def test_real_questions(tmp_path):
    lines = (SHARED / "text" / "medxpertqa_12.jsonl").read_text().splitlines()
    images = {f"images/{i['image_path']}": None for line in lines for i in json.loads(line)["images"]}
    rows, dropped = convert("medxpertqa_mm", tmp_path, {"MM/test.jsonl": "\n".join(lines), **images})
    assert len(rows) == 12 and not dropped
    for line, r in zip(map(json.loads, lines), rows.values()):
        right = next(o["content"] for o in line["options"] if o["letter"] == line["label"][0])
        assert r["options"]["ABCDE".index(r["answer"])] == right and line["question"].startswith(r["question"])
        assert "Answer Choices" not in r["question"] and len(records.names_of(r)) == len(line["images"])
    for line in map(json.loads, (SHARED / "text" / "pathvqa_40.jsonl").read_text().splitlines()):
        got = adapters.answered(line["question"], line["answer"])
        assert got["answer"] == {"yes": "A", "no": "B"}.get(line["answer"], line["answer"])
        assert ("options" in got) == (line["answer"] in ("yes", "no"))


@real
def test_real_tiles_are_split_by_region(tmp_path):
    card = sources.convert("folder", SHARED / "bcss", tmp_path / "tiles")
    assert card.data["records"] == 218 and card.data["groups"] == 3
    split = shards.split([tmp_path / "tiles" / "records.jsonl"], tmp_path / "split").data
    assert split["splits"] and set(split["splits"]) == {"train", "val", "test"} and split["funnel"][0]["records"] == 218
    groups = {p.stem: {json.loads(line)["group"] for line in p.read_text().splitlines()}
              for p in (tmp_path / "split").glob("*_any.jsonl")}
    assert len(set.union(*groups.values())) == sum(map(len, groups.values())) == 2
    assert records.validate(tmp_path / "split" / "others.jsonl") == []
