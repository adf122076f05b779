"""data_prep/articles.py against the standard library's XML reader on real articles, and against articles written
here."""

import io
import json
import os
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lxml", reason="lxml is not installed (extra `data`)")
from data_prep import articles  # noqa: E402

SHARED = Path(os.environ.get("NANOPATHO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "nxml"

FIG = """<fig id="{id}"><label>Figure {n}</label><caption><title>Colon.</title><p>{text}</p>
<p>Scale bar, 50 &#x003bc;m.</p></caption><graphic xlink:href="{href}"/></fig>"""


def article(body, pmc="77", license='<license xlink:href="http://creativecommons.org/licenses/by/4.0/"/>', head=""):
    return (f'<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE article SYSTEM "none.dtd"{head}>'
            f'<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML">'
            f'<front><article-meta><article-id pub-id-type="pmc">{pmc}</article-id>'
            f'<permissions>{license}</permissions></article-meta>'
            f'</front><body>{body}</body></article>').encode()


def found(body, **more):
    return articles.figures(articles.parse(article(body, **more), "a.nxml"), "a.nxml")


def panels(n, side=100, gutter=8):
    """A row of n panels of noise that is nowhere white, on white."""
    rng = np.random.default_rng(n)
    out = np.full((side + 20, n * (side + gutter) + 12, 3), 255, np.uint8)
    for i in range(n):
        out[10:-10, 10 + i * (side + gutter):10 + i * (side + gutter) + side] = rng.integers(40, 200,
                                                                                             (side, side,
                                                                                              3)) // 4 * 4 + i
    return out


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real samples at {SHARED}: set NANOPATHO_SHARED to their root")
def test_real_articles_lose_nothing():
    """100 % of the figures and of the caption characters, against itertext of the standard library; references too."""
    figures = characters = 0
    for path in sorted(SHARED.glob("*.nxml")):
        tree = ElementTree.parse(path).getroot()
        got = articles.figures(articles.parse(path.read_bytes(), path), path)
        truth = {f.get("id"): "".join("".join(f.find("caption").itertext()).split()) for f in tree.iter("fig")}
        assert {f["id"].split("/")[1]: "".join(f["caption"].split()) for f in got} == truth
        for f in got:
            cited = [p for p in tree.iter("p") if any(x.get("rid") == f["id"].split("/")[1] for x in p.iter("xref"))]
            said = ["".join("".join(p.itertext()).split()) for p in cited]
            assert ["".join(t.split()) for t in f["inline_ref"]] == list(dict.fromkeys(said))
            assert f["license"] in ("CC BY", "CC BY 2.0") and articles.is_free(f["license"])
            assert [e.attrib for g in tree.iter("fig") if g.get("id") == f["id"].split("/")[1]
                    for e in g.iter("graphic")
                    ][0]["{http://www.w3.org/1999/xlink}href"] == f["graphics"][0]
        figures, characters = figures + len(truth), characters + sum(map(len, truth.values()))
    assert figures == 7 and characters == 3768


def test_traps_of_nxml():
    """Ranges of citations, alternatives, groups, a figure inside a paragraph, formulas, named entities, no caption."""
    body = ('<p>See <xref ref-type="fig" rid="a">Figs. 1</xref>–<xref ref-type="fig" rid="c">3</xref> and B cells.'
            + FIG.format(id="a", n=1, text="Cells&nbsp;&lt; 5 <italic>E. coli</italic>", href="x/../../a.tif") + '</p>'
            + FIG.format(id="b", n=2,
                         text='<inline-formula><alternatives><mml:math><mml:mi>x</mml:mi></mml:math><tex-math>'
                         r'\documentclass{m}</tex-math></alternatives></inline-formula> nuclei', href="b")
            + '<fig-group><label>Figure 3</label><caption><p>Group.</p></caption><fig id="c"><caption>'
            '<p>Own.</p></caption>'
            '<alternatives><graphic xlink:href="c.tif"/><graphic xlink:href="c.jpg"/></alternatives></fig></fig-group>'
            '<fig id="d"><label>Figure 4</label><graphic xlink:href="d"/></fig>')
    a, b, c, d = found(body)
    assert a["caption"] == "Colon. Cells < 5 E. coli Scale bar, 50 μm." and a["graphics"] == ["a.tif"]
    assert a["inline_ref"] == b["inline_ref"] == c["inline_ref"] == ["See Figs. 1–3 and B cells."]
    assert b["caption"] == "Colon. x nuclei Scale bar, 50 μm."
    assert (c["caption"], c["label"], c["graphics"]) == ("Group. Own.", "Figure 3", ["c.tif"])
    assert (d["caption"], d["graphics"], d["id"]) == ("", ["d"], "PMC77/d")  # never the caption of the one before


@pytest.mark.parametrize("license, name, free", [
    ('<license xlink:href="https://creativecommons.org/licenses/by-nc-nd/4.0/"/>', "CC BY-NC-ND 4.0", False),
    ('<license><p><ext-link xlink:href="http://creativecommons.org/publicdomain/zero/1.0/"/></p></license>',
     "CC0", True),
    ("<copyright-statement>under the Creative Commons Attribution License</copyright-statement>", "CC BY", True),
    ("<license><p>Creative Commons Attribution-Non-Commercial-Share Alike</p></license>", "CC BY-NC-SA", False),
    ("<copyright-statement>All rights reserved</copyright-statement>", "unknown: All rights reserved", False),
    ("", "unknown: nothing stated", False)])
def test_licences(license, name, free):
    (figure,) = found(FIG.format(id="a", n=1, text="x", href="a"), license=license)
    assert figure["license"] == name and articles.is_free(name) == free
    (figure,) = found(FIG.format(id="a", n=1, text="Reproduced with permission of the publisher", href="a"))
    assert not articles.is_free(figure["license"])


@pytest.mark.parametrize("caption, stem, texts", [
    ("Colon. (A) Crypts, see (B). (B) Adenoma (H&E). Scale bar, 50 µm.", "Colon. Scale bar, 50 µm.",
     {"A": "Crypts, see (B).", "B": "Adenoma (H&E)."}),
    ("Biopsy. Normal crypts (a) and adenoma (b). H&E.", "Biopsy. H&E.", {"A": "Normal crypts", "B": "adenoma"}),
    ("Liver. (A–C) H&E; (D, E) reticulin.", "Liver.",
     {"A": "H&E", "B": "H&E", "C": "H&E", "D": "reticulin.", "E": "reticulin."}),
    ("A, Gland. B, Hepatitis B; C, vitamin A.", "", {"A": "Gland.", "B": "Hepatitis B", "C": "vitamin A."}),
    ("肝组织：（A）正常肝小叶；（B）肝硬化。比例尺：50 μm", "肝组织： 比例尺：50 μm", {"A": "正常肝小叶", "B": "肝硬化。"}),
    ("Hepatitis B virus (HBV) in group A (H&E, x200).", "Hepatitis B virus (HBV) in group A (H&E, x200).", {})])
def test_captions_come_apart(caption, stem, texts):
    got = articles.split_caption(caption)
    assert (got[0].replace(" ;", ";"), got[1]) == (stem, texts)


def test_images_come_apart():
    """Boxes against the places where panels were drawn; a letter in the margin is none; tissue without gutters stays
    whole."""
    sheet = np.full((400, 520, 3), 255, np.uint8)
    places = [(20, 30, 240, 180), (260, 30, 500, 180), (20, 200, 500, 390)]
    for x0, y0, x1, y1 in places:
        sheet[y0:y1, x0:x1] = np.random.default_rng(x0 + y0).integers(0, 220, (y1 - y0, x1 - x0, 3))
    sheet[5:25, 20:30] = 0                                                # a printed letter
    assert articles.split_image(sheet) == places
    assert articles.split_image(sheet[40:170, 30:230]) == [(0, 0, 200, 130)]
    assert articles.split_image(np.full((100, 100, 3), 255, np.uint8)) == []


def package(path, name, data, pictures, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        for member, content in [(f"PMC/{name}.nxml", data), *((f"PMC/{n}", c) for n, c in pictures.items()), *extra]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_packages_to_records(tmp_path, capsys):
    """Packages -> records, one a panel; hostile and broken ones are named, the rest goes on; a second call adds
    nothing; a killed call's half line is cut off."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    text = "(A) Normal crypts. (B) Tubular adenoma."
    body = FIG.format(id="F1", n=1, text=text, href="f1") + FIG.format(id="F2", n=2, text="One field.",
                                                                       href="../../f2.png")
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 200, (90, 90, 3), dtype=np.uint8))
    whole.save(tmp_path / "f2.jpg")
    jpeg = (tmp_path / "f2.jpg").read_bytes()
    package(raw / "1.tar.gz", "one", article(body), {"f1.png": png(panels(2)), "f2.jpg": jpeg, "f1.gif": b"x"},
            extra=[("../../evil.png", b"x")])
    bomb = '[<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]'
    (raw / "2.nxml").write_bytes(article(FIG.format(id="F1", n=1, text="&b;&c;", href="f2"), pmc="2", head=bomb))
    (raw / "3.nxml").write_bytes(article(FIG.format(id="F1", n=1, text="caf\xe9", href="f2"),
                                         pmc="3").replace("é".encode(), b"\xe9"))
    (raw / "4.nxml").write_bytes(article("<fig>", pmc="4"))
    (raw / "5.tar.gz").write_bytes((raw / "1.tar.gz").read_bytes()[:200])
    (raw / "6.nxml").write_bytes(article(FIG.format(id="F1", n=1, text="\0", href="f2"), pmc="6"))
    (raw / "7.nxml").write_bytes(article(FIG.format(id="F1", n=1, text="Lost.", href="gone"), pmc="8"))
    (raw / "8.nxml").write_bytes(article(body, pmc="77"))
    (raw / "f1.png").write_bytes(png(panels(2))), (raw / "f2.png").write_bytes(png(panels(1)))
    assert articles.main([str(raw), "--out", str(out)]) == 1
    told = capsys.readouterr().out
    for words in ("2.nxml: declares XML entities", "3.nxml: not UTF-8", "4.nxml: not well-formed",
                  "5.tar.gz: holds 0 .nxml",
                  "6.nxml: not well-formed", "gone: no such picture", "PMC77 was already read from", "evil.png",
                  "5 refused"):
        assert words in told, words
    records = [json.loads(line) for line in (out / "figures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["id"], r.get("panel"), r["caption"]) for r in records] == [
        ("PMC77/F1/A", "A", "Colon. Scale bar, 50 μm. Normal crypts."),
        ("PMC77/F1/B", "B", "Colon. Scale bar, 50 μm. Tubular adenoma."),
        ("PMC77/F2", None, "Colon. One field. Scale bar, 50 μm.")]
    for r, i in zip(records, (0, 1)):
        assert np.array_equal(np.asarray(Image.open(out / r["image"])), panels(2)[10:-10, 10 + 108 * i:110 + 108 * i])
    assert (out / records[2]["image"]).read_bytes() == jpeg              # kept as it came
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "out", "f2.jpg"} and not list(tmp_path.rglob("evil*"))

    before = (out / "figures.jsonl").read_bytes()
    with open(out / "figures.jsonl", "ab") as file:
        file.write(b'{"id": "half')
    with open(out / "journal.jsonl", "ab") as file:
        file.write(b'{"name": "ha')
    articles.main([str(raw), "--out", str(out)])
    assert (out / "figures.jsonl").read_bytes() == before
    assert len((out / "journal.jsonl").read_text().splitlines()) == 8
    with pytest.raises(SystemExit, match="no such file"):
        articles.main([str(tmp_path / "none"), "--out", str(out)])
