"""data_prep/pdf.py against PDFs written here, byte by byte, so that it is known which picture belongs to which
caption."""

import base64
import io
import json
import random
import re
import threading
import zlib
from itertools import permutations
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed (extra `data`)")
from data_prep import pdf, pdf_page  # noqa: E402
from data_prep.articles import ArticleError  # noqa: E402
from data_prep.records import validate  # noqa: E402
from nanopatho.endpoint import Journal  # noqa: E402
from nanopatho.log import ConfigError  # noqa: E402

# --- a PDF writer: Helvetica, a Chinese font that needs no file, raw RGB pictures -------------------------------------


def write_pdf(path, pages):
    """pages: list of (width, height, rotate, content bytes, [uint8 (H, W, 3) pictures, named /I0, /I1 …])."""
    objects = [b"", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
               b"<</Type/Font/Subtype/CIDFontType0/BaseFont/STSong-Light/CIDSystemInfo<</Registry(Adobe)/Ordering(GB1)"
               b"/Supplement 2>>/DW 1000/FontDescriptor 5 0 R>>",
               b"<</Type/FontDescriptor/FontName/STSong-Light/Flags 4/FontBBox[-25 -254 1000 880]/ItalicAngle 0"
               b"/Ascent 880/Descent -120/CapHeight 880/StemV 93>>",
               b"<</Type/Font/Subtype/Type0/BaseFont/STSong-Light/Encoding/UniGB-UCS2-H/DescendantFonts[4 0 R]>>"]
    kids = []
    for width, height, rotate, content, pictures in pages:
        names = b""
        for i, picture in enumerate(pictures):
            data = zlib.compress(picture.tobytes())
            objects.append(b"<</Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceRGB/BitsPerComponent 8"
                           b"/Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (
                               picture.shape[1], picture.shape[0], len(data), data))
            names += b"/I%d %d 0 R" % (i, len(objects))
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
        objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Rotate %d/Contents %d 0 R/Resources<</Font<<"
                       b"/F1 3 0 R/F2 6 0 R>>/XObject<<%s>>>>>>" % (width, height, rotate, len(objects), names))
        kids.append(len(objects))
    objects[0] = b"<</Type/Catalog/Pages 2 0 R>>"
    objects[1] = b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(kids), b" ".join(b"%d 0 R" % k for k in kids))
    out, places = b"%PDF-1.5\n", []
    for i, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % p for p in places)
    out += b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>startxref\n%d\n%%%%EOF" % (
        len(objects) + 1, table, len(objects) + 1, len(out))
    path.write_bytes(out)
    return path


class Page:
    """A page drawn in display coordinates (points, y down); `turns` quarter turns of everything on it."""

    def __init__(self, width=595, height=842, turns=0, rotate=0):
        self.size, self.turns, self.rotate, self.ops, self.pictures = (width, height), turns, rotate, [], []

    def text(self, x, y, text, size=9.5):
        """y: baseline."""
        font, shown = ("F1", "(" + re.sub(r"([()\\])", r"\\\1", text) + ")") if text.isascii() else (
            "F2", "<" + text.encode("utf-16-be").hex() + ">")
        self.ops.append(f"BT /{font} {size} Tf 1 0 0 1 {x:.1f} {self.size[1] - y:.1f} Tm {shown} Tj ET")

    def picture(self, x, y, w, h, array):
        self.ops.append(f"q {w:.1f} 0 0 {h:.1f} {x:.1f} {self.size[1] - y - h:.1f} cm /I{len(self.pictures)} Do Q")
        self.pictures.append(array)

    def done(self):
        w, h = self.size
        matrix = ["1 0 0 1 0 0", f"0 1 -1 0 {h} 0", f"-1 0 0 -1 {w} {h}", f"0 -1 1 0 0 {w}"][self.turns]
        sheet = (w, h) if self.turns % 2 == 0 else (h, w)
        return (*sheet, self.rotate, f"{matrix} cm\n{chr(10).join(self.ops)}".encode(), self.pictures)


def tile(number, shape=(48, 64)):
    """A picture of one colour that is its number, with a white upper left corner that shows which way up it is."""
    array = np.empty((*shape, 3), np.uint8)
    array[:] = 30 + number % 200, 30 + number // 200, 90
    array[:8, :8] = 255
    return array


def number_of(image):
    array = np.asarray(image.convert("RGB"))
    assert (array[2, 2] == 255).all() and (array[-3, -3] != 255).any(), "the picture is not upright"
    r, g, _ = array[array.shape[0] // 2, array.shape[1] // 2].tolist()
    return r - 30 + 200 * (g - 30)


# --- documents as publishers set them ---------------------------------------------------------------------------------

WORDS = ("tumour glands stroma nuclei atypia mitoses necrosis lymphocytes epithelium invasion margin lesion cells "
         "pattern with of the in and showing marked focal dense irregular small large").split()
HAN = "肿瘤腺体间质细胞核异型坏死淋巴浸润上皮组织结构明显可见分布灶性"


class Book:
    """Pages with columns, running text that cites figures, and figures; `truth` is the set of (picture, label)."""

    def __init__(self, seed, pages):
        self.rng = rng = random.Random(seed)
        self.columns, self.chinese = 1 + seed % 3, seed % 4 == 3
        self.side = ("below", "above", "beside")[seed // 3 % 3] if self.columns == 1 else ("below", "above")[seed % 2]
        self.turns = [(0, 0), (1, 90), (0, 0), (1, 0), (2, 180), (3, 270)][seed % 6]
        self.truth, self.across, self.pages, self.pending = set(), set(), [], None
        self.figure, self.number = 0, seed * 1000
        for n in range(pages):
            self.page = Page(*((595, 842) if rng.random() < 0.8 else (612, 792)), *self.turns)
            self.one_page(n, n == pages - 1)
            self.pages.append(self.page)

    def words(self, n):
        return "".join(self.rng.choices(HAN, k=n)) + "。" if self.chinese else " ".join(self.rng.choices(WORDS,
                                                                                                        k=n)) + "."

    def lines(self, text, width, size):
        """Wrapped so that a line is surely not wider than `width`."""
        if self.chinese:
            n = int(width / size)
            return [text[i:i + n] for i in range(0, len(text), n)]
        out, line = [], ""
        for word in text.split():
            if len(line) + len(word) + 1 > width / (0.52 * size):
                out, line = [*out, line], ""
            line = f"{line} {word}".strip()
        return [*out, line]

    def block(self, x, y, width, text, size, pitch):
        """Draw wrapped text from y down -> y below it."""
        for line in self.lines(text, width, size):
            y += pitch
            self.page.text(x, y - 0.25 * size, line, size)
        return y

    def paragraph(self, x, y, width, room):
        """Running text that cites a figure in passing, once so that a line begins with the citation."""
        cite = self.rng.randint(1, self.figure + 1)
        text = self.words(30) + (f"如图{cite}所示，" if self.chinese else f" As in Figure {cite}. ") + self.words(20)
        lines = self.lines(text, width, 9.5)[:max(2, int(room / 12))]
        if not self.chinese and len(lines) > 2 and self.rng.random() < 0.5:
            lines[1] = f"Figure {cite}. The glands" if self.rng.random() < 0.5 else f"Fig. {cite} shows the"
        for line in lines:
            y += 12
            self.page.text(x, y - 2.4, line)
        return y

    def caption(self, panels):
        self.figure += 1
        letters = "ABCDEF"[:panels] if panels > 1 else ""
        if self.chinese:
            parts = "".join(f"（{c}）{self.words(8)}" for c in letters) or self.words(20)
            return self.rng.choice((f"图{self.figure} ", f"图 {self.figure}．")) + parts
        start = self.rng.choice((f"Figure {self.figure}. ", f"Fig. {self.figure} ", f"FIGURE {self.figure}: ",
                                 f"Fig. {self.figure}. "))
        return start + "Tumour. " + (" ".join(f"({c}) {self.words(4).capitalize()}" for c in letters) or self.words(12))

    def figure_at(self, x, y, width, room, split=None):
        """A figure with its caption inside `room` points -> y below it, or None where it does not fit."""
        rng, panels = self.rng, self.rng.choice((1, 1, 2, 3, 4, 4, 6))
        across = {1: 1, 2: 2, 3: 3, 4: 2, 6: 3}[panels]
        beside = self.side == "beside" and not split
        inner, space = width * (0.55 if beside else 1), rng.uniform(3, 9)
        w = (inner - space * (across - 1)) / across
        h = w * rng.uniform(0.6, 0.8) if panels > 1 else min(w * 0.7, 220)
        rows, gap, size = -(-panels // across), rng.uniform(4, 10), 8
        tall = rows * h + (rows - 1) * space
        self.figure += 1
        label, self.figure = self.figure, self.figure - 1
        caption = None if split == "picture" else self.caption(panels)
        text_width = width * 0.4 if beside else width
        text = 10 * len(self.lines(caption, text_width, size)) if caption else 0
        if (max(tall, text) if beside else tall + gap + text) > room:
            self.figure -= bool(caption)
            return None
        top = y + (gap + text if self.side == "above" and caption and not beside else 0)
        for p in range(panels):
            self.number += 1
            px, py = x + p % across * (w + space), top + p // across * (h + space)
            self.page.picture(px, py, w, h, tile(self.number))
            (self.across if split else self.truth).add((self.number, str(label)))
            if panels > 1 and rng.random() < 0.5:
                self.page.text(px + 3, py + 9, "ABCDEF"[p], 8)
        if split == "picture":
            self.pending = panels
            return top + tall
        if beside:
            self.block(x + width * 0.6, y, text_width, caption, size, 10)
            return y + max(tall, text)
        self.block(x, y if self.side == "above" else y + tall + gap, width, caption, size, 10)
        return y + tall + gap + text

    def one_page(self, n, end):
        page, rng, margin = self.page, self.rng, 48
        width, height = page.size
        page.text(margin, 30, "Atlas of tumours", 8)
        page.text(width / 2, height - 25, str(n + 1), 8)
        page.picture(width - 70, 18, 16, 16, tile(0))                     # a logo on every page
        column = (width - 2 * margin - 18 * (self.columns - 1)) / self.columns
        for c in range(self.columns):
            x, y, last = margin + c * (column + 18), 55.0, c == self.columns - 1
            if self.pending and c == 0:  # the caption of the figure that ended the last page
                y = self.block(x, y, column, self.caption(self.pending), 8, 10) + 16
                self.pending = None
            while height - 60 - y > 60:
                room, kind = height - 60 - y, rng.random()
                if kind < 0.5:
                    after = self.figure_at(x, y, column, room)
                    if after is None:
                        if last and not end and self.side == "below" and rng.random() < 0.5:
                            after = self.figure_at(x, y, column, room, split="picture")
                            if after is not None:
                                break
                        after = self.paragraph(x, y, column, min(room, 60))
                elif kind < 0.56:
                    after = self.block(x, y, column, "Table 1. " + self.words(6), 8, 10)
                else:
                    after = self.paragraph(x, y, column, min(room, rng.choice((40, 80, 130))))
                y = after + rng.uniform(14, 22)


def read(path, out, **more):
    return pdf.read_pdf(path, out, {"backend": "text", "license": "CC BY 4.0", **more})


def test_200_pages_are_paired(tmp_path):
    """Precision and recall of (picture, caption) pairs over 200 generated pages; every picture upright, every label
    right."""
    totals, across, bad = np.zeros(3, int), np.zeros(2, int), []
    for seed in range(20):
        book = Book(seed, 10)
        records, _, problems = read(write_pdf(tmp_path / f"b{seed}.pdf", [p.done() for p in book.pages]),
                                    tmp_path / "out")
        assert not problems
        found = {(number_of(Image.open(tmp_path / "out" / r["image"])), r["label"].split()[-1]) for r in records}
        truth = book.truth | book.across
        totals += len(found & truth), len(found), len(truth)
        across += len(found & book.across), len(book.across)
        bad.append((seed, book.columns, book.side, book.turns, sorted(found - truth), sorted(truth - found)))
    right, found, true = totals
    print(f"{true} pairs: precision {right / found:.4f}, recall {right / true:.4f}; across pages {across}")
    assert true > 2000 and across[1] > 20
    assert right / found >= 0.95 and right / true >= 0.95 and across[0] / across[1] >= 0.9, bad


# --- single figures ---------------------------------------------------------------------------------------------------


def one(tmp_path, *pages, **more):
    """Pages -> (records, counts, problems); records carry their picture as an array under "pixels"."""
    got = read(write_pdf(tmp_path / "doc.pdf", [p.done() for p in pages]), tmp_path / "out", **more)
    for r in got[0]:
        r["pixels"] = np.asarray(Image.open(tmp_path / "out" / r["image"]))
    return got


def noise(seed, h=60, w=80):
    return np.random.default_rng(seed).integers(0, 200, (h, w, 3), dtype=np.uint8)


def test_panels_take_the_letters_printed_on_them(tmp_path):
    """Native pixels, the stem before each panel's text; letters printed column by column beat reading order."""
    page = Page()
    for i, (x, y) in enumerate(((50, 60), (200, 60), (50, 170), (200, 170))):
        page.picture(x, y, 140, 100, noise(i))
        page.text(x + 4, y + 12, "ACBD"[i], 10)
    page.text(50, 285, "Figure 7. Liver biopsy. (A) Portal tract; (B) lobule; (C) bile duct; (D) vein.", 8)
    records, counts, _ = one(tmp_path, page)
    said = {"A": "Portal tract", "B": "lobule", "C": "bile duct", "D": "vein."}
    assert {r["panel"]: r["caption"] for r in records} == {k: f"Liver biopsy. {v}" for k, v in said.items()}
    for r in records:
        assert np.array_equal(r["pixels"], noise("ACBD".index(r["panel"]))) and r["license"] == "CC BY 4.0"
    assert counts["figures"] == 1 and counts["pictures without caption"] == 0


def test_one_picture_with_gutters_is_cut(tmp_path):
    sheet = np.full((120, 260, 3), 255, np.uint8)
    sheet[10:110, 10:120], sheet[10:110, 140:250] = noise(1, 100, 110), noise(2, 100, 110)
    page = Page()
    page.picture(50, 60, 260, 120, sheet)
    page.text(50, 192, "Fig. 2 Skin. (a) Epidermis. (b) Dermis.", 8)
    records, _, _ = one(tmp_path, page)
    assert [r["caption"] for r in records] == ["Skin. Epidermis.", "Skin. Dermis."]
    assert np.array_equal(records[1]["pixels"], noise(2, 100, 110))


def test_references_come_from_the_page_and_its_neighbours(tmp_path):
    """Sentences that cite the figure, ranges too, two pages away no more; hyphens at line ends are undone."""
    pages = [Page() for _ in range(4)]
    pages[0].text(50, 100, "Two pages away Figure 3 is not a reference of this figure at all.")
    pages[1].text(50, 100, "The tumour shows gland for-")
    pages[1].text(50, 112, "mation (Figs. 2-4). Nothing is said here. Figure 30 is another one.")
    pages[2].picture(50, 60, 150, 100, noise(0))
    pages[2].text(50, 172, "Figure 3. Adenocarcinoma.", 8)
    pages[2].text(50, 300, "Atypia was marked (Fig. 3B). Mitoses in Figures 1 and 2 were few and far.")
    pages[3].picture(50, 60, 150, 100, noise(1))
    pages[3].text(50, 172, "Figure 3. (continued)", 8)
    pages[3].text(50, 300, "As Figures 2 and 3 prove, the margin was free of any tumour cells.")
    records, _, _ = one(tmp_path, *pages)
    assert records[0]["inline_ref"] == ["The tumour shows gland formation (Figs. 2-4).", "Atypia was marked (Fig. 3B).",
                                        "As Figures 2 and 3 prove, the margin was free of any tumour cells."]
    assert [r["caption"] for r in records] == ["Adenocarcinoma."] * 2


def test_strips_mirrors_and_forms_of_pictures(tmp_path):
    """A picture stored in strips is one again; a picture stored upside down and mirrored comes out as it is seen."""
    page, whole = Page(), np.add.outer(np.arange(90), np.arange(120))[..., None].repeat(3, 2).astype(np.uint8)
    for i in range(3):
        page.picture(50, 60 + 45 * i, 180, 45, whole[30 * i:30 * i + 30])
    page.text(50, 210, "Figure 1. In strips.", 8)
    page.ops.append("q 180 0 0 -135 50 500 cm /I3 Do Q")                  # drawn with y down
    page.pictures.append(noise(6)[::-1])
    page.text(50, 500, "Figure 2. Flipped.", 8)
    records, _, _ = one(tmp_path, page)
    assert [r["caption"] for r in records] == ["In strips.", "Flipped."]
    got = np.asarray(Image.fromarray(records[0]["pixels"]).resize((120, 90), Image.Resampling.BOX)).astype(int)
    assert np.abs(got - whole)[2:-2, 2:-2].max() < 8                      # rendered: within the blur of resampling
    assert np.array_equal(records[1]["pixels"], noise(6))


def test_scanned_page(tmp_path):
    """A page that is one picture: refused without text; with OCR's text above it, its figure is cut out."""
    scan = np.full((842, 595, 3), 255, np.uint8)
    scan[100:300, 60:360] = 90
    scan[315:322, 60:300] = 0                                            # the printed caption
    page = Page()
    page.picture(0, 0, 595, 842, scan)
    records, counts, problems = one(tmp_path, page)
    assert not records and counts["unreadable pages"] == 1 and "page 1: a scan without text" in problems[0]
    page.text(60, 321, "Figure 4. A scanned section of liver", 9)
    page.text(60, 330, "with its caption in two lines.", 9)
    records, _, _ = one(tmp_path, page)
    (r,) = records
    assert r["caption"] == "A scanned section of liver with its caption in two lines."
    assert abs(r["pixels"].shape[0] / r["pixels"].shape[1] - 200 / 300) < 0.02 and (r["pixels"][5:-5, 5:-5] == 90).all()


def test_lines_of_tesseract():
    """The TSV form of its manual: words of one line joined, boxes in points, weak words and other levels left out."""
    head = "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext"
    rows = ["4\t1\t1\t1\t1\t0\t100\t200\t300\t40\t-1\t", "5\t1\t1\t1\t1\t1\t100\t200\t120\t40\t96.1\tFigure",
            "5\t1\t1\t1\t1\t2\t240\t210\t60\t30\t91\t3.", "5\t1\t1\t1\t1\t3\t320\t200\t60\t40\t12\t~~",
            "5\t1\t1\t1\t2\t1\t100\t260\t40\t40\t90\t肝", "5\t1\t1\t1\t2\t2\t150\t260\t40\t40\t90\t脏"]
    first, second = pdf_page.tsv_lines("\n".join([head, *rows]), 2.0, 10, 800)
    assert first == {"k": 0, "box": (60, -700, 160, -680), "text": "Figure 3.", "size": 20}
    assert second["text"] == "肝脏"


@pytest.fixture
def serve(monkeypatch):
    """-> start(replies) -> (address, requests seen). A reply is a text, or a status; the last one stays."""
    monkeypatch.setenv("PDF_KEY", "secret\n")
    started = []

    def start(*replies):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append({"path": self.path, "key": self.headers["Authorization"],
                              **json.loads(self.rfile.read(int(self.headers["Content-Length"])))})
                reply = replies[min(len(asked), len(replies)) - 1]
                self.send_response(200 if isinstance(reply, str) else reply)
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}],
                                             "sent": self.headers["Authorization"]}).encode())

            def log_message(self, *_):
                pass

        started.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}/v1", asked
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def answer(*figures, text=""):
    """(label, caption, bbox) … -> a model's reply"""
    return "```json\n" + json.dumps({"text": text, "figures": [dict(zip(("label", "caption", "bbox"), f))
                                                              for f in figures]}) + "\n```"


def test_endpoint(tmp_path, serve):
    """An error, garbage, then an answer; the picture is cut as told, and a second call asks nothing."""
    page = Page()
    page.picture(119, 168.4, 238, 252.6, noise(3, 100, 100))  # 0.2 … 0.6 of the width, 0.2 … 0.5 of the height
    text = "See Figure 9. It shows a rather long sentence on glands."
    url, asked = serve(500, "no json", answer(("Fig. 9", "Gland.", [200, 200, 600, 500]), text=text))
    for _ in range(2):
        with Journal(tmp_path / "answers.jsonl") as journal:
            (r,), _, problems = one(tmp_path, page, backend="endpoint", url=url, model="m", key="PDF_KEY",
                                    max_tokens=99, journal=journal)
        assert not problems and (r["caption"], r["label"], r["inline_ref"]) == ("Gland.", "Figure 9", ["See Figure 9."])
        height, width = r["pixels"].shape[:2]
        assert abs(height / width - 252.6 / 238) < 0.01 and (r["pixels"] < 230).mean() > 0.97
    assert len(asked) == 3 and (asked[0]["path"], asked[0]["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (asked[0]["model"], asked[0]["temperature"], asked[0]["max_tokens"]) == ("m", 0, 99)
    picture, text = asked[0]["messages"][0]["content"]
    sent = picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    assert max(Image.open(io.BytesIO(base64.b64decode(sent))).size) == 1536 and text["text"] == pdf_page.PROMPT


def test_a_book_at_an_endpoint_that_breaks_goes_on(tmp_path, serve, capsys):
    """The key refused at page 2, a budget out at page 3, a page refused: named; no answered page is asked for twice."""
    pages = [Page() for _ in range(4)]
    for i, page in enumerate(pages):
        page.picture(59.5, 84.2, 238, 252.6, noise(i, 100, 100))
    book, out = write_pdf(tmp_path / "book.pdf", [p.done() for p in pages]), tmp_path / "out"
    good = [answer((f"{i}", f"Gland {i}.", [100, 100, 500, 400])) for i in range(4)]
    url, asked = serve(good[0], 401, good[1], 400, good[3])
    argv = [str(book), "--out", str(out), "--license", "CC0", "--backend", "endpoint", "--url", url, "--model", "m",
            "--key", "PDF_KEY", "--max_requests"]
    with pytest.raises(ConfigError, match=r"book.pdf: page 2: http\S+: HTTP 401.*Bearer \*\*\*.*PDF_KEY"):
        pdf.main([*argv, "10"])
    with pytest.raises(ConfigError, match="book.pdf: page 3: --max_requests is used up"):
        pdf.main([*argv, "3"])
    assert len(asked) == 3 and not (out / "journal.jsonl").read_bytes()
    assert pdf.main([*argv, "10"]) == 0 and len(asked) == 5
    assert f"{book}: page 3: {url}: HTTP 400" in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]
    assert [(r["page"], r["caption"]) for r in records] == [(1, "Gland 0."), (2, "Gland 1."), (4, "Gland 3.")]
    assert b"secret" not in (out / "answers.jsonl").read_bytes() + (out / "journal.jsonl").read_bytes()
    assert pdf.main([*argv, "10"]) == 0 and len(asked) == 5


@pytest.mark.parametrize("reply, problem", [
    ("", "not the JSON"), ("[]", "not the JSON"), ("{}", "'figures'"), ('{"figures": 3}', "not the JSON"),
    ('{"figures": [3]}', "not the JSON"), ('{"figures":' + "[" * 99999 + "}", "not the JSON"),
    (answer(("1", "x", [1, 2, 3, 4]))[:-30], "raise --max_tokens"), (answer(("1", "x", None)), "not the JSON"),
    (answer(("1", "x", ["a", 2, 300, 400])), "could not convert"),
    (answer(("1", "x", [10 ** 999] * 4)), "not the JSON"),
    (answer(("7", "x", [0, 0, 500])), r"figure 7: bbox \[0.0, 0.0, 0.5\]"),
    (answer(("7", "x", [500, 0, 400, 9])), "figure 7"),
    (answer(("7", "x", [float("nan"), 0, 500, 500])), "figure 7: bbox .nan"),
    (answer(("7", "x", [0, 0, 9, 500])), "hundredth")])
def test_replies_that_cannot_be_read(reply, problem):
    with pytest.raises(ArticleError, match=problem):
        pdf_page.read_answer(reply)


def test_what_is_read_of_a_reply():
    assert pdf_page.read_answer('Sure: {"figures": []}!') == ("", [])
    assert pdf_page.read_answer(answer((3, None, [-5, "100", 2000, 400.0]), text="a").replace('"a"', '"a\nb"')) == (
        "a\nb", [("3", "", [0, 0.1, 1, 0.4])])


def test_one_number_twice_on_a_page_and_a_range_without_end(tmp_path):
    """Two figures 3 keep a picture and an id each; a range that no book has is not counted through."""
    page = Page()
    page.picture(50, 60, 150, 100, noise(1))
    page.text(50, 172, "Figure 3. Liver of the first case.", 8)
    page.picture(50, 400, 150, 100, noise(2))
    page.text(50, 512, "Figure 3. Liver of the second case.", 8)
    page.text(50, 640, "As seen in Figs. 2-4, and not in Figs. 1-99999999999999, the liver is large.")
    records, counts, _ = one(tmp_path, page)
    assert [r["caption"] for r in records] == ["Liver of the first case.", "Liver of the second case."]
    assert len({r["id"] for r in records}) == 2 and counts["figures"] == 2 and counts["captions without picture"] == 0
    assert all(np.array_equal(r["pixels"], noise(i)) and len(r["inline_ref"]) == 1 for i, r in enumerate(records, 1))


def test_least_total_distance():
    """The assignment of captions to pictures against all permutations."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, m = int(rng.integers(1, 5)), int(rng.integers(5, 7))
        cost = rng.random((n, m))
        chosen = pdf.assign(cost)
        assert len(set(chosen)) == n
        assert cost[range(n), chosen].sum() == pytest.approx(min(cost[range(n), list(p)].sum()
                                                                 for p in permutations(range(m), n)))


@pytest.mark.parametrize("text, label", [
    ("Figure 3. Liver", "3"), ("FIG. 2A: Skin", "2A"), ("Fig. 1-2 Colon", "1-2"), ("图3-2 肝组织", "3-2"), ("图 5：肾", "5"),
    ("Figure 4", "4"), ("Figure 3 shows the", None), ("图3显示肝", None), ("Figures of speech", None),
    ("Table 1. Figure 2", None)])
def test_what_begins_like_a_caption(text, label):
    assert pdf_page.caption_label(text) == label


def test_command(tmp_path, capsys):
    """Broken files are named and the rest goes on; a second call finds all done; the figures are valid records."""
    page = Page()
    page.picture(50, 60, 150, 100, noise(0))
    page.text(50, 172, "Figure 3. Adenocarcinoma of the colon.", 8)
    (tmp_path / "in").mkdir()
    write_pdf(tmp_path / "in" / "good.pdf", [page.done()])
    (tmp_path / "in" / "bad.pdf").write_bytes(b"%PDF-1.5\n\0 broken \xff")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--license", "CC0"]
    assert pdf.main(arguments) == 1
    told = capsys.readouterr().out
    assert "bad.pdf: cannot be opened" in told and "1 records of 2 files" in told
    first = (tmp_path / "out" / "figures.jsonl").read_bytes()
    pdf.main(arguments)
    assert (tmp_path / "out" / "figures.jsonl").read_bytes() == first
    assert validate(tmp_path / "out" / "figures.jsonl") == []
