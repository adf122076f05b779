"""Drawing for report.py: one style sheet and a few charts, as HTML and inline SVG written by hand.

Contract: pure functions from numbers to strings of HTML; only thumbnail reads a file and needs Pillow. No script, no
font, no address to load anything from, so that a page works from a USB stick in ten years. May be copied alone.

Everything that came from outside goes through esc(). Colours are CSS variables with a light and a dark value; they are
those of the stains: haematoxylin for DAPO, eosin for GRPO, DAB brown for pretraining. Colour never carries a meaning
alone: stages differ in line or marker too, and true and false statements in underline and sign.
"""

import base64
import html
import io
import math

from PIL import Image

W = 340                     # width of every chart in its own units; the page scales it with its column


def esc(value):
    """Any value as text that is safe inside an element and inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def number(value, percent=False, digits=3):
    """0.6132 -> "61.3 %"; 0.03 -> "0.03"; 1234.5 -> "1234"; None -> "–"."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def interval(ci, percent=True):
    """[0.57, 0.65] -> "57–65"; None -> ""."""
    if not ci:
        return ""
    return f"{100 * ci[0]:.0f}–{100 * ci[1]:.0f}" if percent else f"{number(ci[0])}–{number(ci[1])}"


def duration(seconds):
    """95 -> "1 min 35 s"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


# --------------------------------------------------------------------------------------------------------------- scales

def ticks(low, high, about=4):
    """Round numbers from inside [low, high], about that many."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int((high - first * step) / step + 1e-9) + 1)]


def smooth(values, share=0.06):
    """Centred running mean over about `share` of the series; shorter at both ends, so that it has no lag."""
    half = int(len(values) * share / 2)
    total = [0.0]
    for v in values:
        total.append(total[-1] + v)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(total[b] - total[a]) / (b - a) for a, b in spans]


def thin(xs, ys, most=240):
    """At most `most` points, each the mean of its neighbours: keeps the page small on long runs."""
    if len(xs) <= most:
        return xs, ys
    edges = [i * len(xs) // most for i in range(most + 1)]
    mean = lambda v: [sum(v[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    return mean(xs), mean(ys)


# --------------------------------------------------------------------------------------------------------------- charts

def figure(title, note, height, parts):
    """One chart: a list of SVG elements in a space of W x height, under its title and one line of explanation."""
    return (f'<figure><figcaption><b>{esc(title)}</b>{esc(note)}</figcaption>'
            f'<svg viewBox="0 0 {W} {height}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg></figure>')


def finite(value):
    return value is not None and math.isfinite(value)


def line_chart(title, series, *, note="", percent=False, x_name="step", height=170, lines=()):
    """Curves over a common axis, raw values faint, their running mean in front, its last value as label.

    series: list of (css class, xs, ys); None, NaN and infinity are left out. lines: list of (value, label), dashed
    levels. The axis starts at 0 where that costs less than half of the height. No points: "".
    """
    left, right, top, bottom = 42, 46, 8, 28
    curves = []
    for name, xs, ys in series:
        keep = [(x, y) for x, y in zip(xs, ys) if finite(x) and finite(y)]
        if keep:
            xs, ys = [x for x, _ in keep], [y for _, y in keep]
            curves.append((name, *thin(xs, ys), thin(xs, smooth(ys))[1]))
    if not curves:
        return ""
    ys = [y for _, _, raw, mean in curves for y in (robust(raw) + mean)] + [v for v, _ in lines]
    low, high = min(ys), max(ys)
    if high - low < 1e-9:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    low, high = 0.0 if 0 <= low < high / 2 else low - 0.04 * (high - low), high + 0.04 * (high - low)
    x0, x1 = min(c[1][0] for c in curves), max(c[1][-1] for c in curves)
    x1 = x1 if x1 > x0 else x0 + 1
    X = lambda x: left + (x - x0) / (x1 - x0) * (W - left - right)
    Y = lambda y: top + (1 - (min(max(y, low), high) - low) / (high - low)) * (height - top - bottom)

    out = []
    for t in ticks(low, high):
        text = f"{100 * t:.3g} %" if percent else f"{t:.4g}"
        out.append(f'<path class="grid" d="M{left} {Y(t):.1f}H{W - right}"/>'
                   f'<text class="end" x="{left - 6}" y="{Y(t) + 3.5:.1f}">{text}</text>')
    for t in ticks(x0, x1):
        out.append(f'<text x="{X(t):.1f}" y="{height - 12}" class="mid">{t:.5g}</text>')
    out.append(f'<text x="{W - right}" y="{height - 3}" class="end dim">{esc(x_name)}</text>')
    for value, label in lines:
        out.append(f'<path class="level" d="M{left} {Y(value):.1f}H{W - right}"/>'
                   f'<text x="{left + 4}" y="{Y(value) - 4:.1f}" class="dim">{esc(label)}</text>')
    path = lambda xs, ys: "M" + "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in zip(xs, ys))
    for name, xs, raw, mean in curves:
        out.append(f'<path class="raw {esc(name)}" d="{path(xs, raw)}"/>')
    for name, xs, raw, mean in curves:
        out.append(f'<path class="curve {esc(name)}" d="{path(xs, mean)}"/>')
    spots = spread([Y(c[3][-1]) for c in curves], 12, top + 4, height - bottom)
    for (name, xs, raw, mean), y in zip(curves, spots):
        text = f"{100 * mean[-1]:.{0 if mean[-1] >= 0.1 else 1}f} %" if percent else f"{mean[-1]:.3g}"
        out.append(f'<circle class="dot {esc(name)}" cx="{X(xs[-1]):.1f}" cy="{Y(mean[-1]):.1f}" r="2.6"/>'
                   f'<text x="{X(xs[-1]) + 7:.1f}" y="{y + 3.5:.1f}" class="label {esc(name)}">{text}</text>')
    return figure(title, note, height, out)


def robust(values):
    """Without the most extreme 2 % of both sides: one spike (a first gradient) must not flatten the rest of a curve."""
    cut = len(values) // 50
    return sorted(values)[cut:len(values) - cut]


def spread(ys, gap, low, high):
    """Move label positions apart to at least `gap`, in their order, inside [low, high]."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    out, floor = list(ys), low
    for i in order:
        out[i] = floor = max(ys[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        out[i] = ceiling = min(out[i], ceiling)
        ceiling -= gap
    return out


def dot_chart(title, rows, *, note="", percent=True, top=None, lines=()):
    """Dots with their intervals, one row a line.

    rows: list of (label, [(css class, value, [low, high] or None), …], text on the right). lines: list of (value,
    label), drawn from top to bottom and named below. top: the end of the axis (1 for shares). No values: "".
    """
    right, head, row = 56, 4, 26
    rows = [(label, [d for d in dots if finite(d[1])], text) for label, dots, text in rows]
    rows = [r for r in rows if r[1]]
    if not rows:
        return ""
    left = min(max(6.7 * max(len(label) for label, _, _ in rows) + 14, 64), 140)
    top = top or 1.15 * max(max([v] + list(ci or [])) for _, dots, _ in rows for _, v, ci in dots) or 1
    step = 10
    height_of = [max(row, step * len(dots) + 14) for _, dots, _ in rows]
    bottom = head + sum(height_of)
    X = lambda v: left + min(max(v / top, 0), 1) * (W - left - right)
    out = []
    for t in ticks(0, top):
        text = f"{100 * t:.3g} %" if percent else f"{t:.4g}"
        out.append(f'<path class="grid" d="M{X(t):.1f} {head}V{bottom}"/>'
                   f'<text class="mid" x="{X(t):.1f}" y="{bottom + 13}">{text}</text>')
    captions = []
    for value, label in sorted(lines):
        out.append(f'<path class="level" d="M{X(value):.1f} {head}V{bottom}"/>')
        captions.append(f"{label} {100 * value:.0f}" if percent else f"{label} {value:.3g}")
    height = bottom + (20 if captions else 18)
    for at in range(0, len(captions), 2):                       # two a line: four names fit under 340 units
        height += 13
        key = f'<path class="level" d="M{left - 26} {height - 6}H{left - 8}"/>' if at == 0 else ""
        out.append(f'{key}<text x="{left}" y="{height - 2}">{esc(" · ".join(captions[at:at + 2]))}</text>')
    height += 4 * bool(captions)
    y = head
    for (label, dots, text), h in zip(rows, height_of):
        middle = y + h / 2
        css = dots[0][0] if len(dots) == 1 else ""
        out.append(f'<text class="end name" x="{left - 9}" y="{middle + 3.5:.1f}">{esc(short(label, 21))}</text>'
                   f'<text class="{f"label {esc(css)}" if css else ""}" x="{W - right + 8}" y="{middle + 3.5:.1f}">'
                   f'{esc(text)}</text>')
        for i, (name, value, ci) in enumerate(dots):
            at = middle + (i - (len(dots) - 1) / 2) * step
            said = f"{label}, {name}: {number(value, percent)}" + (f" [{interval(ci, percent)}]" if ci else "")
            bar = f'<path class="bar {esc(name)}" d="M{X(ci[0]):.1f} {at:.1f}H{X(ci[1]):.1f}"/>' if ci else ""
            out.append(f"<g><title>{esc(said)}</title>{bar}{marker(name, X(value), at)}</g>")
        y += h
    return figure(title, note, height, out)


def marker(name, x, y):
    """Circle for dapo, diamond for grpo, ring for everything else: readable without colour."""
    if name == "grpo":
        return f'<path class="dot grpo" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>'
    return f'<circle class="dot {esc(name)}{"" if name == "dapo" else " ring"}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def short(text, most):
    return text if len(text) <= most else text[:most - 1] + "…"


def legend(names):
    """names: list of (css class, text)."""
    items = "".join(f'<span><svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true"><path '
                    f'class="curve {esc(css)}" d="M1 6H25"/>{marker(css, 13, 6)}</svg>{esc(text)}</span>'
                    for css, text in names)
    return f'<p class="legend">{items}</p>'


def parts_svg(parts, advantage):
    """Reward parts (-1 to 1) and the advantage (-3 to 3) of one answer as small bars around a common zero."""
    zero, unit, rows = 102, 34, [(name, value, 1.0) for name, value in parts.items()]
    if advantage is not None:
        rows.append(("advantage", advantage, 3.0))
    out = []
    for i, (name, value, full) in enumerate(rows):
        y = 13 * i
        length = unit * max(-1.0, min(1.0, value / full))
        kind = "adv" if name == "advantage" else "part"
        out.append(f'<text x="0" y="{y + 9}" class="{kind}">{esc(short(name, 9))}</text>'
                   f'<rect class="{"neg" if value < 0 else "pos"} {kind}" x="{zero + min(length, 0):.1f}" y="{y + 2}" '
                   f'width="{abs(length):.1f}" height="8" rx="1.5"/>'
                   f'<text x="{zero + unit + 34}" y="{y + 9}" class="end {kind}">{value:+.2f}</text>')
    height = 13 * len(rows)
    return (f'<svg class="parts" viewBox="0 0 172 {height}" width="172" height="{height}" role="img" '
            f'aria-label="reward parts"><path class="grid" d="M{zero} 0V{height}"/>{"".join(out)}</svg>')


def thumbnail(path, most=640):
    """A picture's file as (data address, width / height), at most `most` pixels a side; (None, 1) where there is none.
    Small JPEG and PNG files go in as they are. A file that is no picture raises OSError."""
    if not path.is_file():
        return None, 1.0
    try:
        with Image.open(path) as opened:
            kind, (width, height), data = opened.format, opened.size, path.read_bytes()
            if max(width, height) > most or kind not in ("JPEG", "PNG"):
                small, buffer = opened.convert("RGB"), io.BytesIO()
                small.thumbnail((most, most))
                small.save(buffer, "JPEG", quality=90)
                kind, data = "JPEG", buffer.getvalue()
    except Image.DecompressionBombError as error:
        raise OSError(error) from error
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode("ascii"), width / height


def picture(caption, heat=None, there=True):
    """The image of the enclosing element (its style sets --image and --shape), with a heat map (rows x cols of 0..1)
    over it as rectangles: the image's bytes stand in the page once, however often it is shown."""
    cells = ""
    if heat:
        rects = "".join(f'<rect x="{c}" y="{r}" width="1.02" height="1.02" opacity="{0.72 * max(0, min(1, v)):.2f}"/>'
                        for r, line in enumerate(heat) for c, v in enumerate(line))
        cells = (f'<svg class="heat" viewBox="0 0 {len(heat[0])} {len(heat)}" preserveAspectRatio="none">{rects}</svg>')
    frame = (f'<div role="img" aria-label="{esc(caption)}">{cells}</div>' if there else
             '<div class="gone">image not found</div>')
    return f'<figure class="picture">{frame}<figcaption>{esc(caption)}</figcaption></figure>'


def marked(text, claims, most=4000):
    """An answer with its claims marked and its tags dimmed. claims: dicts with start, end, true, attribute, value."""
    spans = {}
    for c in claims:
        spans.setdefault((c["start"], c["end"]), []).append(c)             # one phrase may make two claims
    out, at = [], 0
    for (start, end), found in sorted(spans.items()):
        if start < at or end > most:
            continue
        css, sign, word = ("yes", "✓", "true") if all(c["true"] for c in found) else ("no", "✗", "false")
        said = " and ".join(f'{c["attribute"]} {str(c["value"]).replace("!", "not ")}' for c in found)
        out.append(f'{tags(text[at:start])}<mark class="{css}" title="{esc(said)}: {word} of this image">'
                   f'{esc(text[start:end])}<i aria-label="{word}">{sign}</i></mark>')
        at = end
    more = f'<span class="dim"> … {len(text) - most} more characters</span>' if len(text) > most else ""
    return "".join(out) + tags(text[at:most]) + more


def tags(text):
    text = esc(text)
    for name in ("think", "/think", "answer", "/answer"):
        text = text.replace(f"&lt;{name}&gt;", f'<span class="tag">&lt;{name}&gt;</span>')
    return text


# ---------------------------------------------------------------------------------------------------------------- style

CSS = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#24211e;--dim:#6b655e;--rule:#e5dfd6;--soft:#f2eee7;
--clip:#1d7872;--pretrain:#99641a;--sft:#5d6875;--grpo:#c4416b;--dapo:#4a3f96;--yes:#1f7a4d;--no:#bb3530;
--yes-bg:#dff1e6;--no-bg:#fae2df;--heat:#ff7a1a;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Times New Roman",serif}
@media(prefers-color-scheme:dark){:root{--paper:#161517;--card:#1f1d20;--ink:#ebe7e1;--dim:#a8a199;--rule:#37333a;
--soft:#28252a;--clip:#63c4ba;--pretrain:#dcaa5f;--sft:#a8b3c1;--grpo:#f08fb0;--dapo:#aca0f3;--yes:#6fd0a0;
--no:#f2928b;--yes-bg:#1d3a2b;--no-bg:#47221f;--heat:#ff8a33}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 var(--sans);-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:56px 28px 96px}
h1,h2,h3,.big{font-family:var(--serif);font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(30px,5vw,46px);margin:.2em 0 .35em;letter-spacing:-.01em}
h2{font-size:27px;margin:72px 0 6px}
h3{font-size:19px;margin:0 0 10px}
p{max-width:72ch;margin:.4em 0 1em}
.eyebrow,.dim,figcaption,small{color:var(--dim)}
.eyebrow{font-size:14px;letter-spacing:.02em;margin:0}
.lead{font-size:19px}
.warn{border-left:3px solid var(--grpo);padding:1px 0 1px 14px;margin:18px 0;color:var(--dim);font-size:15px}
.soon{background:var(--soft);border-radius:10px;padding:10px 16px;max-width:none}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:34px 0 0}
.card,.grids figure,.question{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.card{padding:16px 18px 14px}
.card p{margin:0;font-size:14px;color:var(--dim);line-height:1.45}
.card .big{font-size:36px;line-height:1.3;font-variant-numeric:lining-nums tabular-nums}
.scroll{overflow-x:auto;margin:18px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:15px}
th,td{text-align:right;padding:10px 8px;border-bottom:1px solid var(--rule);white-space:nowrap;vertical-align:top}
th{font-weight:500;color:var(--dim);font-size:13.5px;vertical-align:bottom;line-height:1.3;white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:2px}
td:first-child small{white-space:normal;max-width:32ch;padding-left:18px}
td small{display:block;font-size:12.5px;line-height:1.3}
tr.later td{color:var(--dim)}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:8px;background:var(--c)}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr));gap:16px;margin:16px 0}
.packed{display:block;columns:3 310px;column-gap:16px}
.packed figure{break-inside:avoid;margin-bottom:16px}
figure{margin:0;min-width:0}
.grids figure{padding:14px 14px 8px}
figcaption{font-size:13.5px;line-height:1.4;margin-bottom:8px}
figcaption b{display:block;color:var(--ink);font-weight:600;font-size:15px}
figure>svg{display:block;width:100%;height:auto}
svg text{font:11px var(--sans);fill:var(--dim);font-variant-numeric:tabular-nums}
svg .end{text-anchor:end}
svg .mid{text-anchor:middle}
svg .name{fill:var(--ink)}
svg .label{font-weight:600;fill:var(--c,var(--ink))}
.grid{stroke:var(--rule);fill:none}
.level{stroke:var(--dim);stroke-dasharray:2 3;fill:none}
.clip{--c:var(--clip)}.pretrain{--c:var(--pretrain)}.sft{--c:var(--sft)}.grpo{--c:var(--grpo)}.dapo{--c:var(--dapo)}
.raw,.curve,.bar{stroke:var(--c,var(--ink));fill:none;stroke-linejoin:round}
.raw{opacity:.22}
.curve{stroke-width:2}
.curve.grpo{stroke-dasharray:6 3}
.bar{stroke-width:3;opacity:.5}
.dot{fill:var(--c,var(--ink));stroke:var(--card);stroke-width:1}
.dot.ring{fill:var(--card);stroke:var(--c,var(--ink));stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;font-size:14px;margin:10px 0;max-width:none}
.legend svg{vertical-align:-1px;margin-right:7px}
details{margin:14px 0}
summary{cursor:pointer;color:var(--dim);font-size:15px}
summary:hover{color:var(--ink)}
.question{padding:20px 24px;margin:16px 0}
.question>summary{color:var(--ink);font-size:17px;line-height:1.4}
.question>summary small{font-size:14px;margin-left:10px;white-space:nowrap}
.question[open]>summary{margin-bottom:18px}
.ask{display:grid;grid-template-columns:auto 1fr;gap:12px 28px;align-items:start}
.pictures{display:flex;gap:12px;flex-wrap:wrap}
.picture{width:168px}
.picture figcaption{margin:5px 0 0;font-size:12.5px}
.picture div{position:relative;aspect-ratio:var(--shape,1);border-radius:8px;overflow:hidden;
background:var(--soft) var(--image,none) center/100% 100%}
.heat{position:absolute;inset:0;width:100%;height:100%}
.heat rect{fill:var(--heat)}
.picture .gone{display:grid;place-items:center;color:var(--dim);font-size:13px}
.options{list-style:none;margin:0 0 10px;padding:0}
.options li{padding:1px 0 1px 30px;position:relative}
.options li b{position:absolute;left:0;font-weight:500;color:var(--dim)}
.options .right{font-weight:600}
.options .right::after{content:" ✓ right";color:var(--yes);font-size:13px}
.chip{display:inline-block;border:1px solid var(--rule);border-radius:99px;padding:0 10px;font-size:13px;
color:var(--dim);margin:0 6px 6px 0}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:22px 34px;margin-top:24px}
.side h3 small{font:14px var(--sans);margin-left:10px}
.answer{border-top:1px solid var(--rule);padding:10px 0 12px}
.answer p{margin:-5px 0 0;font-size:15px;line-height:1.6;white-space:pre-wrap;overflow-wrap:anywhere}
.answer header{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:13.5px;color:var(--dim);margin-bottom:5px}
.answer header b{color:var(--ink);font-variant-numeric:tabular-nums}
.verdict{font-weight:600}
.verdict.yes{color:var(--yes)}
.verdict.no{color:var(--no)}
.scores{display:grid;grid-template-columns:172px 1fr;gap:6px 18px;align-items:start}
svg.parts text{font-size:10.5px}
svg.parts .adv{fill:var(--ink);font-weight:600}
rect.pos{fill:var(--yes)}
rect.neg{fill:var(--no)}
rect.part{opacity:.5}
mark{color:inherit;border-radius:3px;padding:0 2px;text-decoration-thickness:1.5px;text-underline-offset:3px}
mark.yes{background:var(--yes-bg);text-decoration:underline solid var(--yes) 1.5px}
mark.no{background:var(--no-bg);text-decoration:underline wavy var(--no) 1.2px}
mark i{font-style:normal;font-size:11px;font-weight:700;margin-left:3px}
mark.yes i{color:var(--yes)}
mark.no i{color:var(--no)}
.tag{color:var(--dim);font:12.5px ui-monospace,Menlo,Consolas,monospace}
.settings{font-size:13.5px;columns:3 230px;column-gap:28px;margin:8px 0 18px}
.settings div{break-inside:avoid;display:flex;justify-content:space-between;gap:12px;
border-bottom:1px dotted var(--rule)}
.settings span:last-child{text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
dl{max-width:80ch}
dt{font-weight:600;margin-top:10px}
dd{margin:0;color:var(--dim)}
footer{margin-top:72px;padding-top:18px;border-top:1px solid var(--rule);color:var(--dim);font-size:14px}
@media(max-width:700px){main{padding:28px 16px 64px}h2{margin-top:52px}.ask,.scores{grid-template-columns:1fr}
.question{padding:16px}.cards{grid-template-columns:repeat(2,1fr);gap:10px}.card{padding:12px 14px}
.card .big{font-size:28px}.pictures{gap:8px}.picture{width:calc(33.3% - 6px)}
.answer p{margin:0}.lead{font-size:17px}}
@media print{details{break-inside:avoid}}
"""


def page(title, body):
    """A whole document."""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{esc(title)}</title><style>{CSS}</style></head><body><main>\n{body}\n</main></body></html>\n")
