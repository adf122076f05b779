"""Figures of open-access articles: PubMed Central's NXML and its pictures -> records of image and caption.

    python -m data_prep articles PMC_packages/ --out data/pmc        # .tar.gz packages, .nxml or .xml files, or folders

An article gives one record a figure, or one a panel where caption and picture agree on their number. Kept are the whole
caption (title and all paragraphs), the licence, and as "inline_ref" the paragraphs that refer to the figure. Figures
under a licence with NC or ND, taken over from elsewhere, or of no stated licence are left out and counted, unless
--any-license. DIR/figures.jsonl grows article by article; journal.jsonl says what each gave and why anything is
missing; a second call goes on where the first one stopped.

Hostile files: an article that declares entities, is not UTF-8 or not XML is refused by name; nothing is fetched, and a
picture is found among the files of its package by its bare name, so no path inside an article is ever opened.
Needs lxml (extra `data`). The first part, captions and panels, is shared with pdf.py.
"""
import argparse
import html
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from data_prep.archives import extract
from nanopatho.image import ImageError, open_image

PICTURES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".gif")  # preferred first: PMC adds a small .gif to each .jpg


class ArticleError(ValueError):
    """A file that cannot be read as an article; the message names it and says why."""


# --- captions and panels ----------------------------------------------------------------------------------------------

_LETTERS = r"[A-Za-z](?:\s*(?:[-–—~,、&和至]|and|to)\s*[A-Za-z])*"      # A   A-C   A, B   A and B
_START = r"(?:^|(?<=[.;:,)]\s)|(?<=[。；：，、）]))"                        # where a clause begins
_MARKS = (rf"{_START}[(（\[]\s*({_LETTERS})\s*[)）\]]",  # three ways to write a panel's letter, the surest first
          rf"{_START}({_LETTERS})\s*[.:)：．）、,](?=\s|[^\x00-\x7f])",
          rf"[(（\[]\s*({_LETTERS})\s*[)）\]]")
_COMMON = re.compile(r"(?<=[.;。；])\s*(?=(?:Scale|Bars?\b|(?:Original )?[Mm]agnification|All (?:panels|images)|Stain"
                     r"|标尺|比例尺|放大|原始放大))")


def letters_of(mark):
    """"A-C" -> ["A", "B", "C"]; "a, c" -> ["A", "C"]."""
    out, span = [], False
    for token in re.findall(r"and|to|[A-Za-z]|[-–—~至]", mark):
        if len(token) == 1 and token.isalpha() and token != "至":
            letter = token.upper()
            out += [chr(c) for c in range(ord(out[-1]) + 1, ord(letter))] if span and out else []
            out, span = out + [letter], False
        else:
            span = token != "and"
    return out


def split_caption(caption):
    """A caption -> (what is common to all panels, {letter: what is said of the panel}); (caption, {}) if it has none.

    Letters must appear in order from A, each new one in one style throughout: "hepatitis B", "as in (A)" and "(H&E)" do
    not count. "(A) Crypts. (B) Adenoma." and "Crypts (A) and adenoma (B)." both work; sentences on scale or stain after
    the last panel belong to all.
    """
    best = []
    for pattern in _MARKS:
        for case in (str.isupper, str.islower):
            chain, seen = [], set()
            for match in re.finditer(pattern, caption):
                letters = letters_of(match[1])
                wanted = chr(ord("A") + len(seen))
                while wanted in seen:
                    wanted = chr(ord(wanted) + 1)
                if case(match[1][0]) and letters and letters[0] == wanted and not seen & set(letters):
                    chain.append((match.start(), match.end(), letters))
                    seen |= set(letters)
            if len(seen) > max(1, sum(len(c[2]) for c in best)):
                best = chain
    if not best:
        return caption, {}
    starts, ends = [c[0] for c in best], [c[1] for c in best]
    rest = caption[ends[-1]:]
    if caption[ends[0] - 1] in ")）]" and re.match(r"\s*([.;,。；，]|$)", rest):       # the letter stands behind its text
        sentence = max((m.end() for m in re.finditer(r"[.:。：]\s*", caption[:starts[0]])), default=0)
        stem = caption[:sentence] + " " + rest.lstrip(" .;,。；，")
        texts = [caption[a:b] for a, b in zip([sentence, *ends], starts)]
    else:
        common = _COMMON.search(rest)
        stem = caption[:starts[0]] + (" " + rest[common.end():] if common else "")
        texts = [caption[a:b] for a, b in zip(ends, [*starts[1:], len(caption)])]
        texts[-1] = rest[:common.start()] if common else rest
    trim = lambda text: re.sub(r"^(?:and|和)\s+", "", " ".join(text.split()).strip(" ,;:，；：、"))
    return trim(stem), {letter: trim(text) for (_, _, letters), text in zip(best, texts) for letter in letters}


def split_image(rgb, level=232, least=0.02, side=48):
    """uint8 (H, W, 3) -> panels as boxes (x0, y0, x1, y1) in reading order, by recursive cuts along white gutters.

    Boxes under `side` pixels or a share `least` of the area (printed letters, scale bars) are left out.
    """
    H, W = rgb.shape[:2]
    white = rgb.min(-1) >= level                                          # (H, W)

    def runs(line, gap):
        """Stretches of a bool line that are not white, cut where at least `gap` lines are -> list of (start, end)."""
        filled = np.flatnonzero(~line)
        if not len(filled):
            return []
        breaks = np.flatnonzero(np.diff(filled) > gap)
        return list(zip(filled[np.r_[0, breaks + 1]].tolist(), (filled[np.r_[breaks, -1]] + 1).tolist()))

    def cut(x0, y0, x1, y1, whole=False):
        part = white[y0:y1, x0:x1]
        rows = runs(part.mean(1) > 0.995, max(1, H // 250))
        if not rows:
            return []
        if len(rows) > 1 or whole:
            return [box for a, b in rows for box in cut(x0, y0 + a, x1, y0 + b)]
        columns = runs(part.mean(0) > 0.995, max(1, W // 250))
        if len(columns) > 1 or columns[0] != (0, x1 - x0):
            return [box for a, b in columns for box in cut(x0 + a, y0, x0 + b, y1)]
        return [(x0, y0, x1, y1)]

    return [b for b in cut(0, 0, W, H, True) if min(b[2] - b[0], b[3] - b[1]) >= side
            and (b[2] - b[0]) * (b[3] - b[1]) >= least * H * W]


def save_figure(figure, files, out, letters=None):
    """Pictures of one figure, files below out in reading order -> records, one a panel where caption and pictures
    agree.

    figure: the fields all its records share, with id, group, caption. A single picture with several panels in its
    caption is cut, if it falls into that many. letters: the panel letters of the files, where they are known.
    """
    stem, texts = split_caption(figure["caption"])
    marks = sorted(texts)
    if len(files) == 1 and len(texts) > 1:
        picture, boxes = open_image(files[0]), []
        if picture.width * picture.height <= 25_000_000:
            boxes = split_image(np.asarray(picture))
        if len(boxes) == len(texts):
            whole = files[0]
            files = [whole.with_name(f"{whole.stem}_{mark}.png") for mark in marks]
            for file, box in zip(files, boxes):
                picture.crop(box).save(file)
            whole.unlink()
    panels = len(files) == len(texts) > 1
    if panels and letters and set(letters) == set(texts):
        marks = letters
    records = []
    for i, file in enumerate(files):
        mark = marks[i] if panels else str(i + 1) if len(files) > 1 else ""
        records.append({**figure, "id": "/".join(filter(None, (figure["id"], mark))),
                        "image": file.relative_to(out).as_posix()})
        if panels:
            records[-1] |= {"panel": mark, "caption": " ".join(filter(None, (stem, texts[mark])))}
    return records


def safe(text):
    """Text -> a file name of letters, digits, CJK and . _ - that never starts with a dot."""
    return re.sub(r"[^\w.-]+", "_", text).lstrip(".")[:120] or "_"


def collect(names, work, out):
    """Append the records of work(name) to out/figures.jsonl, one line a name to out/journal.jsonl, -> the whole
    journal.

    work(name) -> (records, counts, problems); its ArticleError becomes the problem of that name and the rest goes on.
    A name in the journal is not done again; what a killed call had half written behind the last line of the journal is
    cut off.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = (out / "journal.jsonl").read_bytes().splitlines(True) if (out / "journal.jsonl").exists() else []
    journal = [json.loads(line) for line in lines if line.endswith(b"\n")]
    done, groups = {j["name"] for j in journal}, {g: j["name"] for j in journal for g in j["groups"]}
    with open(out / "figures.jsonl", "ab") as figures, open(out / "journal.jsonl", "ab") as log:
        figures.truncate(journal[-1]["bytes"] if journal else 0)
        log.truncate(sum(len(line) for line in lines if line.endswith(b"\n")))
        for name in names:
            if str(name) in done:
                continue
            try:
                records, counts, problems = work(name)
            except (ArticleError, OSError) as error:
                records, counts, problems = [], {"refused": 1}, [str(error)]
            twice = {r["group"] for r in records} & set(groups)
            if twice:
                problems.append(f"{name}: {', '.join(twice)} was already read from {groups[min(twice)]}; left out")
                records, counts = [], {"read twice": 1}
            figures.write(b"".join(json.dumps(r, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                                   for r in records))
            figures.flush()
            entry = {"name": str(name), "groups": sorted({r["group"] for r in records}), "records": len(records),
                     "counts": counts, "problems": problems, "bytes": figures.seek(0, os.SEEK_END)}
            groups.update({g: str(name) for g in entry["groups"]})
            log.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            log.flush()
            journal.append(entry)
            print(f"{name}: {len(records)} records" + "".join(f"\n  {p}" for p in problems), flush=True)
    return journal


def summary(journal, out):
    """Print the totals of a journal; -> 1 if something was refused, else 0."""
    total = {}
    for entry in journal:
        for name, n in entry["counts"].items():
            total[name] = total.get(name, 0) + n
    print(f"{out}/figures.jsonl: {sum(j['records'] for j in journal)} records of {len(journal)} files; "
          + ", ".join(f"{n} {name}" for name, n in total.items()))
    return 1 if total.get("refused") else 0


# --- NXML -------------------------------------------------------------------------------------------------------------

_APART = {"p", "title", "list-item", "disp-formula", "disp-quote", "break", "label", "def-item", "tr", "td", "sec"}
_SKIPPED = {"fig", "fig-group", "table-wrap", "graphic", "inline-graphic", "media", "permissions", "object-id"}


def parse(data, name):
    """Bytes of an NXML file -> its root element. ArticleError for what is not UTF-8, not XML, or declares entities."""
    try:
        from lxml import etree
    except ImportError:
        raise SystemExit('reading articles needs lxml: pip install -e ".[data]"') from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArticleError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from error
    if "<!ENTITY" in text:  # never in PMC's files; they can hold a bomb or the address of a local file
        raise ArticleError(f"{name}: declares XML entities; refused, no article of PMC does")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, encoding="utf-8",
                             remove_comments=True, remove_pis=True)
    try:
        return etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise ArticleError(f"{name}: not well-formed XML ({error.msg}); fetch it again") from error


def text_of(element):
    """All text inside an element in one line, without that of figures and tables in it; &nbsp; and its kind
    resolved."""
    parts = []

    def walk(e):
        if not isinstance(e.tag, str):                                    # an entity that was left as it is
            parts.append(html.unescape(e.text or ""))
            return
        tag = e.tag.rsplit("}", 1)[-1]
        if tag in _SKIPPED:
            return
        if tag == "tex-math":  # a whole LaTeX document; MathML stands beside it
            beside = e.getparent() is not None and e.getparent().find(".//{*}math") is not None
            found = re.search(r"\\begin{document}\s*\$*(.*?)\$*\s*\\end{document}", e.text or "", re.S)
            parts.append("" if beside else found[1] if found else e.text or "")
            return
        apart = " " if tag in _APART else ""
        parts.append(apart + (e.text or ""))
        for child in e:
            walk(child)
            parts.append(child.tail or "")
        parts.append(apart)

    walk(element)
    return " ".join("".join(parts).split())


def licence(element):
    """The licence of an article or figure, "CC BY-NC 4.0", "CC0", or "unknown: …"; None where nothing is stated."""
    places = (list(element.iter("{*}" + tag)) for tag in ("permissions", "license", "copyright-statement"))
    stated = next(filter(None, places), [])
    said = " ".join(" ".join([*(v for x in e.iter("*") for v in x.attrib.values()), *e.itertext()]) for e in stated)
    if not said:
        return None
    found = re.search(r"creativecommons\.org/(?:licenses|publicdomain)/([a-z-]+)(?:/(\d\.\d))?", said, re.I)
    if found:
        kind = found[1].lower()
        return {"zero": "CC0", "mark": "public domain"}.get(kind, f"CC {kind.upper()} {found[2] or ''}".strip())
    more = r"Non[\s-]?Commercial|No[\s-]?Deriv\w*|Share[\s-]?Alike"
    found = re.search(rf"Creative Commons Attribution((?:[\s–-]+(?:{more}))*)", said, re.I)
    if found:
        more = [short for word, short in (("noncommercial", "-NC"), ("noderiv", "-ND"), ("sharealike", "-SA"))
                if word in re.sub(r"[\s–-]", "", found[1]).lower()]
        return "CC BY" + "".join(more)
    return "CC0" if re.search(r"\bCC0\b|public domain", said, re.I) else "unknown: " + " ".join(said.split())[:120]


def is_free(name):
    return bool(re.fullmatch(r"(CC0|public domain|CC BY(-SA)?)( \d\.\d)?", name or ""))


def figures(root, name):
    """Root of an article -> list of dicts id, label, caption, license, inline_ref (list), graphics (bare file
    names)."""
    pmc = next((e.text.strip() for e in root.iter("{*}article-id")
                if e.get("pub-id-type") in ("pmc", "pmcid") and e.text and e.text.strip()), "")
    group = "PMC" + pmc.removeprefix("PMC") if pmc else Path(str(name)).name.split(".")[0]
    meta = root.find(".//{*}article-meta")
    whole = licence(meta) if meta is not None else None
    found = list(root.iter("{*}fig"))
    order = [f.get("id") for f in found]
    said = {i: [] for i in order}                                         # figure id -> paragraphs, in reading order
    for x in root.iter("{*}xref"):
        inside = [a.tag.rsplit("}", 1)[-1] for a in x.iterancestors()]
        if x.get("ref-type") != "fig" or "p" not in inside or "caption" in inside:
            continue
        rids = (x.get("rid") or "").split()
        before = x.getprevious()                                          # Figs. 1-3: the middle one has no xref
        linked = before is not None and (before.tail or "").strip() in ("-", "–", "—", "to", "至")
        if linked and before.get("ref-type") == "fig":
            first = (before.get("rid") or "").split()[-1:]
            if first and rids and first[0] in order and rids[0] in order:
                rids = order[order.index(first[0]) + 1:order.index(rids[0])] + rids
        text = text_of(next(x.iterancestors("{*}p")))
        for rid in rids:
            if text not in said.get(rid, [text]):
                said[rid].append(text)
    out = []
    for number, fig in enumerate(found, 1):
        groups = [g for g in fig.iterancestors("{*}fig-group")]
        heads = [e for g in [*reversed(groups), fig] for e in g.iterchildren("{*}caption")]
        label = next((text_of(e) for g in [fig, *groups] for e in g.iterchildren("{*}label")), "")
        graphics = [g for g in fig.iter("{*}graphic") if next(g.iterancestors("{*}caption"), None) is None]
        graphics = [g for g in graphics  # alternatives: one picture in several formats
                    if not (g.getparent().tag.endswith("alternatives") and g.getprevious() is not None
                            and g.getprevious().tag == g.tag)]
        hrefs = [v for g in graphics for k, v in g.attrib.items() if k.rsplit("}", 1)[-1] == "href"]
        caption = " ".join(filter(None, map(text_of, heads)))
        own = licence(fig) or whole or "unknown: nothing stated"
        if re.search(r"with (?:kind )?permission|©|copyright (?:19|20)\d\d", caption, re.I):
            own = "unknown: taken over with permission"
        out.append({"id": f"{group}/{fig.get('id') or f'fig{number}'}", "group": group, "label": label,
                    "caption": caption,
                    "license": own, "inline_ref": said.get(fig.get("id"), []),
                    "graphics": [re.split(r"[\\/]", h)[-1] for h in hrefs]})
    return out


def read_article(path, out, any_license=False):
    """One package or NXML file -> (records, counts, problems), pictures written below out/images as they are."""
    path = Path(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        with tempfile.TemporaryDirectory() as folder:
            written, problems = extract(path, folder)
            texts = [name for name in written if name.lower().endswith(".nxml")]
            if len(texts) != 1:
                raise ArticleError("; ".join([f"{path}: holds {len(texts)} .nxml files, not one", *problems]))
            records, counts, more = read_article(Path(folder) / texts[0], out, any_license)
            return records, counts, problems + more
    records, problems, counts = [], [], {"figures": 0, "without picture": 0, "without caption": 0, "licence": 0}
    for figure in figures(parse(path.read_bytes(), path), path.name):
        names, files = figure.pop("graphics"), []
        lacks = ("without caption" if not figure["caption"] else "without picture" if not names else
                 "licence" if not (any_license or is_free(figure["license"])) else "")
        try:
            for name in names if not lacks else ():
                tries = [path.parent / (stem + e) for stem in (name, name.rsplit(".", 1)[0]) for e in ("", *PICTURES)]
                known = next((f for f in tries if f.suffix.lower() in PICTURES and f.is_file()), None)
                if known is None:
                    raise ImageError(f"{name}: no such picture beside the article")
                open_image(known)
                files.append(out / "images" / safe(figure["group"]) / safe(known.name))
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(known, files[-1])
        except ImageError as error:
            problems.append(f"{figure['id']}: {error}")
            lacks = "without picture"
        counts["figures"] += 1
        if lacks:
            counts[lacks] += 1
        else:
            records += save_figure({"source": "pmc", **figure}, files, out)
    return records, counts, problems


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep articles", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="packages (.tar.gz), .nxml or .xml files, or folders of them")
    parser.add_argument("--out", required=True)
    parser.add_argument("--any-license", action="store_true", help="keep figures under NC, ND or unknown licences too")
    args = parser.parse_args(argv)
    names = files_below(args.sources, (".nxml", ".xml", ".tar.gz", ".tgz"))
    out = Path(args.out)
    return summary(collect(names, lambda name: read_article(name, out, args.any_license), out), out)


def files_below(sources, endings):
    """Files and folders -> sorted files with these endings; SystemExit where there is none."""
    found = []
    for source in map(Path, sources):
        here = [source] if source.is_file() else sorted(p for p in source.rglob("*")
                                                        if p.name.lower().endswith(endings))
        if not here:
            raise SystemExit(f"{source}: no such file, or no {', '.join(endings)} file below it")
        found += here
    return found
