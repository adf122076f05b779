"""Figures of digital and scanned PDFs -> records of image and caption, by the geometry of the page.

    python -m data_prep pdf books/ --out data/books --license "CC BY 4.0"

On every page: pdfium's characters become lines and paragraphs; those that begin like "Figure 3." or "图3-2" are
captions; each caption takes the picture nearest below, above or beside it, so that all captions of the page together
are served best; other pictures join the figure they stand next to. What is then left over is matched with the
neighbouring page. "inline_ref" are the sentences of the page and its two neighbours that cite the figure. Pictures keep
their own pixels.

Three backends read a page: "text" (the PDF's own text), "tesseract" (the OCR program, for scans), "endpoint" (a vision
model behind an OpenAI-compatible address; DIR/answers.jsonl keeps its replies and asks for none twice). Needs pypdfium2
(extra `data`). Not handled: figures drawn as vectors, text at an angle other than 0, 90, 180, 270 degrees.

Geometry: points of 1/72 inch. A frame k is the page turned so that text read at k quarter turns (counter-clockwise)
lies upright; boxes in it are (x0, y0, x1, y1) with y down.
"""
import argparse
import math
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.articles import ArticleError, collect, files_below, safe, save_figure, summary
from data_prep.pdf_page import FIGURE, LABEL, NUMBER, is_cjk, read_page, turn
from nanopatho.endpoint import Journal, count
from nanopatho.log import ConfigError

MOST_PIXELS = 80_000_000
_LINK = r"\s*(?:,|、|;|&|and|和|及|to|至|-|–|—|~)\s*"
_CITED = re.compile(rf"{FIGURE}\s*({NUMBER}[A-Za-z]?(?:{_LINK}{NUMBER}[A-Za-z]?)*)")
SIDES = {"below": 0.0, "above": 6.0, "beside": 12.0}                     # points a side costs before its distance
FAR = 120.0                                                              # a pair further apart than this is none


def gap(a, b):
    """(horizontal, vertical) distance of two boxes; negative: the length they share in that direction."""
    return max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])


def apart(a, b, boxes):
    """Whether one of the boxes stands in the corridor between a and b, of which one side may have no width."""
    x, y = sorted((a[0], a[2], b[0], b[2])), sorted((a[1], a[3], b[1], b[3]))
    corridor = x[1] + 1, y[1] + 1, x[2] - 1, y[2] - 1
    return any(max(gap(corridor, box)) < 0 for box in boxes)


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
    obstacles = cache(lambda k: text_boxes(blocks, k))

    def distance(c, p):
        """What it costs to give caption block c to picture p."""
        k = blocks[c]["k"]
        cap, pic = blocks[c]["box"], turn(found[p]["box"], k)
        dx, dy = gap(cap, pic)
        width, height = min(cap[2] - cap[0], pic[2] - pic[0]), min(cap[3] - cap[1], pic[3] - pic[1])
        if -dx > 0.3 * width and dy > -0.5 * height:
            where, cost = "below" if cap[1] > pic[1] else "above", max(dy, 0)
        elif -dy > 0.3 * height:
            where, cost = "beside", max(dx, 0)
        else:
            where, cost = "beside", 60 + max(dx, 0) + max(dy, 0)
        cost += 150 * apart(cap, pic, (box for box in obstacles(k) if box != cap))
        cost += 60 * apart(cap, pic, (turn(q["box"], k) for n, q in enumerate(found) if n != p))
        return cost + sides[where]

    costs = np.array([[distance(c, p) for p in range(len(found))] + [FAR] * len(captions) for c in captions])
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


def grow(pairs, blocks, found, obstacles, taken=()):
    """Let free pictures join the nearest figure, nearest first; changes pairs and puts each figure in reading order."""
    free = set(range(len(found))) - {p for ps in pairs.values() for p in ps}.union(taken)
    while free:
        reach = []
        for c, members in pairs.items():
            k = blocks[c]["k"]
            for m in members:
                for f in free:
                    a, b = turn(found[m]["box"], k), turn(found[f]["box"], k)
                    dx, dy = gap(a, b)
                    aligned = -dx > 0.5 * min(a[2] - a[0], b[2] - b[0]) or -dy > 0.5 * min(a[3] - a[1], b[3] - b[1])
                    if aligned and dx < 15 and dy < 45 and not apart(a, b, obstacles(k)):
                        reach.append((max(dx, dy), c, f))
        if not reach:
            break
        _, c, f = min(reach)
        pairs[c].append(f)
        free.remove(f)
    for c, members in pairs.items():
        rows = []
        for (y, x), p in sorted((turn(found[p]["box"], blocks[c]["k"])[1::-1], p) for p in members):
            if not rows or y - rows[-1][0] >= 20:
                rows.append((y, []))
            rows[-1][1].append((x, p))
        pairs[c] = [p for _, row in rows for _, p in sorted(row)]


def usual_sides(pages):
    """SIDES, moved towards where this document puts its captions: it decides on a lone caption between two pictures."""
    seen = dict.fromkeys(SIDES, 0)
    for page in pages:
        for c, ps in page["pairs"].items():
            cap, pic = page["blocks"][c]["box"], turn(page["pictures"][ps[0]]["box"], page["blocks"][c]["k"])
            seen["beside" if gap(cap, pic)[0] > 0 else "below" if cap[1] > pic[1] else "above"] += 1
    total = sum(seen.values())
    return {name: SIDES[name] + (110 * (1 - seen[name] / total) if total else 0) for name in SIDES}


def across(pages):
    """Figures whose caption opens the next page or ends the one before -> [(page of the caption, its block, page of the
    picture, picture)]."""
    def ends(page, box, k, first):
        """Whether nothing but page headers and footers stands before (first) or behind a box in its column."""
        texts = [turn(turn(b["box"], b["k"]), k) for b in page["blocks"]]
        others = [t for t in texts if t[3] >= 55 - page["height"] and t[1] <= -50]
        others += [turn(p["box"], k) for p in page["pictures"]]
        return not any(gap(box, other)[0] < 0 and (other[1] < box[1] - 1 if first else other[3] > box[3] + 1)
                       for other in others)

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
    """Sentences on page `at` and its neighbours that cite figure `number`: "Figs. 2-4" cites 3, if no figure is 2-4."""
    text = ""
    for page in pages[max(0, at - 1):at + 2]:
        for block in page["blocks"]:
            if not block["label"] and (len(block["text"]) > 40 or is_cjk(block["text"][:1])):
                text += ("" if is_cjk(text[-1:]) else " ") + block["text"]
    out = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z(])|(?<=[。！？])", text):
        cited = set(re.findall(NUMBER, " ".join(found[1] for found in _CITED.finditer(sentence))))
        for part in cited - known:
            if ends := re.fullmatch(r"(\d{1,4})[-–](\d{1,4})", part):
                cited |= set(map(str, range(int(ends[1]), int(ends[2]) + 1)))
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
        document = pypdfium2.PdfDocument(path)
    except ImportError:
        raise SystemExit('reading PDFs needs pypdfium2: pip install -e ".[data]"') from None
    except pypdfium2.PdfiumError as error:
        raise ArticleError(f"{path}: cannot be opened as a PDF ({error}); encrypted or damaged") from error
    group, problems, pages = safe(path.stem), [], []
    counts = {"pages": len(document)}
    for number in range(1, len(document) + 1):
        try:
            page = document[number - 1]
            read = read_page(page, options)
            pairs = read.get("pairs") or pair(read["blocks"], read["pictures"])          # an endpoint pairs by itself
            pages.append({**read, "pairs": pairs, "number": number, "page": page,
                          "height": page.get_bbox()[3] - page.get_bbox()[1]})
        except ConfigError as error:
            raise ConfigError(f"{path}: page {number}: {error}") from error
        except (ArticleError, pypdfium2.PdfiumError) as error:
            problems.append(f"{path}: page {number}: {error}")
            counts["unreadable pages"] = counts.get("unreadable pages", 0) + 1
    if options["backend"] != "endpoint":
        sides = usual_sides(pages)
        for page in pages:
            page["pairs"] = pair(page["blocks"], page["pictures"], sides)
    figures = [(page, c, page, ps) for page in pages for c, ps in page["pairs"].items()]
    for cap_page, c, pic_page, p in across(pages):
        joined, taken = {c: [p]}, {q for _, _, other, ps in figures if other is pic_page for q in ps}
        grow(joined, cap_page["blocks"], pic_page["pictures"], lambda k: text_boxes(pic_page["blocks"], k), taken)
        figures.append((cap_page, c, pic_page, joined[c]))
    known = {b["label"] for page in pages for b in page["blocks"] if b["label"]}
    records, first, names = [], {}, set()
    for cap_page, c, pic_page, ps in sorted(figures, key=lambda f: (f[0]["number"], f[1])):
        block = cap_page["blocks"][c]
        number, head = block["label"], LABEL.match(block["text"])
        caption = head[5].strip() if head else block["text"]
        if re.fullmatch(r"[(（]?\s*(?:continued|cont\.?|续)\s*[)）.]*", caption, re.I) and number in first:
            caption = first[number]
        first.setdefault(number, caption)
        name = f"p{cap_page['number']}_fig{safe(number)}"
        name += f"_n{c}" if name in names else ""                        # one number twice on a page: two figures
        names.add(name)
        files = []
        try:
            for n, p in enumerate(ps):
                image = picture_of(pic_page["page"], pic_page["pictures"][p], block["k"])
                files.append(out / "images" / group / f"{name}{f'_{n + 1}' if len(ps) > 1 else ''}.png")
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                image.save(files[-1])
        except (ArticleError, pypdfium2.PdfiumError) as error:
            problems.append(f"{path}: page {pic_page['number']}, figure {number}: {error}")
            continue
        if not caption:
            problems.append(f"{path}: page {cap_page['number']}, figure {number}: its caption has no text")
            continue
        shared = {"source": "pdf", "id": f"{group}/{name}", "group": group, "page": cap_page["number"],
                  "label": f"Figure {number}", "caption": caption, "license": options["license"],
                  "inline_ref": references(pages, pages.index(cap_page), number, known)}
        records += save_figure(shared, files, out, printed_letters(pic_page, ps, block["k"]))
    captions = sum(b["label"] is not None for page in pages for b in page["blocks"])
    pictures = sum(len(page["pictures"]) for page in pages)
    counts |= {"figures": len(figures), "captions without picture": captions - len(figures),
               "pictures without caption": pictures - sum(len(ps) for *_, ps in figures)}
    return records, counts, problems


def printed_letters(page, ps, k):
    """Letters printed in or beside the pictures of a figure, in the order of ps, or None unless each has its own."""
    out = []
    for p in ps:
        pic, near = turn(page["pictures"][p]["box"], k), []
        for block in page["blocks"]:
            letter = re.fullmatch(r"[(（]?([A-Za-z])[)）.]?", block["text"])
            if letter and block["k"] == k:
                dx, dy = gap(pic, block["box"])
                x, y = block["box"][:2]
                corner = abs(x - pic[0]) + min(abs(y - pic[1]), abs(y - pic[3]))
                near += [(corner, letter[1].upper())] if max(dx, dy) < 20 else []
        out.append(min(near)[1] if near else None)
    return out if None not in out and len(set(out)) == len(out) else None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep pdf", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", help="PDF files, or folders of them")
    add("--out", required=True)
    add("--license", required=True, help="of these documents, written into every record")
    add("--backend", choices=("text", "tesseract", "endpoint"), default="text")
    add("--languages", default="eng+chi_sim", help="of tesseract")
    add("--url", default="http://localhost:8000/v1", help="of the endpoint; the pages leave this machine for it")
    add("--model", default="", help="name of the endpoint's model")
    add("--key", default="OPENAI_API_KEY", help="environment variable with the endpoint's key")
    add("--max_tokens", type=count, default=4000, help="longest reply of the endpoint, one a page")
    add("--max_requests", type=float, default=math.inf, help="stop before the endpoint is sent more, failures included")
    c = parser.parse_args(argv)
    names, out = files_below(c.sources, (".pdf",)), Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "answers.jsonl", requests=c.max_requests) if c.backend == "endpoint" else nullcontext() as kept:
        return summary(collect(names, lambda name: read_pdf(name, out, {**vars(c), "journal": kept}), out), out)
