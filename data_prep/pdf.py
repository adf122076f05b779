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
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.articles import ArticleError, collect, files_below, safe, save_figure, summary
from data_prep.pdf_page import FIGURE, LABEL, NUMBER, is_cjk, read_page, turn

MOST_PIXELS = 80_000_000
_LINK = r"\s*(?:,|、|;|&|and|和|及|to|至|-|–|—|~)\s*"
_CITED = re.compile(rf"{FIGURE}\s*({NUMBER}[A-Za-z]?(?:{_LINK}{NUMBER}[A-Za-z]?)*)")


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
            if not block["label"] and (len(block["text"]) > 40 or is_cjk(block["text"][:1])):
                text += ("" if is_cjk(text[-1:]) else " ") + block["text"]
    out = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(])|(?<=[。！？])", text):
        cited = set()
        for found in _CITED.finditer(sentence):
            for part in re.findall(rf"{NUMBER}", found[1]):
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
            read = read_page(page, number, options)
            if "pairs" not in read:                                      # an endpoint pairs by itself
                read["pairs"] = pair(read["blocks"], read["pictures"])
            pages.append({**read, "page": page,
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
        number, text = block["label"], LABEL.match(block["text"])
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
