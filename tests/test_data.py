"""Bad records and images are named; batches: padding, order and augmentation change what they may and nothing else."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from nanopatho import chat, presets
from nanopatho.data import (IMAGE, DataError, Images, augment, caption_row, check_images, check_pools, curriculum,
                            load_images, pack_rows, question_text, read_records, shuffled, vlm_batch)
from nanopatho.optim import Optimizers
from nanopatho.vlm import PathoVLM

GOOD = {"id": "r1", "image": "images/a.png", "caption": "Fat.", "question": "Which?",
        "options": ["fat", "mucin", "keratin"], "answer": "B", "level": "easy", "subfield": "H&E", "task": "mcq",
        "split": "train", "facts": {"material": "mucin"},
        "messages": [{"role": "user", "content": f"{IMAGE}Which?"}, {"role": "assistant", "content": "B"}]}


def write(folder, *records, name="some.jsonl"):
    path = folder / name
    lines = [r if isinstance(r, (str, bytes)) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def but(**changes):
    """GOOD with other fields; a value of `...` takes the field away."""
    return {k: v for k, v in {**GOOD, "id": "bad-7", **changes}.items() if v is not ...}


# --- records ----------------------------------------------------------------------------------------------------------


def test_good_records_are_read(tmp_path):
    path = write(tmp_path, GOOD, "", but(id="ü-2", caption="Größe 5 µm"), b"  ")
    for use in ("caption", "sft", "question", "any"):
        first, second = read_records(path, use)
        assert first == {**GOOD, "_root": str(tmp_path), "_where": f"{path}:1 id=r1"}
        assert second["caption"] == "Größe 5 µm" and second["_where"] == f"{path}:3 id=ü-2"    # the empty line counts
    assert read_records(write(tmp_path, "\ufeff" + json.dumps(GOOD)))[0]["id"] == "r1"         # a Windows editor's mark


BAD = [                                                                # use, record, field, words of the message
    *((use, but(**{name: change}), name, f"is missing (needed for {use})")
      for use, names in (("caption", ("image", "caption")), ("sft", ("image", "messages")),
                         ("question", ("image", "question", "options", "answer")))
      for name in names for change in (..., None, "")),
    ("caption", but(caption=5), "caption", "non-empty string; it is '5'"),
    ("caption", but(caption=" "), "caption", "non-empty string"),
    ("caption", but(image=7), "image", "path"),
    ("caption", but(image=["a.png", ""]), "image", "path"),
    ("caption", but(level="difficult"), "level", "easy, medium, hard; it is 'difficult'"),
    ("caption", but(subfield="EM"), "subfield", "H&E, IHC, cytology, FISH, gross"),
    ("caption", but(task=["mcq"]), "task", "mcq, description"),
    ("caption", but(split="dev"), "split", "train, val, test"),
    ("caption", but(facts="fat"), "facts", "object"),
    ("question", but(options=["a"]), "options", "list of 2 to 10"),
    ("question", but(options=["a", 3]), "options", "list of 2 to 10"),
    ("question", but(options={"A": "a", "B": "b"}), "options", "list of 2 to 10"),
    ("question", but(options=list("abcdefghijk")), "options", "list of 2 to 10"),
    ("question", but(options=["fat", "Fat ", "x"]), "options", "same option twice"),
    ("question", but(answer="D"), "answer", "A, B, C of the 3 options; it is 'D'"),
    ("question", but(answer="b"), "answer", "A, B, C"),
    ("question", but(answer="AB"), "answer", "A, B, C"),               # "AB" is part of "ABC", but no letter
    ("question", but(answer="mucin"), "answer", "A, B, C"),
    ("question", but(answer=1), "answer", "string"),
    ("sft", but(messages="hello"), "messages", "role"),
    ("sft", but(messages=[{"role": "doctor", "content": "x"}]), "messages", "system|user|assistant"),
    ("sft", but(messages=[{"role": "user", "content": f"{IMAGE}Which?"}]), "messages", "end with an assistant turn"),
    ("sft", but(messages=[{"role": "assistant", "content": ""}]), "messages", "role"),
    ("sft", but(messages=[{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B"}]), "messages",
     "hold 0 <image> marks for 1 image(s)"),
    ("sft", but(image=["a.png", "b.png"]), "messages", "hold 1 <image> marks for 2 image(s)"),
]


@pytest.mark.parametrize("use,record,field,says", BAD)
def test_bad_record_is_named(use, record, field, says, tmp_path):
    path = write(tmp_path, GOOD, record)
    with pytest.raises(DataError) as told:
        read_records(path, use)
    message = str(told.value)
    assert f"{path}:2 id=bad-7: field '{field}'" in message and says in message, message
    assert message.startswith("1 problem(s) in ")


def test_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such file.*data_prep microworld.*--data"):
        read_records(tmp_path / "none.jsonl")
    for empty in ([], ["", "  "]):
        with pytest.raises(DataError, match="some.jsonl: holds no records"):
            read_records(write(tmp_path, *empty))
    with pytest.raises(DataError, match=r"some.jsonl:2: not valid JSON \(.* at column \d+\)"):
        read_records(write(tmp_path, GOOD, json.dumps(but())[:-9]))     # a write that did not finish
    with pytest.raises(DataError, match=r"some.jsonl:2: not UTF-8 text .*save the file as UTF-8"):
        read_records(write(tmp_path, GOOD, json.dumps(but(caption="Groesse")).encode().replace(b"oe", b"\xf6")))
    with pytest.raises(DataError, match=r"some.jsonl:1 id=None: .* the line is not a JSON object; it is '\[1, 2\]'"):
        read_records(write(tmp_path, "[1, 2]"))


def test_ids(tmp_path):
    with pytest.raises(DataError, match=r"some.jsonl:3 id=r1: field 'id' was already used on line 1; make ids unique"):
        read_records(write(tmp_path, GOOD, but(), GOOD))
    for wrong in (["r2"], {"r": 2}, 5, ""):                            # a list cannot be a key: still one clear message
        with pytest.raises(DataError, match=r"1 problem.*\n.*some.jsonl:1 .*field 'id'"):
            read_records(write(tmp_path, but(id=wrong)))
    with pytest.raises(DataError, match="2 problem") as told:          # missing twice is not the same id twice
        read_records(write(tmp_path, but(id=...), but(id=...)))
    assert "already used" not in str(told.value)


def test_all_problems_at_once_but_not_thousands(tmp_path):
    path = write(tmp_path, *(but(id=f"x{i}", caption=i) for i in range(30)), "{")
    with pytest.raises(DataError) as told:
        read_records(path, "caption", limit=5)
    assert str(told.value).startswith("31 problem(s)") and str(told.value).count("\n") == 6
    assert str(told.value).endswith("… and 26 more")


# --- images -----------------------------------------------------------------------------------------------------------


def picture(seed=0, height=56, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def spoil(folder):
    """Files that must be refused, by name -> what the message says."""
    noise = Image.fromarray(picture(1, 200, 200))
    noise.save(folder / "whole.jpg", quality=95)
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(folder / "deep.png")
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return {"truncated.jpg": "cut off", "zero.png": "empty", "text.png": "not an image", "deep.png": "more than 8 bits",
            "moving.gif": "3 frames", "absent.png": "no such file"}


def test_bad_images_are_named_with_their_record(tmp_path):
    bad = spoil(tmp_path)
    records = read_records(write(tmp_path, *(but(id=f"id-{n}", image=n) for n in ["whole.jpg", *bad])), "caption")
    assert Images()(records[0])[0].shape == (200, 200, 3)
    for number, (record, (name, says)) in enumerate(zip(records[1:], bad.items()), 2):
        with pytest.raises(DataError) as told:
            Images()(record)
        message = str(told.value)
        assert f"some.jsonl:{number} id=id-{name}: field 'image': {tmp_path}/{name}" in message, message
        assert says in message, message
    with pytest.raises(DataError) as told:                             # before training: all of them in one message
        check_images(records)
    assert str(told.value).startswith("6 image(s)") and all(f"{tmp_path}/{name}: " in str(told.value) for name in bad)
    check_images(records[:1])


def test_cmyk_works(tmp_path):
    Image.new("CMYK", (56, 56), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)      # magenta + yellow ink
    array, = Images()({"image": "print.jpg", "_root": str(tmp_path), "_where": ""})
    assert array.shape == (56, 56, 3) and np.abs(array.reshape(-1, 3).mean(0) - [255, 0, 0]).max() < 8


def test_images_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    for name in "ab":
        Image.fromarray(picture(ord(name))).save(tmp_path / f"{name}.png")
    record = {"image": ["a.png", "b.png"], "_root": str(tmp_path), "_where": ""}
    images = Images(keep_bytes=picture().nbytes)
    one, two = images(record)
    assert np.array_equal(one, picture(97)) and np.array_equal(two, picture(98))
    again = images(record)
    assert again[0] is one and again[1] is not two and np.array_equal(again[1], two)
    alone = Images().room                                              # a quarter of what is free, shared by a node's processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert alone > 0 and Images().room == pytest.approx(alone / 8, rel=0.2)
    stacked = load_images([{**record, "image": "a.png"}, {**record, "image": "b.png"}])
    assert stacked.shape == (2, 56, 56, 3) and np.array_equal(stacked[1], two)


def test_pools_are_checked_before_training(tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    found = []
    for name, lost in (("test", "no accuracy"), ("val", "no sample answers")):       # own data may lack them: told, not refused
        assert check_pools(tmp_path) == found and f"{name}.jsonl is not there: {lost}" in capsys.readouterr().out
        write(tmp_path, {**GOOD, "image": "a.png"}, name=f"{name}.jsonl")
        found.append(name)
    assert check_pools(tmp_path) == found and not capsys.readouterr().out            # the shifted pools need not be there
    write(tmp_path, {k: v for k, v in GOOD.items() if k != "answer"}, name="val.jsonl")
    with pytest.raises(DataError, match="val.jsonl:1 id=r1: field 'answer' is missing"):
        check_pools(tmp_path)
    write(tmp_path, {**GOOD, "image": "a.png"}, name="val.jsonl")
    write(tmp_path, {**GOOD, "image": "b.png"}, name="test_stain.jsonl")
    with pytest.raises(DataError, match="test_stain.jsonl:1 id=r1: field 'image'.*b.png"):
        check_pools(tmp_path)


# --- augmentation and order -------------------------------------------------------------------------------------------


def test_augment_is_the_eight_symmetries():
    square, oblong = picture(3, 5, 5), picture(4, 4, 6)
    want = {a.tobytes() for k in range(4) for a in (np.rot90(square, k), np.rot90(square, k)[:, ::-1])}
    assert len(want) == 8
    rng = np.random.default_rng(0)
    seen = [augment(square, rng).tobytes() for _ in range(400)]
    assert set(seen) == want and min(map(seen.count, want)) > 25       # 50 expected, standard deviation 6.6
    seen = {augment(oblong, rng).tobytes() for _ in range(100)}
    assert seen == {a.tobytes() for a in (oblong, oblong[::-1], oblong[:, ::-1], oblong[::-1, ::-1])}
    several = np.stack([square, picture(5, 5, 5)])                     # one draw for all of them
    out = augment(several, np.random.default_rng(1))
    assert all(np.array_equal(out[i], augment(several[i], np.random.default_rng(1))) for i in range(2))


@pytest.mark.parametrize("n,batch", [(10, 3), (7, 7), (3, 8), (1, 4)])
def test_shuffled_shows_each_record_once_an_epoch(n, batch):
    batches = list(itertools.islice(shuffled(n, batch, np.random.default_rng(0)), 12))
    assert all(len(b) == batch for b in batches)
    flat = np.concatenate(batches)
    epochs = [flat[i:i + n].tolist() for i in range(0, len(flat) - n + 1, n)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert n < 5 or len({tuple(e) for e in epochs}) > 1                # drawn anew each time


def test_curriculum_moves_from_easy_to_hard():
    cells = [(level, *pair) for level in ("easy", "medium", "hard")
             for pair in (("H&E", "skin"), ("H&E", "lung"), ("IHC", "skin"))]
    records = [{"level": level, "subfield": s, "topic": t} for level, s, t in cells
               for _ in range(1 if (s, t) == ("IHC", "skin") else 20)]  # one cell has one record: still a third
    order = np.array(list(curriculum(records, 5, 6000, np.random.default_rng(0))))
    assert order.shape == (5, 6000)
    chosen = np.array([[cells.index((r["level"], r["subfield"], r["topic"])) for r in records]])[0][order]
    share = np.stack([(chosen == c).mean(1) for c in range(9)], 1).reshape(5, 3, 3)             # step, level, cell
    for step, want in ((0, (0.6, 0.3, 0.1)), (2, (0.425, 0.325, 0.25)), (4, (0.25, 0.35, 0.4))):
        for level in range(3):
            expected = np.full(3, 6000 * want[level] / 3)
            chi2 = ((share[step, level] * 6000 - expected) ** 2 / expected).sum()
            assert chi2 < 20, (step, level, share[step, level])         # 3 terms: 20 is a chance of 2 in 10,000
    lone = list(curriculum([{"level": "hard"}, {"level": None}, {}], 3, 50, np.random.default_rng(0)))   # no easy ones
    assert {i for b in lone for i in b.tolist()} == {0, 1, 2}
    same = [list(map(list, curriculum(records, 4, 3, np.random.default_rng(5)))) for _ in range(2)]
    assert same[0] == same[1]                                          # what resuming relies on


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return chat.train_tokenizer([question_text(GOOD), "I see fat and mucin."], presets.TINY_BPE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = PathoVLM({**presets.VLM["smoke"], "initializer_range": 0.1}).eval()
    return model


@pytest.fixture
def records(tmp_path):
    out = []
    for i, (height, width) in enumerate(((56, 56), (84, 112), (56, 140), (112, 56))):
        Image.fromarray(picture(i, height, width)).save(tmp_path / f"{i}.png")
        out.append({**GOOD, "id": f"r{i}", "image": f"{i}.png", "_root": str(tmp_path), "_where": f"here:{i}",
                    "question": "Which" + " material" * i + "?"})
    out.append({**out[0], "image": ["1.png", "0.png"], "question": "Same?"})
    return out


def rows_of(records, kind):
    answer = [] if kind == "prompt" else [{"role": "assistant", "content": "I see fat. <answer>A</answer>"}]
    return [(r, [{"role": "user", "content": question_text(r)}, *answer], kind) for r in records]


def test_question_text(records):
    assert question_text(records[1]) == "<image>Which material?\nA. fat\nB. mucin\nC. keratin"
    assert question_text(records[4]) == "<image><image>Same?\nA. fat\nB. mucin\nC. keratin"
    assert [m["content"] for m in caption_row(GOOD)[1]] == [IMAGE, "Fat."] and caption_row(GOOD)[2] == "text"


@pytest.mark.parametrize("kind", ["chat", "prompt", "text"])
def test_a_batch_equals_its_rows_one_by_one(kind, records, tokenizer, model):
    images = Images()
    batch = vlm_batch(rows_of(records, kind), tokenizer, model.config, images=images)
    B, T = batch["input_ids"].shape
    assert B == 5 and batch["image_grid_thw"][:, 1:].tolist() == [[4, 4], [6, 8], [4, 10], [8, 4], [6, 8], [4, 4]]
    labels = batch.pop("labels")
    mask = batch["attention_mask"].bool()
    side = mask.flip(1) if kind == "prompt" else mask                  # padding: left of a prompt, right of a text
    assert (side[:, :-1] >= side[:, 1:]).all() and side.any(1).all() and not mask.all()
    assert (batch["input_ids"][~mask] == tokenizer.pad_id).all() and (labels[~mask] == -100).all()
    assert kind != "prompt" or (labels == -100).all()
    with torch.no_grad():
        together = model(**batch)
        for row, r in enumerate(rows_of(records, kind)):
            alone = vlm_batch([r], tokenizer, model.config, images=images)
            assert alone["attention_mask"].all()
            assert torch.equal(alone["input_ids"][0], batch["input_ids"][row][mask[row]])
            assert torch.equal(alone.pop("labels")[0], labels[row][mask[row]])
            torch.testing.assert_close(model(**alone)[0], together[row][mask[row]], atol=1e-5, rtol=1e-5)


def test_more_padding_leaves_the_loss(records, tokenizer, model):
    batch = vlm_batch(rows_of(records[:3], "chat"), tokenizer, model.config, images=Images())
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = model.loss(model.hidden_states(**batch), labels)
        wider = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=tokenizer.pad_id),
                 "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 9))}
        more = model.loss(model.hidden_states(**wider), torch.nn.functional.pad(labels, (0, 9), value=-100))
        left = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (7, 0), value=tokenizer.pad_id),
                "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (7, 0))}
        moved = model.loss(model.hidden_states(**left), torch.nn.functional.pad(labels, (7, 0), value=-100))
    torch.testing.assert_close(more, loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(moved, loss, atol=1e-6, rtol=0)


def test_labels_are_the_answer_and_its_end(records, tokenizer, model):
    batch = vlm_batch(rows_of(records, "chat"), tokenizer, model.config, images=Images())
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        kept = labels[labels >= 0]
        assert torch.equal(ids[labels >= 0], kept)
        assert kept.tolist() == [*tokenizer.encode("I see fat. <answer>A</answer>"), tokenizer.end_id]


def test_augmentation_in_a_batch_is_repeatable_and_only_of_pixels(records, tokenizer, model):
    make = lambda rng: vlm_batch(rows_of(records[:1] * 6, "chat"), tokenizer, model.config, images=Images(), rng=rng)
    plain, one, two = make(None), make(np.random.default_rng(3)), make(np.random.default_rng(3))
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["input_ids"], plain["input_ids"])
    patches = one["pixel_values"].view(6, 16, -1)
    assert len({p.numpy().tobytes() for p in patches}) > 1             # each picture is turned on its own
    assert torch.equal(patches.sum((1, 2)), plain["pixel_values"].view(6, -1).sum(1))


def test_a_text_without_an_image(tokenizer, model):
    rows = [({"id": "t"}, [{"role": "user", "content": "Fat?"}, {"role": "assistant", "content": "Yes."}], "chat")]
    batch = vlm_batch(rows, tokenizer, model.config, images=Images())
    assert batch["pixel_values"] is None and batch["image_grid_thw"] is None
    with pytest.raises(ValueError, match=r"here:9: the messages hold 1 <image> marks, but 0 image"):
        vlm_batch([({"_where": "here:9"}, [{"role": "user", "content": IMAGE}], "prompt")], tokenizer, model.config,
                  images=Images())


# --- several samples in one row ---------------------------------------------------------------------------------------


def blanks(lengths):
    """Batches of one text of so many tokens, each told by its token."""
    ids = [torch.full((1, n), i) for i, n in enumerate(lengths)]
    return [dict(input_ids=x, labels=x, attention_mask=torch.ones_like(x), pixel_values=None, image_grid_thw=None)
            for x in ids]


def test_rows_are_full_and_hold_every_sample_whole():
    """Lengths as of captions with pictures of every size, windows of 512: under 2 % of the rows' room stays empty, and
    none of it is padded and computed."""
    rng, length = np.random.default_rng(0), 4096
    for window in range(4):
        lengths = np.clip(rng.lognormal(6.3, 0.7, 512), 30, 3000).astype(int)
        rows = pack_rows(blanks(lengths), length)
        sizes = [r["input_ids"].shape[1] for r in rows]
        assert max(sizes) <= length and 1 - sum(sizes) / (length * len(rows)) < 0.02
        assert sum(sizes) == sum(lengths) == sum(int(r["attention_mask"].sum()) for r in rows)
        found = {}
        for r in rows:
            for ids, labels in zip(*(r[name][0].split(r["documents"].tolist()) for name in ("input_ids", "labels"))):
                assert int(ids[0]) not in found and (ids == ids[0]).all()
                assert labels[0] == -100 and torch.equal(labels[1:], ids[1:])
                found[int(ids[0])] = len(ids)
        assert found == dict(enumerate(lengths))


def test_long_samples_and_as_many_rows_as_others_have():
    sizes = lambda rows: [r["documents"].tolist() for r in rows]
    assert sizes(pack_rows(blanks([3, 9, 4, 1, 2]), 6)) == [[9], [4, 2], [3, 1]]
    assert sizes(pack_rows(blanks([3, 9, 4, 1, 2]), 6, lambda rows: 5)) == [[9], [4], [3], [2], [1]]
    assert sizes(pack_rows(blanks([2, 2, 2, 2]), 8, lambda rows: rows + 1)) == [[2, 2], [2, 2]]


def test_packed_and_unpacked_training_are_the_same(records, tokenizer, model):
    """Ten steps of Adam on turned pictures: a padded batch, packed rows, and the rows of two processes added up."""
    def train(make):
        torch.manual_seed(0)
        other = copy.deepcopy(model).train()
        optimizer, told = Optimizers(other, 1e-4, 0.05), []
        for step in range(10):
            batches = make(rows_of(records, "chat"), np.random.default_rng(step))
            tokens = sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches)
            seen = sum(int(b["attention_mask"].sum()) for b in batches)
            loss = 0.0
            for b in batches:
                labels = b.pop("labels")
                part = other.loss(other.hidden_states(**b), labels, reduction="sum") / tokens
                part.backward()
                loss += part.item()
            told.append((tokens, seen, loss))
            optimizer.step(1e-4)
        return told, torch.cat([p.detach().flatten() for p in other.parameters()])

    options, images = (tokenizer, model.config), Images()
    batch = lambda rows, rng: vlm_batch(rows, *options, images=images, rng=rng)
    singles = lambda rows, rng: [batch([row], rng) for row in rows]
    padded, want = train(lambda rows, rng: [batch(rows, rng)])
    assert len({loss for *_, loss in padded}) == 10
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    two = lambda samples: [*pack_rows(samples[:2], 150, lambda rows: 2), *pack_rows(samples[2:], 150, lambda rows: 2)]
    for pack in (lambda samples: pack_rows(samples, 150), lambda samples: pack_rows(samples, 10000), two):
        told, got = train(lambda rows, rng: pack(singles(rows, rng)))
        for one, other in zip(told, padded):
            assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-5)
        assert (got - want).norm() < 3e-5 * (want - start).norm()        # of the way travelled: Adam magnifies rounding
