"""Stage 3: which groups enter an update, and the update itself against the loss written out answer by answer."""

import json
import re
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_rl
from nanopatho import ablate, chat, grpo, presets
from nanopatho.data import Images, read_records
from nanopatho.log import ConfigError
from nanopatho.optim import Optimizers
from nanopatho.packed import score_again, training_rows
from nanopatho.vlm import PathoVLM
from smoke import RL, equal, luck, metrics, options, weights

# --- what enters the update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_without_a_signal_nothing_moves(algo, right, chain, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rl.rewards, "score_answer", lambda text, record, **more: {
        "format": 1.0, "accuracy": right, "length": 1.0})
    decay = dict(weight_decay=0.0) if algo == "grpo" else {}  # there weights still decay without a signal
    fields = dict(RL, algo=algo, data=world, init=chain / "sft", out=tmp_path, steps=2, max_rounds=2)
    train_rl.main(options(**fields, lr=1e-2, **decay))
    rows = metrics(tmp_path)
    assert [r["mixed"] for r in rows] == [0, 0] and all(r["accuracy"] == right for r in rows)
    if algo == "dapo":
        assert all(r["skipped"] == 1 and r["rounds"] == 2 and r["groups"] == 0 for r in rows)
    else:
        assert all(r["grad_norm"] == 0 and r["loss"] == 0 and r["kl"] == 0 and r["groups"] == 3 for r in rows)
    assert equal(weights(tmp_path), weights(chain / "sft"))


def test_steps_without_a_signal_are_saved_too(chain, world, tmp_path, monkeypatch):
    real = train_rl.Run.step

    def killed(self, step, **numbers):
        real(self, step, **numbers)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_rl.Run, "step", killed)
    fields = dict(RL, algo="dapo", data=world, init=chain / "sft", out=tmp_path, steps=9, max_rounds=2)
    with pytest.raises(KeyboardInterrupt):                             # it is never right: every step is skipped
        train_rl.main(options(**fields, save_every=1))
    assert all(r["skipped"] for r in metrics(tmp_path))
    state = torch.load(tmp_path / "last" / "train_state.pt")
    assert (state["step"], state["drawn"], state["done"]) == (2, 2 * 2 * 3, 0)        # steps, rounds, questions


@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_groups_that_enter_the_update(algo, chain, world, tmp_path, monkeypatch):
    """DAPO: only groups with right and wrong answers, at most as many as asked for; the reward of each by hand."""
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    entered, real = [], train_rl.update

    def update(model, reference, tokenizer, groups, *rest):
        entered.append(groups)
        assert (reference is None) == (algo == "dapo")
        return real(model, reference, tokenizer, groups, *rest)

    monkeypatch.setattr(train_rl, "update", update)
    fields = dict(RL, algo=algo, data=world, init=chain / "sft", out=tmp_path)
    train_rl.main(options(**fields, steps=5, updates=2, max_rounds=3))
    rows, filled = metrics(tmp_path), [g for part in entered for g in part if not g["mask"].any()]
    groups = [g for part in entered for g in part if g["mask"].any()]
    assert sum(r["groups"] for r in rows) == len(groups) and all(r["groups"] <= 3 and r["rounds"] <= 3 for r in rows)
    assert sum(r["filled"] for r in rows) == len(filled) and all(r["filled"] in (0, 3 - r["groups"]) for r in rows)
    assert all(bool(r["skipped"]) == (r["groups"] == 0) and r["zero_variance"] <= 1 for r in rows)
    assert len(entered) == 10 and {len(part) for part in entered} <= {0, 1, 2}
    right = [[p["accuracy"] for p in g["parts"]] for g in groups]
    uniform = [r for r in right if len(set(r)) == 1]
    assert not uniform if algo == "dapo" else len(groups) == 15 and uniform
    for g in groups:
        for text, part, mask in zip(g["texts"], g["parts"], g["mask"]):
            a, short = zlib.crc32(text.encode()) % 3 == 0, int(mask.sum()) <= 8 - 8 // 5
            want = 0.1 + 0.9 * a if algo == "grpo" else 1.0 if a and short else -1.0
            assert part["reward"] == pytest.approx(want)
        r = torch.tensor([p["reward"] for p in g["parts"]], dtype=torch.float64)
        want = (r - r.mean()) / (r.std() + 1e-6) if r.std() > 1e-6 else r * 0
        torch.testing.assert_close(g["advantages"].double(), want, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def made(chain, world, tmp_path_factory):
    """A rollout of four questions, one of them with two pictures, by a model that is then changed a little."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.open(world / "images" / "test-000001.jpg").resize((84, 56)).save(folder / "small.png")
    records = read_records(world / "rl.jsonl", use="question")[:4]
    records[1] = {**records[1], "image": [records[1]["image"], str(folder / "small.png")]}
    model, tokenizer = PathoVLM.from_pretrained(chain / "sft"), chat.ChatTokenizer.load(chain / "sft")
    torch.manual_seed(1)
    with torch.no_grad():                                              # far from uniform, so that probabilities differ
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    c = SimpleNamespace(group_size=4, max_new_tokens=12, temperature=0.7, max_pixels=10 ** 6, clip_low=0.1,
                        clip_high=0.15, clip_norm=1e9, micro_batch=128, aggregation="token-mean", kl=0.3, seed=0,
                        graph=False, variant="clip", dual_clip=0.0, tis=0.0, kl_gradient="k3")
    dice = lambda text, record, n: {"reward": float(zlib.crc32(text.encode()) % 5)}
    tokenizer.eos_ids = (*tokenizer.eos_ids, *range(0, 1000, 12))      # ends by chance: answers of all lengths
    chosen = [(n, i) for i, n in enumerate((1, 2, 3, 4))]
    groups = train_rl.rollout(model, tokenizer, chosen, records, c, Images(), dice)
    for (n, i), g in zip(chosen, groups):                              # alone, each gives the same answers
        single, = train_rl.rollout(model, tokenizer, [(n, i)], records, c, Images(), dice)
        assert single["texts"] == g["texts"] and torch.equal(single["prompt"], g["prompt"])
    assert len({text for g in groups for text in g["texts"]}) == 16    # and siblings differ
    for g in groups:
        g["advantages"] = grpo.group_advantages(torch.tensor([p["reward"] for p in g["parts"]]), 4)
    assert len({int(m.sum()) for g in groups for m in g["mask"]}) > 3 and len(groups[1]["grid"]) == 2
    return model, tokenizer, groups, c


def moved(model, by=0.01):
    """The model after some updates: now ratios leave 1 and the clip acts."""
    torch.manual_seed(2)
    other = PathoVLM(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=by)
    return other


class Gradients:
    """In place of an optimizer: keeps what it was given."""
    def __init__(self, model):
        self.model = model

    def step(self, lr):
        self.lr, self.found = lr, {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.model.zero_grad()


def gradient(model, reference, made, **changes):
    _, tokenizer, groups, c = made
    c = SimpleNamespace(**{**vars(c), **changes})
    taken = Gradients(model)
    numbers = train_rl.update(model, reference, tokenizer, groups, list(model.parameters()), taken, 0.5, c)
    assert taken.lr == 0.5 and numbers["grad_norm"] > 0
    return taken.found, numbers


def test_sampler_and_training_pass_agree(made):
    """Cached sampling of a padded batch against one pass over each question's rows, pictures of two sizes included."""
    model, tokenizer, groups, c = made
    row = training_rows(groups, tokenizer.pad_id, 4)
    with torch.no_grad():
        logp = train_rl.answer_logps(model.eval(), row, c.temperature, tokenizer.banned_ids)
    assert (logp[row["mask"]] < -0.5).any()
    torch.testing.assert_close(logp, row["logps"], atol=1e-4, rtol=0)
    numbers = gradient(model, None, made)[1]
    assert numbers["sampler_gap"] < 1e-5 and numbers["clip_high"] == numbers["clip_low"] == 0


def test_first_update_of_a_run_is_on_policy(chain, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    train_rl.main(options(**RL, algo="grpo", data=world, init=chain / "sft", out=tmp_path, steps=1, updates=1))
    row, = metrics(tmp_path)
    assert row["sampler_gap"] < 1e-4 and row["clip_high"] == 0 and row["grad_norm"] > 0 and row["kl"] == 0


def by_hand(model, reference, made, aggregation, groups=None):
    """The loss written out: each answer alone, in its own row without padding, through forward()."""
    _, tokenizer, all_groups, c = made
    banned = torch.zeros(model.config["vocab_size"])
    banned[list(tokenizer.banned_ids)] = -torch.inf
    rows = []
    for g in groups or all_groups:
        for i in range(4):
            n = int(g["mask"][i].sum())
            ids = torch.cat([g["prompt"], g["ids"][i, :n]])[None]
            logps = []
            for m in (model, reference):
                logits = m(ids, g["pixels"], g["grid"])[0, len(g["prompt"]) - 1:-1] / c.temperature + banned
                logps.append(logits.log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0])
            ratio = (logps[0] - g["logps"][i, :n]).exp()
            a, d = g["advantages"][i], logps[1].detach() - logps[0]
            clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
            value = -torch.minimum(ratio * a, clipped * a) + c.kl * (d.exp() - d - 1)
            rows.append((value, (ratio != clipped).detach()))
    loss = {"token-mean": lambda: torch.cat([r for r, _ in rows]).mean(),
            "sequence-mean": lambda: torch.stack([r.mean() for r, _ in rows]).mean(),
            "constant-length": lambda: sum(r.sum() for r, _ in rows) / (len(rows) * c.max_new_tokens)}[aggregation]()
    loss.backward()
    outside = torch.cat([x for _, x in rows]).float().mean()
    assert 0.05 < outside < 0.95                                       # the clip has something to do
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found, loss.item()


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_update_equals_the_written_out_loss_in_any_micro_batch(aggregation, made):
    model, reference = moved(made[0]), made[0]
    want, loss = by_hand(model, reference, made, aggregation)
    scale = max(g.abs().max().item() for g in want.values())
    first = None
    for micro_batch in (128, 8, 1):                                    # all groups, two, or one at a time
        got, numbers = gradient(model, reference, made, aggregation=aggregation, micro_batch=micro_batch)
        assert numbers["loss"] == pytest.approx(loss, abs=2e-5) and numbers["kl"] > 0.01
        first = first or (got, numbers)
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=2e-5 * scale, rtol=1e-3, msg=name)
            torch.testing.assert_close(got[name], first[0][name], atol=1e-6 * max(1, scale), rtol=0, msg=name)
        assert {k: pytest.approx(v, abs=1e-5) for k, v in first[1].items() if k != "grad_norm"} == {
            k: v for k, v in numbers.items() if k != "grad_norm"}
    assert numbers["grad_norm"] == pytest.approx(sum(g.square().sum() for g in want.values()).sqrt().item(), rel=1e-4)


def test_a_gradient_that_is_not_finite_ends_the_run(made, monkeypatch):
    model = moved(made[0])
    weights = {n: p.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(train_rl.grpo, "policy_loss", lambda logp, *rest, **more: (logp.sum() * float("nan"), {}))
    with pytest.raises(ConfigError, match="grad_norm is nan; nothing was updated. Records .*rl-000000.*lower --lr"):
        gradient(model, None, made)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_the_update_learns(made):
    """Steps on one rollout make its better answers more probable than its worse ones."""
    _, tokenizer, groups, c = made
    model = moved(made[0], by=0.0)
    optimizer, row = Optimizers(model, 1e-3, 0.0), training_rows(groups, tokenizer.pad_id, 4)

    def preference():
        with torch.no_grad():
            logp = train_rl.answer_logps(model, row, c.temperature, tokenizer.banned_ids)
        return float((logp.sum(1) * row["advantages"]).sum())

    before = preference()
    for _ in range(3):
        train_rl.update(model, None, tokenizer, groups, list(model.parameters()), optimizer, 1e-4, c)
    assert preference() > before + 1


# --- switches, limits and the guard -----------------------------------------------------------------------------------


def test_each_update_has_its_own_divisor_and_fill_does_not_count(made):
    """Two updates a rollout are two written-out losses; masked groups change neither loss nor gradient."""
    model, (_, tokenizer, groups, c) = moved(made[0]), made
    for share in (groups[0::2], groups[1::2]):
        want, loss = by_hand(model, made[0], made, "token-mean", share)
        fill = [dict(g, mask=torch.zeros_like(g["mask"])) for g in groups]
        for some in (share, share + fill, fill[:1] + share):
            got, numbers = gradient(model, made[0], (made[0], tokenizer, some, c), micro_batch=4)
            assert numbers["loss"] == pytest.approx(loss, abs=2e-5)
            assert numbers["update_tokens"] == sum(int(g["mask"].sum()) for g in share)
            scale = max(g.abs().max().item() for g in want.values())
            for name in want:
                torch.testing.assert_close(got[name], want[name], atol=2e-5 * scale, rtol=1e-3, msg=name)
    taken = Gradients(model)
    assert train_rl.update(model, None, tokenizer, fill, list(model.parameters()), taken, 0.5, c) == {}
    assert not hasattr(taken, "lr")


def test_tis_takes_the_ratio_to_the_training_pass_and_weighs_by_the_gap(made):
    """A sampler that is off by a constant 0.1: with TIS every ratio is 1 and every weight exp(0.1)."""
    model, tokenizer, groups, c = made
    shifted = [dict(g, logps=g["logps"] - 0.1) for g in groups]
    c = SimpleNamespace(**{**vars(c), "tis": 2.0})
    score_again(model, shifted, c, tokenizer.pad_id, tokenizer.banned_ids)
    for g, was in zip(shifted, groups):
        torch.testing.assert_close(g["old"][g["mask"]], was["logps"][g["mask"]], atol=1e-4, rtol=0)
        assert not g["old"].requires_grad
    want, _ = gradient(model, None, made)
    got, numbers = gradient(model, None, (model, tokenizer, shifted, c))
    assert numbers["sampler_gap"] == pytest.approx(0.1, abs=1e-4) and numbers["clip_high"] == 0 and numbers["old_kl"] < 1e-6
    scale = max(g.abs().max().item() for g in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name] * 2.718281828 ** 0.1, atol=1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("changes", [dict(variant="gspo"), dict(variant="cispo"), dict(dual_clip=1.05),
                                     dict(kl_gradient="unbiased")])
def test_switches_reach_the_formula(changes, made):
    """The gradient that flows into the log-probabilities is that of grpo.py called by hand with the same switch."""
    model, tokenizer, groups, c = moved(made[0]), *made[1:]
    row = training_rows(groups, tokenizer.pad_id, 4)
    logp = train_rl.answer_logps(model, row, c.temperature, tokenizer.banned_ids)
    with torch.no_grad():
        ref = train_rl.answer_logps(made[0], row, c.temperature, tokenizer.banned_ids)
    more = {k: v for k, v in changes.items() if k != "kl_gradient"}
    loss, _ = grpo.policy_loss(logp, row["logps"], row["advantages"], row["mask"], clip_low=0.1, clip_high=0.15, **more)
    old = row["logps"] if "kl_gradient" in changes else None
    (loss + 0.3 * grpo.aggregate(grpo.kl_k3(logp, ref, mask=row["mask"], old_logp=old), row["mask"])).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    plain, got = gradient(model, made[0], made)[0], gradient(model, made[0], made, **changes)[0]
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(got[name], want[name], atol=1e-7, rtol=1e-4)
    assert (got[name] - plain[name]).abs().max() > 0.01 * plain[name].abs().max()


def test_length_switches_and_advantages_without_std(chain, world, tmp_path, monkeypatch):
    """Overlong penalty, overlong masking and Dr. GRPO's advantages, by hand; RL without SFT, from the pretrained model."""
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    entered, real, load = [], train_rl.update, chat.ChatTokenizer.load

    def ends_by_chance(folder):                                        # else a random model never ends an answer
        tokenizer = load(folder)
        tokenizer.eos_ids = (*tokenizer.eos_ids, *range(0, 1000, 12))
        return tokenizer

    monkeypatch.setattr(train_rl.ChatTokenizer, "load", ends_by_chance)
    monkeypatch.setattr(train_rl, "update", lambda *a, **k: (entered.append(a[3]), real(*a, **k))[1])
    fields = dict(RL, algo="grpo", data=world, init=chain / "pretrain", out=tmp_path, steps=2, updates=1)
    train_rl.main(options(**fields, overlong_penalty=0.5, overlong_mask="on", group_std="off", cache_length=4,
                          train="decoder"))
    for row, groups in zip(metrics(tmp_path), entered, strict=True):
        for g in groups:
            lengths = [len(g["ids"][i]) if cut else int(m.sum()) for i, (m, cut) in enumerate(zip(g["mask"], g["truncated"]))]
            want = [0.1 + 0.9 * p["accuracy"] + 0.5 * min(0.0, (8 - 4 - n) / 4) for p, n in zip(g["parts"], lengths)]
            assert [p["reward"] for p in g["parts"]] == pytest.approx(want)
            assert g["advantages"].tolist() == pytest.approx([w - sum(want) / 4 for w in want], abs=1e-6)
            assert [bool(m.any()) for m in g["mask"]] == [not cut for cut in g["truncated"]]
        assert 0 < row["update_tokens"] == sum(int(g["mask"].sum()) for g in groups) < row["rollout_tokens"]
    before, after = weights(chain / "pretrain"), weights(tmp_path)
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert {k for k in before if k.startswith("visual.")} <= same < set(before)        # a frozen tower stays as it was


def test_always_right_questions_rest_for_1_3_7_passes(chain, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rl.rewards, "score_answer", lambda *a, **k: {"format": 1.0, "accuracy": 1.0, "length": 1.0})
    asked, real = {}, train_rl.rollout

    def rollout(model, tokenizer, chosen, records, *rest):
        for number, i in chosen:
            asked.setdefault(i, []).append((number - 1) // len(records))        # the pass over the data
        return real(model, tokenizer, chosen, records, *rest)

    monkeypatch.setattr(train_rl, "rollout", rollout)
    n = len(read_records(world / "rl.jsonl", use="question"))
    fields = dict(RL, algo="dapo", data=world, init=chain / "sft", out=tmp_path)
    train_rl.main(options(**fields | dict(steps=2, prompts=n, max_rounds=2, group_size=2, max_new_tokens=2)))
    assert len(asked) == n and all(passes == [0, 2, 6, 14] for passes in asked.values()), asked


def test_learning_rate_counts_updates_and_falls_to_zero(chain, world, tmp_path, monkeypatch):
    """Warm-up by optimizer steps, however many groups are rejected; decay by rollout steps. All metrics are explained."""
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    fields = dict(RL, algo="dapo", data=world, init=chain / "sft", out=tmp_path)
    train_rl.main(options(**dict(fields, warmup=7), steps=8, updates=2, max_rounds=1, decay=0.5, lr=1e-4))
    rows, done = metrics(tmp_path), 0
    for r in rows:
        done += min(2, int(r["groups"]))
        if r["groups"]:
            assert r["lr"] == pytest.approx(1e-4 * min(1, done / 7, (8 - r["step"]) / 4), rel=1e-5)
    assert {r["groups"] for r in rows} != {3} and rows[-1]["step"] == 7
    lines = train_rl.__doc__.split("metrics.jsonl has")[1].splitlines()
    explained = set(re.findall(r"\w+", " ".join(line[:30] for line in lines)))
    assert not {name for r in rows for name in r} - {"step", "time"} - explained
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [r["step"] for r in speed] == list(range(8)) and all(r["rollout_tokens_s"] > 0 for r in speed)


def test_a_collapse_ends_the_run_and_the_good_weights_stay(chain, world, tmp_path, monkeypatch):
    """A learning rate far too large: the policy says one thing only. The step before that is kept and can be started from."""
    monkeypatch.setattr(train_rl.rewards, "score_answer", luck)
    fields = dict(RL, algo="grpo", data=world, init=chain / "sft", out=tmp_path / "run", steps=30, save_every=1, guard=3)
    with pytest.raises(ConfigError, match=r"collapsed: the entropy is .* and so for 3 steps. The last good weights are in "
                                          r".*run/last, of step \d+. Start from them .* --lr"):
        train_rl.main(options(**fields | dict(lr=1.0, warmup=1)))
    rows, state = metrics(tmp_path / "run"), torch.load(tmp_path / "run" / "last" / "train_state.pt")
    good = [r["step"] for r in rows if 1e-3 <= r["entropy"] <= 5 * rows[0]["entropy"]]
    assert state["step"] == good[-1] and len(rows) == good[-1] + 3 and state["bad"] == 0
    train_rl.main(options(**dict(fields, init=tmp_path / "run" / "last", out=tmp_path / "again", steps=1)))
    assert metrics(tmp_path / "again")[0]["entropy"] >= 1e-3


def test_two_forwards_are_bitwise_equal_and_the_old_policy_stays(made):
    """No dropout, no train() against eval(); after an update the ratio has moved and `old` has not."""
    _, tokenizer, groups, c = made
    model, row = moved(made[0], by=0.0), training_rows(groups, tokenizer.pad_id, 4)
    with torch.no_grad():
        one, two = (train_rl.answer_logps(m, row, c.temperature, tokenizer.banned_ids) for m in (model.train(), model.eval()))
    assert torch.equal(one, two)
    before, optimizer = [g["logps"].clone() for g in groups], Optimizers(model, 1e-3, 0.0)
    parameters = list(model.parameters())
    first, second = (train_rl.update(model, None, tokenizer, groups, parameters, optimizer, 1e-3, c) for _ in range(2))
    assert first["old_kl"] < 1e-6 < second["old_kl"] and all(torch.equal(a, g["logps"]) for a, g in zip(before, groups))
    assert not any(g["logps"].requires_grad for g in groups)


# --- which ingredient does what ---------------------------------------------------------------------------------------


def test_each_arm_of_the_ablation_takes_one_ingredient_away():
    table = ablate.ingredients("tiny", "some/data", "runs/s{seed}/sft", "runs/x", (0, 2), more=("--steps", "7"))
    assert list(table) == [f"seed{seed}/{arm}" for seed in (0, 2) for arm in ablate.ARMS]

    def settings(name):
        arguments, needs, folder = table[name]
        c = vars(presets.parse(train_rl.Config, "rl", arguments[1:]))
        assert arguments[0] == "train_rl.py" and needs == () and str(folder) == "runs/x/" + name.split("/")[0]
        return {k: train_rl.ALGO[c["algo"]].get(k, v) if v == "algo" else v for k, v in c.items()}

    for seed in (0, 2):
        whole = settings(f"seed{seed}/dapo")
        assert (whole["init"], whole["seed"], whole["steps"]) == (f"runs/s{seed}/sft", seed, 7)
        for arm, changed in dict(no_clip_higher={"clip_high"}, no_token_mean={"aggregation"}, no_dynamic={"dynamic"},
                                 no_length={"reward"}, with_kl={"kl"}, grpo={"algo", *train_rl.ALGO["grpo"]},
                                 claims={"claim_weight"}).items():
            found = settings(f"seed{seed}/{arm}")
            assert {k for k in whole if str(found[k]) != str(whole[k])} == changed | {"out"}, arm
    # what "no_length" pays is DAPO's accuracy alone: the same advantages
    for right in ([1, 0, 0, 0], [1, 1, 1, 0]):
        rewards = [[train_rl.rewards.combine(dict(format=1.0, accuracy=float(a), length=1.0), name) for a in right]
                   for name in ("grpo_gated", "dapo_gated")]
        one, two = (grpo.group_advantages(torch.tensor(r), 4) for r in rewards)
        torch.testing.assert_close(one, two, atol=5e-6, rtol=0)


def test_the_table_of_ingredients_by_hand(tmp_path):
    """Two seeds, four questions: DAPO right on 2 of 4, every other arm one more in seed 1."""
    for seed in (0, 1):
        for arm in ablate.ARMS:
            folder = tmp_path / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            sampled = [1.0, 1.0, 0.0, 0.0] if arm == "dapo" or seed == 0 else [1.0, 1.0, 1.0, 0.0]
            (folder / "each.json").write_text(json.dumps({"ids": list("abcd"), "greedy": sampled, "sampled": sampled}))
            (folder / "results.json").write_text(json.dumps({"greedy_accuracy": 0.5, "sampled_accuracy": sum(sampled) / 4,
                                                             "sampled_length": 15.0, "seconds": 60.0}))
            (folder / "metrics.jsonl").write_text('{"step": 0, "rollout_tokens": 1e6}\n' * 2)
    study = ablate.summary(tmp_path, (0, 1))
    gain = study["arms"]["no_dynamic"]["sampled_gain"]
    assert gain["gain"] == pytest.approx(0.125) and gain["seeds"] == [0.0, 0.25] and gain["ci"][0] == 0.0 < gain["ci"][1]
    assert study["arms"]["dapo"]["sampled_gain"]["gain"] == 0 and study["arms"]["grpo"]["rollout_tokens"] == [2e6, 2e6]
    head, rule, *rows = ablate.markdown(study).split("\n\n")[0].splitlines()
    assert len(rows) == len(ablate.ARMS) and {line.count("|") for line in (head, rule, *rows)} == {10}
    assert rows[3].startswith("| no dynamic sampling | 50.0 | 62.5 | – | +12.5 (+0.0 to +")
    assert rows[3].endswith("| +0.0 +25.0 | 15.0 | 2.00 | 60 |")


def test_the_ablation_needs_its_starting_points(tmp_path):
    with pytest.raises(ConfigError, match=r"s0/sft/model.safetensors is missing. Train it first: python train_sft.py"):
        ablate.main(["ingredients", "--seeds", "1", "--sft", f"{tmp_path}/s{{seed}}/sft", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
