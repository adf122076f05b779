"""Stage 3: which groups enter an update, and the update itself against the loss written out answer by answer."""

import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_rl
from nanopatho import chat, grpo
from nanopatho.data import Images, read_records
from nanopatho.log import ConfigError
from nanopatho.optim import Optimizers
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
    assert (state["step"], state["drawn"], state["done"]) == (2, 4, 0)


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
    train_rl.main(options(**fields, steps=3, updates=2, max_rounds=3))
    rows, groups = metrics(tmp_path), [g for part in entered for g in part]
    assert sum(r["groups"] for r in rows) == len(groups) and all(r["groups"] <= 3 and r["rounds"] <= 3 for r in rows)
    assert len(entered) == sum(min(2, r["groups"]) for r in rows)
    right = [[p["accuracy"] for p in g["parts"]] for g in groups]
    uniform = [r for r in right if len(set(r)) == 1]
    assert not uniform if algo == "dapo" else len(groups) == 9 and uniform
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
                        clip_high=0.15, clip_norm=1e9, micro_batch=128, aggregation="token-mean", kl=0.3)
    dice = lambda text, record, n: {"reward": float(zlib.crc32(text.encode()) % 5)}
    tokenizer.eos_ids = (*tokenizer.eos_ids, *range(0, 1000, 12))      # ends by chance: answers of all lengths
    groups = train_rl.rollout(model, tokenizer, records, c, Images(), torch.Generator().manual_seed(0), dice)
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
    row = train_rl.training_rows(groups, tokenizer.pad_id, 4)
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


def by_hand(model, reference, made, aggregation):
    """The loss written out: each answer alone, in its own row without padding, through forward()."""
    _, tokenizer, groups, c = made
    banned = torch.zeros(model.config["vocab_size"])
    banned[list(tokenizer.banned_ids)] = -torch.inf
    rows = []
    for g in groups:
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
    optimizer, row = Optimizers(model, 1e-3, 0.0), train_rl.training_rows(groups, tokenizer.pad_id, 4)

    def preference():
        with torch.no_grad():
            logp = train_rl.answer_logps(model, row, c.temperature, tokenizer.banned_ids)
        return float((logp.sum(1) * row["advantages"]).sum())

    before = preference()
    for _ in range(3):
        train_rl.update(model, None, tokenizer, groups, list(model.parameters()), optimizer, 1e-4, c)
    assert preference() > before + 1
