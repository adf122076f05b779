"""Is the reasoning true of the image, and does the answer hang on what it names? Only a drawn world can tell.

    python -m nanopatho.evaluate faithful --model runs/demo/dapo --data data/tiny --items 200

claims       findings named in <think> against the facts of the image: precision, recall; contradiction: the reasoning
             concludes on another option than the one answered.
sensitivity  a finding is taken out of the image: the same seed is drawn again without it. Where that makes another
             option right, an answer that looked changes (sensitivity), and to that option (follows). Where the right
             option stays, it should stay (stability). A model that changes at random has sensitivity, but no stability.
pointing     gradient x input of the words that name a finding against the renderer's mask of it: share of the heat
             inside the mask (energy), and of the hottest cell (hit). Chance for both is the share of the area.

Needs data_prep beside nanopatho: the renderer draws again, and the rules say which option is right then.
"""
import collections
import json
from pathlib import Path

import numpy as np
import torch

from . import rewards
from .chat import IMAGE, PROMPTS
from .data import LETTERS, DataError, Images, image_paths, question_text, read_records, vlm_batch
from .generate import generate
from .log import ConfigError
from .metrics import interval

MAX_PIXELS = 1280 * 28 * 28                                          # the training scripts' --max_pixels
# What is there when a finding is gone; with a mass goes its border, with the stain its strength and place.
ABSENT = {"material": "none", "inflammation": "none", "mitoses": "absent", "nucleoli": "absent", "background": "clean",
          "necrosis": "absent", "cyst": "absent", "mass": "absent", "proportion": "negative"}
WITH_IT = {"mass": {"border": "none"}, "proportion": {"intensity": "none", "location": "none"}}
MASKS = {"nuclear_size": "nuclei", "pleomorphism": "nuclei", "intensity": "proportion", "location": "proportion",
         "contour": "nuclei"}                                        # attributes whose mask has another name

def read_lexicon(data):
    """The phrases by which findings are named, written by data_prep; {} for a data folder without one."""
    path = Path(data) / "lexicon.json"
    if not path.is_file():
        return {}
    try:
        lexicon = json.loads(path.read_text(encoding="utf-8"))
        phrases = [p for attributes in lexicon.values() for values in attributes.values() for p in values.values()]
    except (ValueError, AttributeError) as error:                    # not JSON; a list or a text where an object belongs
        raise DataError(f'{path}: must be {{subfield: {{attribute: {{value: [phrases]}}}}}} ({error}); mend it, or remove '
                        'it to go without claims') from error
    wrong = [p for p in phrases if not (isinstance(p, list) and p and all(isinstance(x, str) and x for x in p))]
    if wrong:
        raise DataError(f"{path}: {str(wrong[0])[:80]!r} stands where a list of phrases belongs")
    return lexicon


def check_facts(records, lexicon):
    """Facts must know every attribute that the lexicon of their subfield names, else a claim about it cannot be judged."""
    for r in records:
        missing = set(lexicon.get(r.get("subfield"), ())) - set(r.get("facts") or lexicon.get(r.get("subfield"), ()))
        if missing:
            raise DataError(f"{r['_where']}: field 'facts' lacks {', '.join(sorted(missing))}, which lexicon.json names for "
                            f"subfield {r['subfield']}; add the value, or leave 'facts' out of the record")


@torch.no_grad()
def caption_claims(model, tokenizer, data, items, images=None, max_pixels=MAX_PIXELS):
    """Stage 1's yardstick: captions written for held-out images, their findings checked -> dict for results.json."""
    path, lexicon = Path(data) / "test.jsonl", read_lexicon(data)
    if not path.is_file() or not lexicon:
        return {}
    records, images, texts = read_records(path)[:items], images or Images(), []
    records = [r for r in records if r.get("image") and r.get("facts") and r.get("subfield") in lexicon]
    if not records:                                                  # n in the results tells how many could be judged
        return {}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    for at in range(0, len(records), 64):
        rows = [(r, [{"role": "user", "content": IMAGE * len(image_paths(r))}], "text") for r in records[at:at + 64]]
        batch = vlm_batch(rows, tokenizer, model.config, images=images, max_pixels=max_pixels)
        batch.pop("labels")
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
        batch = {name: v.to(device) for name, v in batch.items()}
        made = generate(model, **batch, max_new_tokens=64, temperature=0.0, eos_token_ids=tokenizer.eos_ids,
                        pad_token_id=tokenizer.pad_id, banned_token_ids=tokenizer.banned_ids)
        texts += [tokenizer.decode(ids[mask]) for ids, mask in zip(made.ids.cpu(), made.mask.cpu())]
    model.train(was_training)
    precision, recall, per_finding = [], [], collections.defaultdict(list)
    for record, text in zip(records, texts):
        found = rewards.claims(text, lexicon[record["subfield"]])
        verdicts = rewards.judge_claims(found, record["facts"])
        precision += verdicts
        named = {c[0] for c, v in zip(found, verdicts) if v}
        for attribute in lexicon[record["subfield"]]:
            recall.append(attribute in named)
            per_finding[f"{record['subfield']} {attribute}"].append(attribute in named)
    value, ci = interval(precision) if precision else (None, None)  # no finding named: no number, and JSON knows no NaN
    return {"claim_accuracy": value, "claim_accuracy_ci": ci, "claim_recall": float(np.mean(recall)), "n": len(records),
            "by_finding": {k: float(np.mean(v)) for k, v in sorted(per_finding.items())},
            "examples": [{"id": r["id"], "caption": t, "facts": r["facts"]} for r, t in zip(records[:4], texts)]}


def heatmap(model, tokenizer, record, text, images, *, tail=8, skip=0, max_pixels=MAX_PIXELS):
    """Where the answer looked: |gradient x input| of a log-probability over the image tokens -> rows x cols, 0..1.

    It is that of the reply's last `tail` tokens less its last `skip`: by default of "<answer>B</answer><|im_end|>".
    Saliency, not attention weights: it follows the whole network. It shows influence, not proof of a reason.
    """
    messages = [{"role": "system", "content": PROMPTS["cot"]}, {"role": "user", "content": question_text(record)},
                {"role": "assistant", "content": text.replace(IMAGE, "")}]           # a model may spell the mark
    batch = vlm_batch([(record, messages, "chat")], tokenizer, model.config, images=images, max_pixels=max_pixels)
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    with torch.no_grad():
        seen = model.visual(batch["pixel_values"], batch["image_grid_thw"])
    seen = seen.detach().requires_grad_(True)
    hidden = model.hidden_states(batch["input_ids"], image_embeds=seen, image_grid_thw=batch["image_grid_thw"],
                                 attention_mask=batch["attention_mask"])
    labels = batch["labels"].clone()
    labels[:, :-tail] = -100
    labels[:, labels.shape[1] - skip:] = -100
    gradient, = torch.autograd.grad(model.loss(hidden, labels), seen)
    _, rows, cols = (batch["image_grid_thw"][0] // 2).tolist()
    heat = (gradient * seen).sum(-1).abs().view(-1)[:rows * cols].view(rows, cols)
    return (heat / heat.max().clamp_min(1e-12)).detach().cpu().round(decimals=3).tolist()


def claim_heat(model, tokenizer, record, text, claim, images, max_pixels=MAX_PIXELS):
    """Heat map of the words of one claim (attribute, value, start, end, …) of an answer -> array (rows, cols)."""
    start, end = claim[2], claim[3]
    words = len(tokenizer.encode(text[:end])) - len(tokenizer.encode(text[:start].rstrip()))
    return np.array(heatmap(model, tokenizer, record, text[:end], images, tail=max(1, words) + 2, skip=2,
                            max_pixels=max_pixels))                  # 2: the reply's end token and line end


def pointing(heat, mask):
    """heat (rows, cols) >= 0, mask bool (H, W) -> energy inside the mask, hit of the hottest cell, chance; all in 0..1.

    A cell that the mask covers by half counts half, for the hit as well: a point anywhere in it would hit as often.
    """
    rows, cols = heat.shape
    edges = [np.round(np.linspace(0, size, n + 1)).astype(int) for size, n in zip(mask.shape, (rows, cols))]
    inside = np.add.reduceat(np.add.reduceat(mask.astype(float), edges[0][:-1], 0), edges[1][:-1], 1)
    inside /= np.outer(np.diff(edges[0]), np.diff(edges[1]))
    best = heat == heat.max()                                        # a flat map points nowhere: the mean over its ties
    return float((heat * inside).sum() / max(heat.sum(), 1e-12)), float(inside[best].mean()), float(mask.mean())


def without(facts, attribute):
    """Facts of the same case with one finding gone, or None where it is not there or cannot be taken out alone."""
    if attribute not in ABSENT or facts.get(attribute) in (None, ABSENT[attribute]):
        return None
    return {**facts, attribute: ABSENT[attribute], **WITH_IT.get(attribute, {})}


def redraw(records, images):
    """Records of the drawn world -> list of (record, finding or None, image, masks, new right letter or None).

    First each record itself, drawn again (the stored JPEG would differ by its compression), then one version for each
    finding that can be taken out and leaves one of its options right. DataError names a record that cannot be drawn.
    """
    try:
        from data_prep import questions, render, world
    except ImportError as error:
        raise ConfigError("faithful: data_prep is not importable; start from the repository's folder (its renderer "
                          "draws the images again)") from error
    out = []
    for r in records:
        facts, size = r.get("facts") or {}, images(r)[0].shape[0]
        try:
            kind = next(k for k in questions.kinds(facts["subfield"], r["level"]) if k.name == r["kind"])
            image, masks, _ = render.draw(world.for_drawing(facts), size)
        except (KeyError, StopIteration, ValueError) as error:
            raise DataError(f"{r['_where']}: fields 'facts', 'level', 'kind' do not say how to draw and ask this "
                            f"({type(error).__name__}: {error}); records of data_prep microworld are needed") from error
        out.append(({**r, "_array": image}, None, masks, r["answer"]))
        for attribute in world.ATTRIBUTES[facts["subfield"]]:
            gone = without(facts, attribute)
            right = kind.label(gone) if gone else None
            if right in r["options"]:
                out.append(({**r, "_array": render.draw(world.for_drawing(gone), size)[0]}, attribute, None,
                            LETTERS[r["options"].index(right)]))
    return out


def faithfulness(model, tokenizer, data, *, pool="test", items=200, max_new_tokens=96, prompt="cot",
                 max_pixels=MAX_PIXELS, heat=True):
    """-> dict for faithful.json: claims, sensitivity, pointing; numbers {"value", "ci", "n"}, intervals by question."""
    from .evaluate import answers, judge, table
    records, lexicon = read_records(f"{data}/{pool}.jsonl", use="question")[:items or None], read_lexicon(data)
    check_facts(records, lexicon)
    drawn, array = redraw(records, Images()), lambda r: [r["_array"]]
    said = answers(model, tokenizer, [d[0] for d in drawn], max_new_tokens=max_new_tokens, prompt=prompt, images=array,
                   max_pixels=max_pixels, title="faithful")
    texts = [text for text, in said]
    plain = [(record, [text]) for (record, gone, _, _), text in zip(drawn, texts) if gone is None]
    numbers = table(*zip(*plain), lexicon)[0]
    out = {"n": len(records), "pool": pool, "accuracy": numbers["accuracy"][0], "accuracy_ci": numbers["accuracy"][1],
           "claim_recall": numbers.get("claim_recall"), "contradiction": numbers["contradiction"]}
    out["claim_precision"], out["claim_precision_ci"] = numbers.get("claims", (None, None))
    found, names, before, examples = collections.defaultdict(list), collections.defaultdict(list), None, []

    def note(name, value, record):
        found[name].append(float(value)), names[name].append(record["id"])

    for (record, gone, masks, right), text in zip(drawn, texts):
        now = judge(text, record, lexicon)
        if gone is None:
            before, said, first = now, {c[0]: c for c in now["claims"] if c[4] and c[1][0] != "!"}, text
            for attribute, claim in said.items() if heat else ():
                mask = masks.get(MASKS.get(attribute, attribute))
                if mask is not None:
                    hot = claim_heat(model, tokenizer, record, text, claim, array, max_pixels)
                    for part, value in zip(("energy", "hit", "chance"), pointing(hot, mask)):
                        note(f"pointing: {part}", value, record)
                        note(f"pointing {record['subfield']} {attribute}: {part}", value, record)
            continue
        letter = lambda j: None if j["chosen"] is None else LETTERS[j["chosen"]]
        changed = letter(now) != letter(before)
        if right == record["answer"]:
            note("stability", not changed, record)
        else:
            for name in ("", " of findings named")[:1 + (gone in said)]:
                note("sensitivity" + name, changed, record), note("follows" + name, letter(now) == right, record)
            examples.append({"id": record["id"], "removed": f"{gone} {record['facts'][gone]}", "before": first,
                             "after": text, "right": [record["answer"], right], "changed": changed})
    for name, values in sorted(found.items()):
        value, ci = interval(values, groups=names[name])
        out[name] = {"value": value, "ci": ci, "n": len(values)}
    return {**out, "examples": examples[:12]}
