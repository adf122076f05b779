"""What stands on a page of a PDF: lines of text, pictures, and paragraphs with captions among them; pages without text
are read by Tesseract or by a vision model at an endpoint. pdf.py pairs what is found here, and tells what a frame is.
"""
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np

from data_prep.articles import ArticleError, split_image
from nanopatho.endpoint import data_url, key_of
from nanopatho.log import ConfigError

NUMBER = r"[A-Z]?\d+(?:[.\-–]\d+)*"
FIGURE = r"(?:(?:Supplementary|Extended Data)\s+)?(?:Fig(?:ure)?s?\b\.?|FIG(?:URE)?S?\b\.?|图|圖)"
LABEL = re.compile(rf"\s*{FIGURE}\s*({NUMBER})([A-Za-z]?)(\s*)([.:：|。、．—–-]?)\s*(.*)", re.S)
PROMPT = ("This is one page of a pathology book or article. Reply with a JSON object and nothing else: "
          '{"text": the running text of the page without captions, "figures": [{"label": the figure number as printed, '
          '"caption": the whole printed caption, "bbox": [x0, y0, x1, y1]}]}. The bbox encloses the picture, not '
          "the caption, in thousandths of the page's width and height from the upper left. Copy text, add nothing. A "
          'page without figures: "figures": [].')


def turn(box, k):
    """(left, bottom, right, top) on the page -> (x0, y0, x1, y1) in frame k, and the same back again."""
    (ax, ay), (bx, by) = [[(x, -y), (y, x), (-x, y), (-y, -x)][k] for x, y in ((box[0], box[1]), (box[2], box[3]))]
    return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)


def union(a, b):
    return *map(min, a[:2], b[:2]), *map(max, a[2:], b[2:])


def text_lines(page):
    """A pdfium page -> list of lines: dict k, box (in frame k), text, size; a jump to the side begins a new line."""
    import pypdfium2.raw as raw
    text, rect, lines, last = page.get_textpage(), raw.FS_RECTF(), [], None
    for i in range(text.count_chars()):
        char = chr(raw.FPDFText_GetUnicode(text, i)).replace("\x02", "-")  # its mark for a hyphen at a line's end
        if raw.FPDFText_IsGenerated(text, i) or not char.isprintable():
            continue
        raw.FPDFText_GetLooseCharBox(text, i, rect)
        k = round(-math.degrees(raw.FPDFText_GetCharAngle(text, i)) / 90) % 4
        box = turn((rect.left, rect.bottom, rect.right, rect.top), k)
        size = box[3] - box[1]
        if last and last["k"] == k:
            x1, overlap = last["box"][2], min(last["box"][3], box[3]) - max(last["box"][1], box[1])
            if overlap > 0.4 * min(size, last["size"]) and -0.5 * size < box[0] - x1 < 1.1 * size:
                gap = " " if box[0] - x1 > 0.18 * size and not (is_cjk(char) or last["text"][-1:] == " ") else ""
                last["text"] += gap + char
                last["box"] = union(last["box"], box)
                continue
        if char != " ":
            last = {"k": k, "box": box, "text": char, "size": size}
            lines.append(last)
    return lines


def pictures(page):
    """A pdfium page -> list of dict box (on the page), matrix (a, b, c, d), object or None (then it is to be rendered).

    Left out: what is under 20 points or 32 pixels a side. Strips of one picture that touch are joined.
    """
    import pypdfium2.raw as raw
    found = []
    for thing in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]):
        matrix, outer = thing.get_matrix(), thing.container
        while outer is not None:                                         # positions inside a form are relative to it
            matrix, outer = matrix.multiply(outer.get_matrix()), outer.container
        a, b, c, d, e, f = matrix.get()
        xs, ys = (e, e + a, e + c, e + a + c), (f, f + b, f + d, f + b + d)
        box = (min(xs), min(ys), max(xs), max(ys))
        if min(box[2] - box[0], box[3] - box[1]) >= 2 and min(thing.get_px_size()) >= 2:
            found.append({"box": box, "matrix": (a, b, c, d), "object": thing,
                          "scale": max(thing.get_px_size()) / max(box[2] - box[0], box[3] - box[1])})
    whole = []
    for p in found:
        while q := next((q for q in whole if strips(p["box"], q["box"])), None):
            whole.remove(q)
            p = {"box": union(p["box"], q["box"]), "matrix": (1, 0, 0, 1), "object": None,
                 "scale": max(p["scale"], q["scale"])}
        whole.append(p)
    return [p for p in whole if min(p["box"][2] - p["box"][0], p["box"][3] - p["box"][1]) >= 20
            and (p["object"] is None or min(p["object"].get_px_size()) >= 32)]


def strips(a, b):
    """Whether two boxes begin and end alike in one direction and touch in the other."""
    same = [abs(a[n] - b[n]) < 1 and abs(a[n + 2] - b[n + 2]) < 1 for n in (0, 1)]
    touch = [min(a[n + 2], b[n + 2]) - max(a[n], b[n]) > -0.6 for n in (0, 1)]
    return same[0] and touch[1] or same[1] and touch[0]


def paragraphs(lines):
    """Lines -> blocks: dict k, box, text, size, label (the number, where it is a caption), in the order of the file.

    A line continues the block whose last line stands right above it with the same size and pitch. A line that looks
    like a caption but continues running text ("… as in / Figure 3. Here …") is text.
    """
    blocks = []
    for order, line in sorted(enumerate(lines), key=lambda x: (x[1]["k"], x[1]["box"][1], x[1]["box"][0])):
        x0, y0, x1, y1 = line["box"]
        above = None
        for block in blocks:
            bx0, _, bx1, by1 = block["last"]
            pitch, shared = y1 - by1, min(x1, bx1) - max(x0, bx0)
            if (block["k"] == line["k"] and 0.5 * line["size"] < pitch < min(1.9 * line["size"], 1.3 * block["pitch"])
                    and abs(block["size"] - line["size"]) < 0.12 * line["size"]
                    and shared > 0.5 * min(x1 - x0, bx1 - bx0) and (above is None or pitch < y1 - above["last"][3])):
                above = block
        label = caption_label(line["text"])
        if above is None or label and above["label"]:
            blocks.append({"k": line["k"], "box": line["box"], "last": line["box"], "size": line["size"], "pitch": 99.0,
                           "text": line["text"].strip(), "label": label, "order": order})
            continue
        text, more = above["text"], line["text"].strip()
        above["text"] = text[:-1] + more if text.endswith("-") and more[:1].islower() else joined(text, more)
        above["pitch"] = min(above["pitch"], y1 - above["last"][3])
        above["box"], above["last"] = union(above["box"], line["box"]), line["box"]
    return sorted(blocks, key=lambda b: b["order"])


def is_cjk(char):
    return "\u3000" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"


def joined(text, more):
    return text + ("" if is_cjk(text[-1:]) and is_cjk(more[:1]) else " ") + more


def caption_label(text):
    """The number of the figure, if this text begins like a caption, else None.

    "Figure 3. Liver" -> "3"; "图3-2 肝" -> "3-2"; "Figure 3 shows", "图3显示" -> None.
    """
    found = LABEL.match(text)
    if not found:
        return None
    number, letter, space, mark, rest = found.groups()
    return number + letter if mark or not rest or space and not rest[0].islower() else None


def read_page(page, options):
    """A pdfium page -> dict blocks, pictures; of an endpoint also pairs {index of a caption's block: [index of a
    picture]}. options: backend and what it needs. ArticleError says why a page cannot be read."""
    if page.get_rotation():
        page.set_rotation(0)                                             # everything below is in the page's own axes
    if options["backend"] == "endpoint":
        return ask_endpoint(page, options)
    lines, found = text_lines(page), pictures(page)
    left, bottom, right, top = page.get_bbox()
    large = 0.8 * (right - left) * (top - bottom)
    scan = [p for p in found if (p["box"][2] - p["box"][0]) * (p["box"][3] - p["box"][1]) > large]
    if scan and options["backend"] == "tesseract":
        lines = tesseract(page, options["languages"])
    elif scan and len(lines) < 2:
        raise ArticleError("a scan without text; use --backend tesseract or --backend endpoint")
    if scan:
        found = scan_regions(page, lines)
    return {"blocks": paragraphs(lines), "pictures": found}


def scan_regions(page, lines):
    """A scanned page -> its pictures: what is left when the text is painted white, cut along white gutters."""
    (left, _, _, top), scale = page.get_bbox(), 2.0
    array = np.asarray(page.render(scale=scale).to_pil().convert("RGB")).copy()
    for line in lines:
        l, b, r, t = turn(line["box"], line["k"])
        array[max(0, int((top - t) * scale) - 2):int((top - b) * scale) + 3,
              max(0, int((l - left) * scale) - 2):int((r - left) * scale) + 3] = 255
    return [{"box": (left + x0 / scale, top - y1 / scale, left + x1 / scale, top - y0 / scale), "matrix": (1, 0, 0, 1),
             "object": None, "scale": 300 / 72} for x0, y0, x1, y1 in split_image(array, least=0.005)]


def tesseract(page, languages):
    """Lines of a page by the OCR program `tesseract` (its TSV output), as text_lines gives them."""
    if not shutil.which("tesseract"):
        raise SystemExit("--backend tesseract: the program is not installed (Debian: apt install tesseract-ocr "
                         "tesseract-ocr-eng tesseract-ocr-chi-sim)")
    picture, (left, _, _, top) = io.BytesIO(), page.get_bbox()
    page.render(scale=300 / 72).to_pil().convert("L").save(picture, "PNG")
    done = subprocess.run(["tesseract", "stdin", "stdout", "-l", languages, "--dpi", "300", "tsv"],
                          input=picture.getvalue(), capture_output=True)
    if done.returncode:
        raise ArticleError(f"tesseract: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return tsv_lines(done.stdout.decode("utf-8", "replace"), 300 / 72, left, top)


def tsv_lines(tsv, scale, left, top):
    """Tesseract's TSV (level 5 = word; block, paragraph, line; left, top, width, height in pixels) -> lines."""
    lines = {}                                                           # numbers of its line -> text, box
    for row in tsv.splitlines()[1:]:
        cells = row.split("\t")
        if len(cells) == 12 and cells[0] == "5" and float(cells[10]) >= 30 and (word := cells[11].strip()):
            x, y, w, h = (int(c) / scale for c in cells[6:10])
            box, at = (x + left, y - top, x + left + w, y - top + h), tuple(cells[1:5])
            lines[at] = (joined(lines[at][0], word), union(lines[at][1], box)) if at in lines else (word, box)
    return [{"k": 0, "box": box, "text": text, "size": box[3] - box[1]} for text, box in lines.values()]


def ask_endpoint(page, options):
    """One page by a vision model -> blocks, pictures, pairs. options["journal"] keeps the replies: none is asked for
    twice, but three more after one that cannot be read. ArticleError: none came, or none could be read."""
    left, bottom, right, top = page.get_bbox()
    w, h = right - left, top - bottom
    picture = data_url(page.render(scale=1536 / max(w, h)).to_pil().convert("RGB"))
    params = {"model": options["model"], "temperature": 0, "max_tokens": options["max_tokens"]}
    for n in range(4):
        row = options["journal"].ask(key_of(PROMPT, params, picture, n), PROMPT, params, options["url"], options["key"],
                                     images=[picture], timeout=300, tries=6)
        if not row:
            raise ConfigError("--max_requests is used up; with a larger one the same command goes on")
        if "error" in row:
            raise ArticleError(f"{options['url']}: {row['error']}")
        try:
            text, figures = read_answer(row["reply"])
            break
        except ArticleError as error:
            if n == 3:
                raise ArticleError(f"{options['url']}: the last of four replies: {error}") from error
    blocks, found = [{"k": 0, "box": (0, 0, 0, 0), "text": text, "label": None}], []
    for label, caption, (x0, y0, x1, y1) in figures:
        number = re.search(NUMBER, label) or [str(len(blocks))]
        blocks.append({**blocks[0], "text": caption, "label": number[0]})
        found.append({"box": (left + x0 * w, top - y1 * h, left + x1 * w, top - y0 * h), "matrix": (1, 0, 0, 1),
                      "object": None, "scale": 300 / 72})
    return {"blocks": blocks, "pictures": found, "pairs": {i + 1: [i] for i in range(len(found))}}


def read_answer(reply):
    """A reply to PROMPT -> (text, [(label, caption, [x0, y0, x1, y1] as shares of the page)]), or ArticleError."""
    try:
        said = json.loads(reply[reply.index("{"):reply.rindex("}") + 1], strict=False)   # models break lines in strings
        figures = [(str(f["label"]), str(f["caption"] or ""), [min(max(float(v), 0), 1000) / 1000 for v in f["bbox"]])
                   for f in said["figures"]]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ArticleError(f"not the JSON that was asked for ({type(error).__name__}: {error}); it ends in "
                           f"{reply[-80:]!r}; if it was cut off, raise --max_tokens") from error
    for label, _, box in figures:
        if len(box) != 4 or not (box[2] - box[0] >= 0.01 and box[3] - box[1] >= 0.01):   # NaN is refused, too
            raise ArticleError(f"figure {label}: bbox {box} is not x0 < x1, y0 < y1 by a hundredth of the page")
    return str(said.get("text") or ""), figures
