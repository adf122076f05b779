"""Sets of tiles with a class -> records with facts {"tissue": name in words, "code": the set's label}; see adapters.py.

`nanopatho.evaluate_clip` reads facts.tissue as the class. Groups (slide, patient, duplicate cluster) matter most here:
neighbouring tiles and augmented copies look alike, and a random split measures memory. Where a set publishes no group,
each tile is its own, and nothing better can be done.
"""
import io
import os
import re
from pathlib import Path

from data_prep.adapters import need, table
from data_prep.archives import SUFFIXES
from nanopatho.data import DataError

NCT = {"ADI": "adipose tissue", "BACK": "background", "DEB": "debris", "LYM": "lymphocytes", "MUC": "mucus",
       "MUS": "smooth muscle", "NORM": "normal colon mucosa", "STR": "cancer-associated stroma",
       "TUM": "colorectal adenocarcinoma epithelium"}
LC = {"lung_aca": "lung adenocarcinoma", "lung_n": "benign lung tissue", "lung_scc": "lung squamous cell carcinoma",
      "colon_aca": "colon adenocarcinoma", "colon_n": "benign colonic tissue"}
PCAM = {"0": "lymph node", "1": "lymph node with metastatic tumor tissue"}
MHIST = {"HP": "hyperplastic polyp", "SSA": "sessile serrated adenoma"}
SICAP = {"NC": "non-cancerous prostate tissue", "G3": "Gleason pattern 3", "G4": "Gleason pattern 4",
         "G5": "Gleason pattern 5"}
BACH = {"Normal": "normal breast tissue", "Benign": "benign breast tissue", "InSitu": "breast carcinoma in situ",
        "Invasive": "invasive breast carcinoma"}
OSTEO = {"non-tumor": "non-tumor bone tissue", "non-viable-tumor": "necrotic osteosarcoma",
         "viable": "viable osteosarcoma"}
SKIN = {"necrosis": "necrosis", "skeletal": "skeletal muscle", "sweatglands": "eccrine sweat glands",
        "vessel": "vessels", "elastosis": "elastosis", "chondraltissue": "chondral tissue",
        "hairfollicle": "hair follicle", "epidermis": "epidermis", "nerves": "nerves", "subcutis": "subcutis",
        "dermis": "dermis", "sebaceousglands": "sebaceous glands", "sqcc": "squamous cell carcinoma", "melanoma": "melanoma",
        "bcc": "basal cell carcinoma", "naevus": "naevus"}
RENAL = {"blood": "red blood cells", "cancer": "renal cell carcinoma", "empty": "background",
         "normal": "normal renal tissue", "other": "adipose or necrotic tissue",
         "stroma": "stroma, muscle or blood vessels"}


def labelled(source, image, code, names, group, topic, *, split=None, **more):
    """Fields of one record. The class in words comes from `names`, else it is the label itself."""
    stem = os.path.splitext(image)[0]
    return {"id": f"{source}/{stem}", "split": split, "group": group, "image": image, "subfield": "H&E", "topic": topic,
            "facts": {"tissue": names.get(code, code), "code": code}, **more}


def class_folders(root, codes=None):
    """Image files in folders of their class, anywhere below root -> sorted list of (path relative to root, class).

    codes: only folders of these names; None: the folders directly below root.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.is_symlink())
    found = [(p.relative_to(root).as_posix(), p.parent.name if codes else p.relative_to(root).parts[0]) for p in paths]
    found = [(name, code) for name, code in found if (code in codes if codes else "/" in name)]
    if not found:
        raise DataError(f"{root}: holds no images in folders {', '.join(codes) if codes else 'of their class'}; "
                         f"`python -m data_prep list` shows the layout")
    return found


def stem(name):
    return os.path.splitext(os.path.basename(name))[0]


def nct_crc(root, drop):
    """NCT-CRC-HE-100K = train, CRC-VAL-HE-7K = test; either may be missing. No slides are published."""
    parts = {"NCT-CRC-HE-100K": "train", "CRC-VAL-HE-7K": "test"}
    for part in [p for p in parts if (Path(root) / p).is_dir()] or parts:
        for name, code in class_folders(Path(root) / part, NCT):
            yield labelled("nct_crc", f"{part}/{name}", code, NCT, stem(name), "colon", split=parts[part])


def lc25000(root, drop):
    """Twenty augmented copies of each of 1,250 originals: a split without the duplicate groups leaks nearly all of
    them, so lc25000_image_groups.csv (from the repository LC25000-clean) is needed."""
    rows = table(Path(root) / "lc25000_image_groups.csv", ("filename", "label", "group_id"), drop)
    groups = {(r["label"], stem(r["filename"])): f"lc25000-{r['group_id']}" for _, r in rows}
    for name, code in class_folders(root, LC):
        if (code, stem(name)) in groups:
            yield labelled("lc25000", name, code, LC, groups[code, stem(name)], code.split("_")[0])
        else:
            drop(name, "in no duplicate group")


def patchcamelyon(root, drop):
    """camelyonpatch_level_2_split_*: x and y as .h5, and the slide of each tile in _meta.csv, if it is there."""
    from PIL import Image
    try:
        import h5py
    except ImportError as error:
        raise SystemExit("PatchCamelyon's files need h5py: pip install 'nanopatho[data]'") from error
    for part, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        base = f"{root}/camelyonpatch_level_2_split_{part}"
        if part != "test" and not os.path.exists(f"{base}_x.h5"):
            drop(f"{base}_x.h5", "this split is not there")
            continue
        meta, slides = f"{base}_meta.csv", None
        if os.path.exists(meta):
            slides = [r["wsi"] for _, r in table(meta, ("wsi",), drop)]
        with h5py.File(need(f"{base}_x.h5")) as x, h5py.File(need(f"{base}_y.h5")) as y:
            if len(x["x"]) != len(y["y"]) or slides is not None and len(slides) != len(x["x"]):
                raise DataError(f"{base}_x.h5 holds {len(x['x'])} tiles, _y.h5 {len(y['y'])}, _meta.csv "
                                 f"{len(slides or [])}: fetch them again")
            for n, label in enumerate(y["y"][...].reshape(-1)):
                file = io.BytesIO()
                Image.fromarray(x["x"][n]).save(file, "PNG")
                group = f"patchcamelyon-{slides[n] if slides else f'{part}-{n}'}"
                yield labelled("patchcamelyon", f"{part}-{n}", str(int(label)), PCAM, group, "lymph node", split=split,
                               _bytes=file.getvalue())


def mhist(root, drop):
    """annotations.csv: majority of seven pathologists; how many said SSA is kept."""
    columns = ("Image Name", "Majority Vote Label", "Partition")
    for where, r in table(Path(root) / "annotations.csv", columns, drop):
        code = r["Majority Vote Label"]
        ssa = next((votes for column, votes in r.items() if column.startswith("Number of Annotators")), "")
        if code not in MHIST or r["Partition"] not in ("train", "test"):
            drop(where, "unknown label or partition", f"{code}, {r['Partition']}")
            continue
        record = labelled("mhist", r["Image Name"], code, MHIST, stem(r["Image Name"]), "colon", split=r["Partition"])
        yield {**record, "facts": {**record["facts"], "votes_ssa": ssa}}


def sicapv2(root, drop):
    """partition/Test/{Train,Test}.xlsx, columns image_name, NC, G3, G4, G5 (G4C: cribriform, part of G4). The class of
    the literature is the first column of the largest value; facts.one_hot: the rows that PathGen's protocol keeps."""
    try:
        import openpyxl
    except ImportError as error:
        raise SystemExit("SICAPv2's tables need openpyxl: pip install 'nanopatho[data]'") from error
    for part in ("Train", "Test"):
        path = need(Path(root) / "partition" / "Test" / f"{part}.xlsx")
        rows = openpyxl.load_workbook(path, read_only=True).active.iter_rows(values_only=True)
        header = [str(c) for c in next(rows)]
        if not {"image_name", *SICAP} <= set(header):
            raise DataError(f"{path}: its columns are {header}; image_name, NC, G3, G4, G5 are needed")
        for number, row in enumerate(rows, 2):
            r = dict(zip(header, row))
            marks = {c: int(r[c] or 0) for c in SICAP}
            if not r["image_name"] or not any(marks.values()):
                drop(f"{path}:{number}", "no image name or no class")
                continue
            code, slide = max(marks, key=marks.get), r["image_name"].split("_Block")[0]
            record = labelled("sicapv2", r["image_name"], code, SICAP, f"sicapv2-{slide}", "prostate",
                              split=part.lower())
            yield {**record, "facts": {**record["facts"], "one_hot": sum(marks.values()) == 1}}


def bach(root, drop):
    for name, code in class_folders(root, BACH):
        yield labelled("bach", name, code, BACH, stem(name), "breast")


def wsss4luad(root, drop):
    """The label stands in the file name: [tumor, stroma, normal]; tumor if the first is 1, else normal."""
    names = {"tumor": "lung tumor tissue", "normal": "normal lung tissue"}
    base = next((d for d in sorted(Path(root).rglob("1.training")) if d.is_dir()), Path(root))
    for path in sorted(base.glob("*.png")):
        marks, name = re.search(r"\[([01])[, ]+([01])[, ]+([01])\]", path.name), path.relative_to(root).as_posix()
        if not marks:
            drop(name, "no label like [1, 0, 0] in the file name")
            continue
        code = "tumor" if marks[1] == "1" else "normal"
        record = labelled("wsss4luad", name, code, names, f"wsss4luad-{path.name.split('-')[0]}", "lung", split="train")
        yield {**record, "facts": {**record["facts"], "tumor_stroma_normal": marks[0]}}


def osteo(root, drop):
    """ML_Features_1144.csv; spaces in its names are hyphens in the file names. "viable: non-viable" is dropped, as by
    QuiltNet (PathGen counts it as viable)."""
    for where, r in table(Path(root) / "ML_Features_1144.csv", ("image.name", "classification"), drop):
        name, code = re.sub(r"\s*-\s*|\s+", "-", r["image.name"].strip()) + ".jpg", r["classification"].strip().lower()
        if code in OSTEO:
            patient = re.match(r"case-?\d+", name, re.I)
            yield labelled("osteo", name, code, OSTEO, f"osteo-{patient[0].lower() if patient else stem(name)}", "bone")
        else:
            drop(where, "a mixed or unknown class", code)


def skincancer(root, drop):
    """tiles-v2.csv: file, class, set. The slide is the number behind _ws_."""
    base = next((d for d in ("data/", "") if (Path(root) / d / "tiles-v2.csv").is_file()), "")
    sets = {"Train": "train", "Validation": "val", "Test": "test"}
    for where, r in table(Path(root) / base / "tiles-v2.csv", ("file", "class", "set"), drop):
        code, slide = r["class"], re.search(r"_ws_(\d+)_", r["file"])
        if code.rsplit("_", 1)[-1] not in SKIN or r["set"] not in sets:
            drop(where, "unknown class or set", f"{code}, {r['set']}")
            continue
        names = {code: SKIN[code.rsplit("_", 1)[-1]]}
        yield labelled("skincancer", base + r["file"].removeprefix("data/"), code, names,
                       f"skincancer-{slide[1] if slide else stem(r['file'])}", "skin", split=sets[r["set"]])


def renalcell(root, drop):
    """Tiles of TCGA (train) and of Helsinki (test), as UNI splits them; group = patient or slide."""
    for name, code in class_folders(root, RENAL):
        tcga, slide = re.match(r"TCGA-\w\w-\w{4}", stem(name)), stem(name).split(".mrxs")[0]
        yield labelled("renalcell", name, code, RENAL, tcga[0] if tcga else f"renalcell-{slide}", "kidney",
                       split="train" if tcga else "test")


def bcss(root, drop, side=224, share=0.5):
    """Regions with masks -> tiles of `side` px, class = the tissue that covers `share` of the tile or more. Test = the
    institutes OL, LL, E2, EW, GM, S3."""
    import numpy as np
    from PIL import Image

    from nanopatho.image import ImageError, open_image
    codes = next(iter(sorted(Path(root).rglob("gtruth_codes.tsv"))), Path(root) / "meta" / "gtruth_codes.tsv")
    names = {int(r["GT_code"]): r["label"] for _, r in table(codes, ("label", "GT_code"), drop, delimiter="\t")}
    for path in sorted(p for p in Path(root).rglob("*.png") if p.parent.name in ("rgbs_colorNormalized", "images")):
        try:
            image, mask = np.asarray(open_image(path)), np.asarray(Image.open(path.parents[1] / "masks" / path.name))
        except (ImageError, OSError) as error:
            drop(str(path), "the region or its mask cannot be read", str(error))
            continue
        if mask.shape != image.shape[:2]:
            drop(str(path), "region and mask differ in size", f"{image.shape[:2]}, {mask.shape}")
            continue
        patient = path.name[:12]
        for y in range(0, mask.shape[0] - side + 1, side):
            for x in range(0, mask.shape[1] - side + 1, side):
                count = np.bincount(mask[y:y + side, x:x + side].ravel())
                code = int(count.argmax())
                if names.get(code, "outside_roi") in ("outside_roi", "exclude") or count[code] < share * side * side:
                    drop(f"{path} at {x}, {y}", "no tissue class covers the tile")
                    continue
                file = io.BytesIO()
                Image.fromarray(image[y:y + side, x:x + side]).save(file, "PNG")
                tissue = {names[code]: names[code].replace("_", " ")}
                split = "test" if patient[5:7] in ("OL", "LL", "E2", "EW", "GM", "S3") else "train"
                yield labelled("bcss", f"{stem(path.name)}-{x}-{y}", names[code], tissue, patient, "breast",
                               split=split, _bytes=file.getvalue())


def folder(root, drop, pattern=r"[^_]+"):
    """[train|val|test/]CLASS/GROUP_….jpg: group = what `pattern` matches at the start of the name (region, patient)."""
    splits = [s for s in ("train", "val", "test") if (Path(root) / s).is_dir()]
    for split in splits or [None]:
        for name, code in class_folders(Path(root) / (split or "")):
            group = re.match(pattern, stem(name))
            yield labelled("folder", f"{split}/{name}" if split else name, code, {code: code.replace("_", " ")},
                           group[0] if group else stem(name), None, split=split)
