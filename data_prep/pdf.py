"""Figures of digital and scanned PDFs -> records of image and caption, by the geometry of the page.

    python -m data_prep pdf books/ --out data/books --license "CC BY 4.0"

On every page: pdfium's characters become lines and paragraphs; those that begin like "Figure 3." or "图3-2" are
captions; each caption takes the picture nearest below, above or beside it, so that all captions of the page together
are served best; other pictures join the figure they stand next to. What is then left over is matched with the
neighbouring page. "inline_ref" are the sentences of the page and its two neighbours that cite the figure. Pictures keep
their own pixels.

A page is read by one of three backends behind `read_page`: "text" (the PDF's own text), "tesseract" (the OCR program,
for scans), "endpoint" (a vision model behind an OpenAI-compatible address). Needs pypdfium2 (extra `data`). Not
handled: figures drawn as vectors (no picture object), text at an angle other than 0, 90, 180, 270 degrees.

Geometry: points of 1/72 inch. A frame k is the page turned so that text read at k quarter turns (counter-clockwise)
lies upright; boxes in it are (x0, y0, x1, y1) with y down.
"""
import argparse
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
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.articles import ArticleError, collect, files_below, safe, save_figure, split_image, summary

MOST_PIXELS = 80_000_000
_NUMBER = r"[A-Z]?\d+(?:[.\-–]\d+)*"
_FIGURE = r"(?:(?:Supplementary|Extended Data)\s+)?(?:Fig(?:ure)?s?\b\.?|FIG(?:URE)?S?\b\.?|图|圖)"
_LABEL = re.compile(rf"\s*{_FIGURE}\s*({_NUMBER})([A-Za-z]?)(\s*)([.:：|。、．—–-]?)\s*(.*)", re.S)
_LINK = r"\s*(?:,|、|;|&|and|和|及|to|至|-|–|—|~)\s*"
_CITED = re.compile(rf"{_FIGURE}\s*({_NUMBER}[A-Za-z]?(?:{_LINK}{_NUMBER}[A-Za-z]?)*)")
PROMPT = ("This is one page of a pathology book or article. Reply with a JSON object and nothing else: "
          '{"text": the running text of the page without captions, "figures": [{"label": the figure number as printed, '
          '"caption": the whole printed caption, "bbox": [x0, y0, x1, y1]}]}. The bbox encloses the picture, not '
          "the caption, in thousandths of the page's width and height from the upper left. Copy text, add nothing. A "
          'page without figures: "figures": [].')


# --- what stands on a page --------------------------------------------------------------------------------------------


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
                gap = " " if box[0] - x1 > 0.18 * size and not (_cjk(char) or last["text"][-1:] == " ") else ""
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
            above["text"] = text + ("" if _cjk(text[-1:]) and _cjk(more[:1]) else " ") + more
        above["pitch"] = min(above["pitch"], y1 - above["last"][3])
        above["box"] = (*map(min, above["box"][:2], line["box"][:2]), *map(max, above["box"][2:], line["box"][2:]))
        above["last"] = line["box"]
    return sorted(blocks, key=lambda b: b["order"])


def _cjk(char):
    return "\u3000" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef"


def caption_label(text):
    """The number of the figure, if this text begins like a caption, else None.

    "Figure 3. Liver" -> "3"; "图3-2 肝" -> "3-2"; "Figure 3 shows", "图3显示" -> None.
    """
    found = _LABEL.match(text)
    if not found:
        return None
    number, letter, space, mark, rest = found.groups()
    if mark or not rest or space and not rest[0].islower():
        return number + letter
    return None


def read_page(page, number, options):
    """A pdfium page -> dict number, blocks, pictures, pairs {index of a caption's block: [index of a picture]}.

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
    return {"number": number, "blocks": blocks, "pictures": found, "pairs": pair(blocks, found)}


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
            text += ("" if _cjk(text[-1]) and _cjk(word[4][0]) else " ") + word[4]
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
        digits = re.search(_NUMBER, label)
        blocks.append({"k": 0, "box": (0, 0, 0, 0), "text": caption,
                       "label": digits[0] if digits else str(len(blocks))})
        w, h = right - left, top - bottom
        found.append({"box": (left + x0 * w, top - y1 * h, left + x1 * w, top - y0 * h), "matrix": (1, 0, 0, 1),
                      "object": None, "scale": 300 / 72})
    return {"blocks": blocks, "pictures": found, "pairs": {i + 1: [i] for i in range(len(found))}}


# --- captions and pictures --------------------------------------------------------------------------------------------

SIDES = {"below": 0.0, "above": 6.0, "beside": 12.0}  # points a caption's side costs before its distance
FAR = 120.0                                                              # a pair further apart than this is none


def between(a, b):
    """The corridor between two boxes, where something could stand that keeps them apart."""
    x, y = sorted((a[0], a[2], b[0], b[2])), sorted((a[1], a[3], b[1], b[3]))
    return x[1] + 1, y[1] + 1, x[2] - 1, y[2] - 1


def gap(a, b):
    """(horizontal, vertical) distance of two boxes; negative: the length they share in that direction."""
    return max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])


def crosses(corridor, box):
    """Whether a box reaches into a corridor of which one side may have no width."""
    return max(gap(corridor, box)) < 0


def text_boxes(blocks, k):
    """Boxes in frame k of the text that may stand between a picture and a caption: all but printed letters."""
    return [turn(turn(b["box"], b["k"]), k) for b in blocks if len(b["text"]) > 4]


def pair(blocks, found, sides=SIDES):
    """Blocks and pictures of a page -> {index of a caption: [indices of its pictures]}: the least total distance.

    First one picture a caption, all captions at once, as many as possible; then other pictures join the figure they are
    next to, with nothing between them: side by side by less than a column gutter (15 points), or one above the other.
    """
    captions = [i for i, b in enumerate(blocks) if b["label"]]
    if not captions or not found:
        return {}

    obstacles = lru_cache(maxsize=None)(lambda k: text_boxes(blocks, k))

    def side(c, p):
        """-> (cost, side) of caption block c for picture p."""
        k = blocks[c]["k"]
        cap, pic = blocks[c]["box"], turn(found[p]["box"], k)
        dx, dy = gap(cap, pic)
        width, height = min(cap[2] - cap[0], pic[2] - pic[0]), min(cap[3] - cap[1], pic[3] - pic[1])
        if -dx > 0.3 * width and dy > -0.5 * height:
            where = "below" if cap[1] > pic[1] else "above"
            cost = max(dy, 0)
        elif -dy > 0.3 * height:
            where, cost = "beside", max(dx, 0)
        else:
            where, cost = "beside", 60 + max(dx, 0) + max(dy, 0)
        corridor = between(cap, pic)
        cost += 150 * any(crosses(corridor, box) for box in obstacles(k) if box != cap)
        cost += 60 * any(crosses(corridor, turn(q["box"], k)) for n, q in enumerate(found) if n != p)
        return cost + sides[where], where

    costs = np.array([[side(c, p)[0] for p in range(len(found))] + [FAR] * len(captions) for c in captions])
    pairs = {c: [p] for c, p in zip(captions, assign(np.minimum(costs, 2 * FAR))) if p < len(found)}
    grow(pairs, blocks, found, obstacles)
    return pairs


def assign(cost):
    """float (n, m), n <= m -> a column for each row, all different, with the least sum: shortest augmenting paths."""
    n, m = cost.shape
    row_of, u, v = np.full(m, -1), np.zeros(n), np.zeros(m)
    for i in range(n):
        distance, before, done = cost[i] - u[i] - v, np.full(m, -1), np.zeros(m, bool)
        while True:
            j = int(np.argmin(np.where(done, np.inf, distance)))
            done[j] = True
            r = row_of[j]
            if r < 0:
                break
            through = distance[j] + cost[r] - u[r] - v
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], j
        gain = np.where(done, distance[j] - distance, 0)
        u[i] += distance[j]
        u[row_of[done & (row_of >= 0)]] += gain[done & (row_of >= 0)]
        v -= gain
        while j >= 0:
            row_of[j] = row_of[before[j]] if before[j] >= 0 else i
            j = before[j]
    return [int(np.flatnonzero(row_of == i)[0]) for i in range(n)]


def grow(pairs, blocks, found, obstacles):
    """Let free pictures join the nearest figure, nearest first; changes pairs and puts each figure in reading order."""
    free = set(range(len(found))) - {p for ps in pairs.values() for p in ps}
    while free:
        reach = []
        for c, members in pairs.items():
            k = blocks[c]["k"]
            texts = obstacles(k)
            for m in members:
                for f in free:
                    a, b = turn(found[m]["box"], k), turn(found[f]["box"], k)
                    dx, dy = gap(a, b)
                    aligned = -dx > 0.5 * min(a[2] - a[0], b[2] - b[0]) or -dy > 0.5 * min(a[3] - a[1], b[3] - b[1])
                    if aligned and dx < 15 and dy < 45 and not any(crosses(between(a, b), t) for t in texts):
                        reach.append((max(dx, dy), c, f))
        if not reach:
            break
        _, c, f = min(reach)
        pairs[c].append(f)
        free.remove(f)
    for c, members in pairs.items():
        rows = []
        for box, p in sorted((turn(found[p]["box"], blocks[c]["k"])[1::-1], p) for p in members):
            if rows and box[0] - rows[-1][0] < 20:
                rows[-1][1].append((box[1], p))
            else:
                rows.append((box[0], [(box[1], p)]))
        pairs[c] = [p for _, row in rows for _, p in sorted(row)]


def usual_sides(pages):
    """SIDES, moved towards where this document puts its captions: a lone caption between two pictures is decided by
    it."""
    seen = {"below": 0, "above": 0, "beside": 0}
    for page in pages:
        for c, ps in page["pairs"].items():
            cap, pic = page["blocks"][c]["box"], turn(page["pictures"][ps[0]]["box"], page["blocks"][c]["k"])
            dx, dy = gap(cap, pic)
            seen["beside" if dx > 0 else "below" if cap[1] > pic[1] else "above"] += 1
    total = sum(seen.values())
    return {name: SIDES[name] + (110 * (1 - seen[name] / total) if total else 0) for name in SIDES}


def across(pages):
    """Figures at the end of a page whose caption opens the next one, and the other way round -> [(page of the caption,
    its block, page of the picture, picture)]."""
    def ends(page, box, k, first):
        """Whether nothing but page headers and footers stands before (first) or behind a box in its column."""
        height = page["height"]
        for b in page["blocks"]:
            other = turn(turn(b["box"], b["k"]), k)
            margin = other[3] < -height + 55 or other[1] > -50
            if other != box and not margin and gap(box,
                                                   other)[0] < 0 and (other[1] < box[1] if first
                                                                      else other[3] > box[3]):
                return False
        return not any(gap(box, turn(p["box"], k))[0] < 0 and (turn(p["box"], k)[1] < box[1] - 1 if first else
                                                              turn(p["box"], k)[3] > box[3] + 1)
                       for p in page["pictures"])

    out = []
    for before, after in zip(pages, pages[1:]):
        for cap_page, pic_page, cap_first in ((after, before, True), (before, after, False)):
            loose = [c for c, b in enumerate(cap_page["blocks"]) if b["label"] and c not in cap_page["pairs"]
                     and ends(cap_page, b["box"], b["k"], cap_first)]
            used = {p for ps in pic_page["pairs"].values() for p in ps} | {x[3] for x in out if x[2] is pic_page}
            for c in loose:
                k = cap_page["blocks"][c]["k"]
                open_ = [p for p in range(len(pic_page["pictures"])) if p not in used
                         and ends(pic_page, turn(pic_page["pictures"][p]["box"], k), k, not cap_first)]
                if open_ and not any(x[0] is cap_page and x[1] == c for x in out):
                    out.append((cap_page, c, pic_page, open_[0]))
                    used.add(open_[0])
    return out


def references(pages, at, number, known):
    """Sentences on page `at` and its neighbours that cite figure `number`. "Figs. 2-4" cites 3, unless "2-4" is a
    figure."""
    text = ""
    for page in pages[max(0, at - 1):at + 2]:
        for block in page["blocks"]:
            if not block["label"] and (len(block["text"]) > 40 or _cjk(block["text"][:1])):
                text += ("" if _cjk(text[-1:]) else " ") + block["text"]
    out = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(])|(?<=[。！？])", text):
        cited = set()
        for found in _CITED.finditer(sentence):
            for part in re.findall(rf"{_NUMBER}", found[1]):
                ends = re.fullmatch(r"(\d+)[-–](\d+)", part)
                cited |= {str(n) for n in range(int(ends[1]),
                                                int(ends[2]) + 1)} if ends and part not in known else {part}
        if number in cited and sentence.strip() not in out:
            out.append(sentence.strip())
    return out


def picture_of(page, picture, k):
    """The pixels of a picture, upright in frame k: its own, or where it has none of its own the rendered page, cut."""
    a, b, c, d = picture["matrix"]
    if picture["object"] is not None:
        if math.prod(picture["object"].get_px_size()) > MOST_PIXELS:
            raise ArticleError(f"a picture of {picture['object'].get_px_size()} pixels; the limit is {MOST_PIXELS:,}")
        image = picture["object"].get_bitmap().to_pil().convert("RGB")
        if a * d - b * c < 0:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        turns = round(math.degrees(math.atan2(b, a)) / 90) - k
    else:
        left, bottom, right, top = page.get_bbox()
        scale = min(picture["scale"], math.sqrt(MOST_PIXELS / ((right - left) * (top - bottom))))
        x0, y0, x1, y1 = picture["box"]
        image = page.render(scale=scale).to_pil().convert("RGB").crop(
            [round(v * scale) for v in (x0 - left, top - y1, x1 - left, top - y0)])
        turns = -k
    return image.rotate(90 * (turns % 4), expand=True)


def read_pdf(path, out, options):
    """One PDF -> (records, counts, problems), pictures as PNG below out/images."""
    try:
        import pypdfium2
    except ImportError:
        raise SystemExit('reading PDFs needs pypdfium2: pip install -e ".[data]"') from None
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        raise ArticleError(f"{path}: cannot be opened as a PDF ({error}); encrypted or damaged") from error
    group, problems, pages = safe(path.stem), [], []
    counts = {"pages": len(document), "figures": 0, "captions without picture": 0, "pictures without caption": 0}
    for number in range(1, len(document) + 1):
        try:
            page = document[number - 1]
            pages.append({**read_page(page, number, options), "page": page,
                          "height": page.get_bbox()[3] - page.get_bbox()[1]})
        except (ArticleError, pypdfium2.PdfiumError) as error:
            problems.append(f"{path}: page {number}: {error}")
            counts["unreadable pages"] = counts.get("unreadable pages", 0) + 1
    if options["backend"] != "endpoint":
        sides = usual_sides(pages)
        for page in pages:
            page["pairs"] = pair(page["blocks"], page["pictures"], sides)
    figures = [(page, c, page, ps) for page in pages for c, ps in page["pairs"].items()]
    for cap_page, c, pic_page, p in across(pages):
        joined = {c: [p]}
        taken = {q for _, _, other, ps in figures if other is pic_page for q in ps} - {p}
        free = [x if n not in taken else {**x, "box": (1e6, 1e6, 1e6, 1e6)} for n, x in enumerate(pic_page["pictures"])]
        k = cap_page["blocks"][c]["k"]
        grow(joined, {c: {"k": k}}, free, lambda k: text_boxes(pic_page["blocks"], k))
        figures.append((cap_page, c, pic_page, joined[c]))
    known = {b["label"] for page in pages for b in page["blocks"] if b["label"]}
    records, first = [], {}
    for cap_page, c, pic_page, ps in sorted(figures, key=lambda f: (f[0]["number"], f[1])):
        block = cap_page["blocks"][c]
        number, text = block["label"], _LABEL.match(block["text"])
        caption = text[5].strip() if text else block["text"]
        if re.fullmatch(r"[(（]?\s*(?:continued|cont\.?|续)\s*[)）.]*", caption, re.I) and number in first:
            caption = first[number]
        first.setdefault(number, caption)
        counts["figures"] += 1
        key = f"{group}/p{cap_page['number']}_fig{safe(number)}"
        files = []
        try:
            for n, p in enumerate(ps):
                image = picture_of(pic_page["page"], pic_page["pictures"][p], block["k"])
                files.append(out / "images" / group / f"{key.split('/')[1]}{f'_{n + 1}' if len(ps) > 1 else ''}.png")
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                image.save(files[-1])
        except (ArticleError, pypdfium2.PdfiumError) as error:
            problems.append(f"{path}: page {pic_page['number']}, figure {number}: {error}")
            continue
        if not caption:
            problems.append(f"{path}: page {cap_page['number']}, figure {number}: its caption has no text")
            continue
        shared = {"source": "pdf", "id": key, "group": group, "page": cap_page["number"], "label": f"Figure {number}",
                  "caption": caption, "license": options["license"],
                  "inline_ref": references(pages, pages.index(cap_page), number, known)}
        records += save_figure(shared, files, out, printed_letters(pic_page, ps, block["k"]))
    used = {(f[0]["number"], f[1]) for f in figures}
    counts["captions without picture"] = sum(b["label"] is not None and (page["number"], i) not in used
                                             for page in pages for i, b in enumerate(page["blocks"]))
    counts["pictures without caption"] = (sum(len(page["pictures"]) for page in pages) - sum(len(f[3])
                                                                                             for f in figures))
    return records, counts, problems


def printed_letters(page, ps, k):
    """The letters printed in or beside the pictures of a figure, in the order of ps, or None unless each has its
    own."""
    out = []
    for p in ps:
        pic, near = turn(page["pictures"][p]["box"], k), []
        for block in page["blocks"]:
            letter = re.fullmatch(r"[(（]?([A-Za-z])[)）.]?", block["text"])
            if letter and block["k"] == k:
                dx, dy = gap(pic, block["box"])
                corner = abs(block["box"][0] - pic[0]) + min(abs(block["box"][1] - pic[1]),
                                                             abs(block["box"][1] - pic[3]))
                near += [(corner, letter[1].upper())] if max(dx, dy) < 20 else []
        out.append(min(near)[1] if near else None)
    return out if None not in out and len(set(out)) == len(out) else None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep pdf", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="PDF files, or folders of them")
    parser.add_argument("--out", required=True)
    parser.add_argument("--license", required=True, help="of these documents, written into every record")
    parser.add_argument("--backend", choices=("text", "tesseract", "endpoint"), default="text")
    parser.add_argument("--languages", default="eng+chi_sim", help="of tesseract")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the endpoint")
    parser.add_argument("--model", default="", help="name of the endpoint's model")
    parser.add_argument("--key", default="OPENAI_API_KEY", help="environment variable with the endpoint's key")
    args = parser.parse_args(argv)
    names, out = files_below(args.sources, (".pdf",)), Path(args.out)
    options = {**vars(args), "answers": out / "answers"}
    return summary(collect(names, lambda name: read_pdf(name, out, options), out), out)
