"""The public sets: what each is for, how large, under which licence, what stands in between, how to get and convert it.

One table, SOURCES, read by `python -m data_prep list`, `fetch` and `convert`. Fields of an entry:
  use      what it is good for; "test only" sets get split "test" and must never be trained on
  size     download, and what is in it
  licence  as the publisher states it (convert writes it into every record); "?" = not stated or not checked by us
  gate     what a person must do first, or "none"
  files    the layout `convert` reads: names below the folder given to it, as published
  get      steps in order: {"zenodo": record, "names": patterns}, {"hub": data set, "names": patterns} and {"url": …,
           "md5": …} are downloaded, {"by hand": text} is printed
Sizes and counts are the publishers' or those of public audits; read a set's own licence page before you build on it.
"""

import hashlib
import io
import json
import os
from pathlib import Path

from PIL import Image

from data_prep.archives import finder, image_problem
from data_prep.records import Card, faults_of, names_of, new_folder, renamed
from nanopatho.data import DataError

ARCH = "https://warwick.ac.uk/fac/cross_fac/tia/data/arch"
RAW = "https://raw.githubusercontent.com"
SOURCES = {
    # --- pairs of image and caption: stages 0 and 1 -------------------------------------------------------------------
    "quilt1m": {
        "use": "captions", "size": "36 GB at 512 px (110 GB full), 1,017,712 pairs",
        "licence": "research only, no redistribution", "gate": "form",
        "files": "quilt_1M_lookup.csv, images anywhere below; predictions_quiltcleaner.csv if wanted",
        "get": [{"by hand": "ask for access at https://zenodo.org/records/8239942 (512 px) or by the form in "
                            "https://github.com/wisdomikezogwo/quilt1m, then put the csv and the zips here"}]},
    "pathgen": {
        "use": "captions", "size": "0.9 GB of text, 1.6 M pairs; regions of about 7,300 TCGA slides (several TB)",
        "licence": "CC-BY-4.0, research use (its page on the hub: CC-BY-NC-2.0)",
        "gate": "accept on the hub; slides by gdc-client",
        "files": "PathGen*.json; slides (WSI_ID.svs) or cut regions (WSI_ID_X_Y.jpg) anywhere below",
        "get": [{"hub": "jamessyx/PathGen", "names": ["*.json"]},
                {"by hand": "slides: `gdc-client download FILE_ID` for the file_id of each record "
                            "(https://gdc.cancer.gov/access-data/gdc-data-transfer-tool), into this folder"}]},
    "pathcap": {
        "use": "captions", "size": "12.7 GB, 223,169 pairs of PubMed figures", "licence": "CC-BY-NC-2.0",
        "gate": "accept on the hub", "files": "data.json, images anywhere below",
        "get": [{"hub": "jamessyx/PathCap", "names": ["data.json", "images.zip"]}]},
    "pmc_oa": {
        "use": "captions", "size": "1.6 M pairs of all of medicine: filter for histology",
        "licence": "per article, without NC", "gate": "none",
        "files": "pmc_oa.jsonl (captions of panels) or pmc_oa_beta.jsonl (whole), images anywhere below",
        "get": [{"hub": "axiong/pmc_oa", "names": ["pmc_oa.jsonl", "images.zip"]}]},
    "arch": {
        "use": "captions; retrieval benchmark", "size": "5.4 GB, 7,579 images", "licence": "CC-BY-NC-SA-4.0",
        "gate": "none",
        "files": "books_set/{captions.json,images}, pubmed_set/{captions.json,images}",
        "get": [{"url": f"{ARCH}/books_set.zip", "md5": "9d0d295ac888d46379ef5fabccaa689d"},
                {"url": f"{ARCH}/pubmed_set.zip"}]},
    # --- conversations and questions: stages 2 and 3, evaluation ------------------------------------------------------
    "quilt_instruct": {
        "use": "conversations", "size": "0.2 GB of text, 107 k; images of Quilt-1M", "licence": "CC-BY-NC-ND-3.0",
        "gate": "accept on the hub; form for the images", "files": "quilt_instruct_107k.json, images anywhere below",
        "get": [{"hub": "wisdomik/QUILT-LLaVA-Instruct-107K", "names": ["quilt_instruct_107k.json"]},
                {"by hand": "images: as for quilt1m; some are only in the full set"}]},
    "pathvqa": {
        "use": "questions (has a train split)", "size": "0.75 GB, 32,632 questions on 4,998 images",
        "licence": "MIT (questions); images belong to textbook publishers: never pass them on", "gate": "none",
        "files": "data/{train,validation,test}-*.parquet",
        "get": [{"hub": "flaviagiammarino/path-vqa", "names": ["data/*.parquet"]}]},
    "pathmmu": {
        "use": "test only", "size": "1.8 GB, 10,387 questions", "licence": "CC-BY-ND-4.0", "gate": "accept on the hub",
        "files": "data.json, images anywhere below; Atlas needs ARCH's books_set, PathCLS its sets (instructions.md)",
        "get": [{"hub": "jamessyx/PathMMU", "names": ["data.json", "images.zip", "*.md", "*.py", "*mapping.json"]},
                {"by hand": "SocialPath and PathCLS: follow instructions.md; Atlas: put ARCH's books_set here"}]},
    "medxpertqa_mm": {
        "use": "test only", "size": "0.5 GB, 2,000 questions, about 244 of histology", "licence": "MIT", "gate": "none",
        "files": "MM/{dev,test}.jsonl, images anywhere below",
        "get": [{"hub": "TsinghuaC3I/MedXpertQA", "names": ["MM/*.jsonl", "images.zip"]}]},
    "omnimedvqa": {
        "use": "test only", "size": "10.7 GB, 127,995 questions; convert keeps the microscopy", "licence": "per source",
        "gate": "none", "files": "OmniMedVQA/{Images,QA_information/{Open-access,Restricted-access}/*.json}",
        "get": [{"hub": "foreverbeliever/OmniMedVQA", "names": ["OmniMedVQA.zip"]}]},
    "quilt_vqa": {
        "use": "test only", "size": "0.2 GB, 985 questions", "licence": "CC-BY-NC-ND-3.0", "gate": "accept on the hub",
        "files": "data/*.parquet (the split called train is the test set)",
        "get": [{"hub": "wisdomik/Quilt_VQA", "names": ["data/*.parquet"]}]},
    # --- classes: zero-shot, few-shot, probes -------------------------------------------------------------------------
    "nct_crc": {
        "use": "classes", "size": "12.5 GB, 100,000 + 7,180 tiles, 9 classes", "licence": "CC-BY-4.0", "gate": "none",
        "files": "NCT-CRC-HE-100K/CLASS/*.tif (train), CRC-VAL-HE-7K/CLASS/*.tif (test)",
        "get": [{"zenodo": "1214456", "names": ["NCT-CRC-HE-100K.zip", "CRC-VAL-HE-7K.zip"]}]},
    "lc25000": {
        "use": "classes", "size": "25,000 tiles of 768 px: 1,250 originals x 20 copies, 5 classes",
        "licence": "? (not stated)", "gate": "login",
        "files": "{lung_aca,lung_n,lung_scc,colon_aca,colon_n}/*.jpeg, lc25000_image_groups.csv",
        "get": [{"url": f"{RAW}/GeorgeBatch/LC25000-clean/main/kaggle/lc25000_image_groups.csv"},
                {"by hand": "images: as told at https://github.com/tampapath/lung_colon_image_set, into this folder"}]},
    "patchcamelyon": {
        "use": "classes", "size": "7.5 GB, 327,680 tiles of 96 px, 2 classes", "licence": "CC0-1.0", "gate": "none",
        "files": "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 and …_meta.csv (the slide of each tile)",
        "get": [{"zenodo": "2546921", "names": ["camelyonpatch_level_2_split_*"]}]},
    "mhist": {
        "use": "classes", "size": "0.35 GB, 3,152 tiles, 2 classes", "licence": "research use agreement",
        "gate": "form", "files": "annotations.csv, images/*.png",
        "get": [{"by hand": "the form at https://bmirds.github.io/MHIST, then annotations.csv and images.zip here"}]},
    "sicapv2": {
        "use": "classes", "size": "18,783 tiles of 512 px, 4 classes", "licence": "CC-BY-4.0 ?", "gate": "by browser",
        "files": "images/*.jpg, partition/Test/{Train,Test}.xlsx",
        "get": [{"by hand": "download SICAPv2.zip from https://data.mendeley.com/datasets/9xxm58dvs3"}]},
    "bach": {
        "use": "classes", "size": "10.4 GB, 400 images, 4 classes", "licence": "CC-BY-NC-ND-4.0", "gate": "none",
        "files": "ICIAR2018_BACH_Challenge/Photos/{Normal,Benign,InSitu,Invasive}/*.tif",
        "get": [{"zenodo": "3632035", "names": ["ICIAR2018_BACH_Challenge.zip"]}]},
    "wsss4luad": {
        "use": "classes", "size": "10,091 tiles, tumour or normal", "licence": "challenge terms", "gate": "login",
        "files": "1.training/*[tumor, stroma, normal].png",
        "get": [{"by hand": "join https://wsss4luad.grand-challenge.org, put the training zip here"}]},
    "osteo": {
        "use": "classes", "size": "1,144 tiles of 1024 px, 3 classes", "licence": "CC-BY-3.0", "gate": "by browser",
        "files": "ML_Features_1144.csv, *.jpg anywhere below",
        "get": [{"url": "https://www.cancerimagingarchive.net/wp-content/uploads/ML_Features_1144.csv"},
                {"by hand": "images: https://www.cancerimagingarchive.net/collection/osteosarcoma-tumor-assessment"}]},
    "skincancer": {
        "use": "classes", "size": "3.7 GB, 129,364 tiles of 395 px, 16 classes", "licence": "? (see heiDATA)",
        "gate": "by browser", "files": "data/tiles-v2.csv, data/tiles/CLASS/*.jpg (or without data/)",
        "get": [{"by hand": "download data.zip from https://doi.org/10.11588/data/7QCR8S"}]},
    "renalcell": {
        "use": "classes", "size": "52,713 tiles, 6 classes", "licence": "CC-BY-4.0 ?", "gate": "none",
        "files": "tissue_classification/{blood,cancer,empty,normal,other,stroma}/*.png",
        "get": [{"zenodo": "7898308", "names": ["tissue_classification.zip"]}]},
    "bcss": {
        "use": "classes", "size": "5 GB, 151 regions with masks, 22 tissues", "licence": "CC0-1.0", "gate": "by script",
        "files": "rgbs_colorNormalized/*.png, masks/*.png, meta/gtruth_codes.tsv (anywhere below)",
        "get": [{"by hand": "run the download script of https://github.com/PathologyDataScience/BCSS"}]},
    "folder": {
        "use": "classes", "size": "yours", "licence": "yours", "gate": "none",
        "files": "[train|val|test/]CLASS/GROUP_….jpg",
        "get": [{"by hand": "nothing to fetch: point convert at your folder"}]},
}


def listing(names=SOURCES):
    """-> the table as text, one block a set."""
    blocks = []
    for name in names:
        s = SOURCES[name]
        blocks.append(f"{name}: {s['use']}\n  {s['size']}\n  licence: {s['licence']}; gate: {s['gate']}\n"
                      f"  files: {s['files']}\n"
                      f"  python -m data_prep fetch {name} --out raw/{name}\n"
                      f"  python -m data_prep convert {name} raw/{name} --out data/{name}")
    return "\n".join(blocks)


def convert(name, root, out):
    """A public set below `root` -> OUT/records.jsonl, and OUT/images for pictures that lay inside tables -> the Card.

    Pictures that are files stay where they are and are named relative to OUT. The name of a set is that of its adapter.
    """
    from data_prep import adapters, classification
    source, find, seen = SOURCES[name], finder(root), set()
    adapter = getattr(adapters, name, None) or getattr(classification, name)
    with new_folder(out) as folder, Card(folder, set=name, root=str(root), use=source["use"]) as card, \
            open(folder / "records.jsonl", "w", encoding="utf-8") as file:
        for record in adapter(root, card.drop):
            data, record = record.pop("_bytes", None), {k: v for k, v in record.items() if v not in (None, {}, [])}
            record = {"id": record.pop("id"), "source": name, "license": source["licence"], **record}
            try:
                if record["id"] in seen:
                    raise ValueError("an id that was there before")
                record = {**record, "image": store(data, folder)} if data else renamed(
                    record, [os.path.relpath(existing(find, n), out) for n in names_of(record)])
            except ValueError as error:
                card.drop(record["id"], str(error), names_of(record))
                continue
            faults = faults_of(record)
            for value, fault in faults:
                card.drop(record["id"], fault, value)
            if not faults:
                seen.add(record["id"])
                card.count(record)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not seen:
            dropped = card.data["dropped"] or "nothing, the files are empty"
            raise DataError(f"{root}: not one record of {name}; dropped: {dropped}")
    return card


def existing(find, name):
    path = find(name)
    if path is None:
        raise ValueError("its image is not there")
    wrong = image_problem(path)
    if wrong:
        raise ValueError(wrong)
    return path


def store(data, out):
    """Bytes of an image -> OUT/images/xx/HASH.ext, once for equal bytes; returns the relative name."""
    wrong = image_problem(io.BytesIO(data))
    try:
        with Image.open(io.BytesIO(data)) as image:
            suffix = {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError("not an image PIL knows") from error
    if wrong:
        raise ValueError(wrong)
    name = hashlib.sha256(data).hexdigest()[:32]
    path = Path(out) / "images" / name[:2] / f"{name}{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return path.relative_to(out).as_posix()
