"""The page of a funnel: how many records each gate let through, and pictures of what it dropped and what is left.

Pure functions from the card of `python -m data_prep filter` to one HTML document without a script or an address to load
anything from. Needs nanopatho/page.py.
"""
from data_prep.filters import STAGES
from nanopatho.page import duration, esc, page as document, picture, short, thumbnail

EXAMPLES = 8                                 # of each gate and of what is kept


def bars(rows):
    """rows: (name, left after it, dropped by it) -> a table with a bar for what is left; the first row is the whole."""
    whole, out = max(1, rows[0][1]), []
    for name, left, dropped in rows:
        width, lost = 100 * left / whole, 100 * dropped / whole
        out.append(f'<tr><td>{esc(name)}</td><td>{dropped:,}</td><td>{left:,}</td><td style="width:50%"><svg '
                   f'viewBox="0 0 100 6" width="100%" height="14" preserveAspectRatio="none" role="img" '
                   f'aria-label="{width:.1f} percent left">'
                   f'<rect width="{width:.2f}" height="6" fill="var(--dapo)"/><rect x="{width:.2f}" width="{lost:.2f}" '
                   f'height="6" fill="var(--grpo)" opacity=".45"/></svg></td><td>{width:.1f} %</td></tr>')
    return ('<div class="scroll"><table><tr><th>gate</th><th>dropped</th><th>left</th><th></th><th></th></tr>'
            + "".join(out) + "</table></div>")


def example(images, caption, why, folder):
    """One record as a picture with the reason and the beginning of its caption below it."""
    address, shape = None, 1.0
    if images:
        try:
            address, shape = thumbnail(folder / images[0], 320)
        except (OSError, ValueError):        # what the gate "unreadable" holds: shown as not found
            pass
    style = f'--image:url({address});--shape:{min(max(shape, 0.25), 4):.3f}' if address else ""
    text = " · ".join(filter(None, (why, short(str(caption or ""), 90))))
    return f'<span style="{style}">{picture(short(text, 160), there=bool(address))}</span>'


def page(card, shown, folder):
    """card: the dict of card.json; shown: {gate or "kept": [(images relative to folder, caption, reason)]} -> HTML."""
    left, rows = card["read"], [("read", card["read"], 0)]
    for name in STAGES:
        dropped = card["dropped"].get(name, 0)
        left -= dropped
        rows.append((name, left, dropped))
    took = sum(card["seconds"].values())
    times = ", ".join(f"{esc(name)} {duration(s)}" for name, s in card["seconds"].items())
    parts = [f'<p class="eyebrow">{esc(", ".join(card["made_from"]))}</p>'
             f'<h1>{card["records"]:,} of {card["read"]:,} records are left</h1>'
             '<p class="lead">Every gate in its order; dropped.jsonl names each record that stopped at one, with file, '
             f'line and reason.</p>{bars(rows)}<p class="dim">{duration(took)}, {card["read"] / max(took, 1e-9):,.0f} '
             f'records a second: {times}.</p>']
    for name in ("kept", *STAGES):
        if shown.get(name):
            many = card["records"] if name == "kept" else card["dropped"].get(name, 0)
            parts.append(f'<h2>{esc(name)} <small>{many:,}</small></h2><div class="pictures">'
                         + "".join(example(*x, folder) for x in shown[name]) + "</div>")
    return document("Funnel", "".join(parts))
