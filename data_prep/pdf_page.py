"""What stands on a page of a PDF: lines of text, pictures, and paragraphs with captions among them; pages without text
are read by Tesseract or by a vision model at an endpoint. pdf.py pairs what is found here, and tells what a frame is.
"""
import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from data_prep.articles import ArticleError, split_image

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
                last["box"] = (*map(min, last["box"][:2], box[:2]), *map(max, last["box"][2:], box[2:]))
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
    joined = True
    while joined:
        joined = False
        for i, p in enumerate(found):
            for q in found[i + 1:]:
                x, y = [sorted((p["box"][n], p["box"][n + 2], q["box"][n], q["box"][n + 2])) for n in (0, 1)]
                same = [abs(p["box"][n] - q["box"][n]) < 1 and abs(p["box"][n + 2] - q["box"][n + 2]) < 1
                        for n in (0, 1)]
                touch = [min(p["box"][n + 2], q["box"][n + 2]) - max(p["box"][n], q["box"][n]) > -0.6 for n in (0, 1)]
                if same[0] and touch[1] or same[1] and touch[0]:
                    found.remove(q)
                    p |= {"box": (x[0], y[0], x[3], y[3]), "matrix": (1, 0, 0, 1), "object": None,
                          "scale": max(p["scale"], q["scale"])}
                    joined = True
                    break
    return [p for p in found if min(p["box"][2] - p["box"][0], p["box"][3] - p["box"][1]) >= 20
            and (p["object"] is None or min(p["object"].get_px_size()) >= 32)]


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
        if text.endswith("-") and more[:1].islower():
            above["text"] = text[:-1] + more
        else:
            above["text"] = text + ("" if is_cjk(text[-1:]) and is_cjk(more[:1]) else " ") + more
        above["pitch"] = min(above["pitch"], y1 - above["last"][3])
        above["box"] = (*map(min, above["box"][:2], line["box"][:2]), *map(max, above["box"][2:], line["box"][2:]))
        above["last"] = line["box"]
    return sorted(blocks, key=lambda b: b["order"])


def is_cjk(char):
    return "\u3000" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"


def caption_label(text):
    """The number of the figure, if this text begins like a caption, else None.

    "Figure 3. Liver" -> "3"; "图3-2 肝" -> "3-2"; "Figure 3 shows", "图3显示" -> None.
    """
    found = LABEL.match(text)
    if not found:
        return None
    number, letter, space, mark, rest = found.groups()
    if mark or not rest or space and not rest[0].islower():
        return number + letter
    return None


def read_page(page, number, options):
    """A pdfium page -> dict number, blocks, pictures; of an endpoint also pairs {index of a caption's block: [index of a
    picture]}.

    options: backend and what it needs. The three backends end in the same form. ArticleError names a page that cannot
    be read.
    """
    if page.get_rotation():
        page.set_rotation(0)                                             # everything below is in the page's own axes
    if options["backend"] == "endpoint":
        return {"number": number, **ask_endpoint(page, number, options)}
    lines, found = text_lines(page), pictures(page)
    left, bottom, right, top = page.get_bbox()
    large = 0.8 * (right - left) * (top - bottom)
    scan = [p for p in found if (p["box"][2] - p["box"][0]) * (p["box"][3] - p["box"][1]) > large]
    if scan and options["backend"] == "tesseract":
        lines = tesseract(page, options["languages"])
    elif scan and len(lines) < 2:
        raise ArticleError(f"page {number} is a scan without text; use --backend tesseract or --backend endpoint")
    if scan:
        found = scan_regions(page, lines)
    blocks = paragraphs(lines)
    return {"number": number, "blocks": blocks, "pictures": found}


def scan_regions(page, lines):
    """A scanned page -> its pictures: what is left when the text is painted white, cut along white gutters."""
    left, _, _, top = page.get_bbox()
    scale = 2.0
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
                          input=picture.getvalue(),
                          capture_output=True)
    if done.returncode:
        raise ArticleError(f"tesseract: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return tsv_lines(done.stdout.decode("utf-8", "replace"), 300 / 72, left, top)


def tsv_lines(tsv, scale, left, top):
    """Tesseract's TSV (level 5 = word; block, paragraph, line; left, top, width, height in pixels) -> lines."""
    lines = {}
    for row in tsv.splitlines()[1:]:
        cells = row.split("\t")
        if len(cells) == 12 and cells[0] == "5" and float(cells[10]) >= 30 and cells[11].strip():
            x, y, w, h = (int(c) / scale for c in cells[6:10])
            lines.setdefault(tuple(cells[1:5]), []).append((x + left, y - top, x + left + w, y - top + h,
                                                            cells[11].strip()))
    out = []
    for words in lines.values():
        text = words[0][4]
        for word in words[1:]:
            text += ("" if is_cjk(text[-1]) and is_cjk(word[4][0]) else " ") + word[4]
        box = (*(min(w[i] for w in words) for i in (0, 1)), *(max(w[i] for w in words) for i in (2, 3)))
        out.append({"k": 0, "box": box, "text": text, "size": box[3] - box[1]})
    return out


def ask_endpoint(page, number, options):
    """One page by a vision model: POST {url}/chat/completions -> blocks, pictures, pairs. Answers are kept in a folder,
    so that no page is asked for twice; three tries with growing pauses, then ArticleError."""
    left, bottom, right, top = page.get_bbox()
    picture = io.BytesIO()
    page.render(scale=1536 / max(right - left, top - bottom)).to_pil().convert("RGB").save(picture, "JPEG", quality=90)
    name = hashlib.sha256(options["model"].encode() + picture.getvalue()).hexdigest()
    kept = Path(options["answers"]) / f"{name}.json"
    address = "data:image/jpeg;base64," + base64.b64encode(picture.getvalue()).decode()
    body = {"model": options["model"], "temperature": 0, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": PROMPT}]}]}
    request = urllib.request.Request(options["url"].rstrip("/") + "/chat/completions", json.dumps(body).encode(), {
        "Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(options['key'], '')}"})
    for attempt in range(4):
        try:
            if kept.exists():
                answer = kept.read_text(encoding="utf-8")
            else:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    answer = json.load(reply)["choices"][0]["message"]["content"]
            said = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
            figures = [(str(f["label"]), str(f["caption"]), [min(max(float(v), 0), 1000) / 1000 for v in f["bbox"]])
                       for f in said["figures"]]
            if any(len(b) != 4 or b[2] <= b[0] or b[3] <= b[1] for _, _, b in figures):
                raise ValueError("a bbox is not x0 < x1, y0 < y1")
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            kept.unlink(missing_ok=True)
            if attempt == 3 or isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404):
                raise ArticleError(f"page {number}: {options['url']}: {type(error).__name__}: {error}") from error
            time.sleep(options.get("pause", 5) * 2 ** attempt)
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(answer, encoding="utf-8")
        break
    blocks = [{"k": 0, "box": (0, 0, 0, 0), "text": str(said.get("text") or ""), "label": None}]
    found = []
    for label, caption, (x0, y0, x1, y1) in figures:
        digits = re.search(NUMBER, label)
        blocks.append({"k": 0, "box": (0, 0, 0, 0), "text": caption,
                       "label": digits[0] if digits else str(len(blocks))})
        w, h = right - left, top - bottom
        found.append({"box": (left + x0 * w, top - y1 * h, left + x1 * w, top - y0 * h), "matrix": (1, 0, 0, 1),
                      "object": None, "scale": 300 / 72})
    return {"blocks": blocks, "pictures": found, "pairs": {i + 1: [i] for i in range(len(found))}}
