"""Many processes against one: same weights whatever the split, and runs that survive kills.

Processes come from a server that has imported everything once (fork), so one costs a second; they talk over gloo.
NANOPATHO_KILLS=20 python -m pytest tests/test_distributed.py -k kill      # the long form: so many kills a stage
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_clip
import train_pretrain
import train_rl
import train_sft
from nanopatho import checkpoint, distributed, presets
from nanopatho.clip import CLIP, clip_loss
from nanopatho.data import DataError
from nanopatho.log import ConfigError
from nanopatho.optim import Optimizers
from nanopatho.vlm import PathoVLM
from smoke import equal, luck, metrics, options, strict, weights
from test_scripts import clip_start, packed, shards                  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"clip": train_clip, "pretrain": train_pretrain, "sft": train_sft, "rl": train_rl}
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train_clip", "train_pretrain", "train_sft", "train_rl", "torch._dynamo"])


def process(rank, world, port, function, *args):
    """What a process of torchrun does."""
    if world:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train_rl.rewards.score_answer = luck
    function(*args)


def begin(world, function, *args):
    """Start `world` processes that run function(*args) as one group; 0: one process without a group."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [server.Process(target=process, args=(r, world, port, function, *args)) for r in range(max(1, world))]
    for p in processes:
        p.start()
    return processes


def end(processes, seconds=120):
    """-> exit codes. Whoever is still there after so many seconds is killed, and the test fails."""
    limit = time.time() + seconds
    for p in processes:
        p.join(max(0.1, limit - time.time()))
    hanging = [p for p in processes if p.exitcode is None]
    for p in hanging:
        p.kill()
    assert not hanging, f"{len(hanging)} of {len(processes)} processes still ran after {seconds} s"
    return [p.exitcode for p in processes]


def run(world, function, *args):
    assert end(begin(world, function, *args)) == [0] * max(1, world)


def train(stage, fields):
    SCRIPTS[stage].main(options(**fields))


def fields_of(stage, world, chain):
    """Ten steps on eight rows (RL: five rollouts of four questions, two updates each, with a reference model)."""
    if stage == "clip":
        return dict(preset="smoke", data=world, steps_morphology=5, steps_all=5, batch_size=8, warmup=2, partial=0.7,
                    stain=0.2, eval_items=0, lr=1e-4)
    if stage == "rl":
        return dict(preset="smoke", data=world, init=chain / "pretrain", algo="dapo", kl=0.01, reward="grpo_sum", steps=5,
                    prompts=4, group_size=4, max_new_tokens=8, lr=1e-4, warmup=2, max_rounds=2, eval_items=1,
                    eval_samples=1)
    more = dict(eval_samples=1, max_new_tokens=4) if stage == "sft" else {}
    return dict(preset="smoke", data=world, init=chain / "pretrain", steps=10, batch_size=8, warmup=2, eval_items=1,
                lr=1e-4, **more)


def state(folder):
    is_clip = "CLIPModel" in (folder / "config.json").read_text()
    return CLIP.from_pretrained(folder).state_dict() if is_clip else weights(folder)


def farthest(one, two):
    return max((one[k] - two[k]).abs().max().item() for k in one)


# --- the split changes nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", SCRIPTS)
def test_any_split_gives_the_same_weights(stage, world, chain, tmp_path):
    """One process with eight rows at a time; one with three; two processes with four; four with two; two that pack; one
    whose batches are made ahead, by two more."""
    fields = fields_of(stage, world, chain)
    split = {"whole": (0, 0), "pieces": (0, 3), "two": (2, 0), "four": (4, 0)}
    if stage in ("pretrain", "sft"):
        split["packed"] = 2, 0
    if stage != "rl":
        split["ahead"] = 0, 0
    if stage == "rl":        # answers at a time, a group at least; two groups an update: some of four processes have none
        split = {"whole": (0, 64), "pieces": (0, 1), "two": (2, 64), "four": (4, 1)}
    groups = [begin(n, train, stage, dict(fields, out=tmp_path / name, micro_batch=micro,
                                          **{"packed": dict(pack=300), "ahead": dict(workers=2)}.get(name, {})))
              for name, (n, micro) in split.items()]
    assert [set(end(g)) for g in groups] == [{0}] * len(split)
    want, rows = state(tmp_path / "whole"), metrics(tmp_path / "whole")
    assert len(rows) == fields.get("steps", 10) and (stage == "clip" or farthest(want, state(chain / "pretrain")) > 3e-4)
    for name in [name for name in split if name != "whole"]:
        assert farthest(want, state(tmp_path / name)) < 1e-6, name
        for one, other in zip(rows, metrics(tmp_path / name), strict=True):    # a wrong divisor shows here, Adam hides it
            assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in one.items() if k != "time"} == {
                k: v for k, v in other.items() if k != "time"}


@pytest.mark.parametrize("stage", ["clip", "pretrain", "sft"])
def test_shards_in_any_split_and_resumed(stage, shards, chain, clip_start, tmp_path):       # noqa: F811
    """One process with eight rows; two with four until a signal stops them, then one; and kill -9, then again. 80 rows are
    more than one pass, so that the stream is resumed in its second one too."""
    fields = fields_of(stage, shards, chain) | (dict(init=clip_start) if stage == "clip" else {})
    groups = [begin(0, train, stage, dict(fields, out=tmp_path / "whole", workers=1)),
              begin(2, stopped_by_signal, stage, dict(fields, out=tmp_path / "two", workers=1), 5),
              begin(0, killed, stage, dict(fields, out=tmp_path / "killed", workers=0, save_every=3), 7)]
    assert [end(g) for g in groups] == [[0], [1, 1], [-signal.SIGKILL]]
    position = torch.load(tmp_path / "two" / "last" / "train_state.pt")["stream"]
    assert position["batch"] == 6 and sum(position["taken"]) == 48
    run(0, train, stage, dict(fields, out=tmp_path / "two", workers=0))
    run(0, train, stage, dict(fields, out=tmp_path / "killed", workers=1, save_every=3))
    want, rows = state(tmp_path / "whole"), metrics(tmp_path / "whole")
    assert len(rows) == 10 and farthest(want, state(fields["init"])) > 3e-4
    assert equal(want, state(tmp_path / "killed")) and farthest(want, state(tmp_path / "two")) < 1e-6
    for name, close in (("killed", dict(rel=0, abs=0)), ("two", dict(rel=1e-4, abs=1e-6))):
        for one, other in zip(rows, metrics(tmp_path / name), strict=True):
            assert {k: pytest.approx(v, **close) for k, v in one.items() if k != "time"} == {
                k: v for k, v in other.items() if k != "time"}
    if stage == "sft":                                               # the curriculum: hard ones from .1 to .4 of each batch
        hard, asked = (sum(8 * x for x in xs) for xs in ((r["hard"] for r in rows), (0.1 + 0.3 * s / 9 for s in range(10))))
        assert abs(hard - asked) <= 1
    assert strict(tmp_path / "two" / "results.json")["damaged"] == []


def test_damaged_records_of_all_processes_are_named(world, chain, tmp_path):
    (tmp_path / "plain").mkdir()
    folder = packed(world, tmp_path / "plain", tmp_path / "shards")
    for path in sorted(folder.glob("captions-*.tar"))[:4]:           # the first record of four shards: zeros in its picture
        raw, ends = bytearray(path.read_bytes()), json.loads(path.with_suffix(".json").read_text())["offsets"]
        at = raw.index(b"\xff\xd8", ends[0]) + 300
        raw[at:ends[1]] = bytes(ends[1] - at)
        path.write_bytes(raw)
    bad = {json.loads(p.with_suffix(".json").read_text())["ids"][0] for p in sorted(folder.glob("captions-*.tar"))[:4]}
    fields = dict(fields_of("pretrain", folder, chain), workers=0, out=tmp_path / "run")
    run(2, train, "pretrain", dict(fields, max_damaged=4))
    told = strict(tmp_path / "run" / "results.json")["damaged"]
    assert len(told) == 4 and {line.split(": ")[1] for line in told} == bad
    with pytest.raises(DataError, match="4 damaged records, more than --max_damaged 3"):
        train("pretrain", dict(fields, out=tmp_path / "other", max_damaged=3))


def test_lora_in_two_processes(world, chain, tmp_path):
    """RL with the adapter switched off as reference: sharded as without, and a KL of exactly zero before the first update."""
    fields = dict(fields_of("rl", world, chain), lora=4, updates=1, lr=1e-3)
    groups = [begin(n, train, "rl", dict(fields, out=tmp_path / name)) for n, name in ((0, "one"), (2, "two"))]
    assert [set(end(g)) for g in groups] == [{0}] * 2
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    assert farthest(one, two) < 1e-6 and farthest(one, state(chain / "pretrain")) > 3e-4
    for name in ("one", "two"):
        kl = [r["kl"] for r in metrics(tmp_path / name) if "kl" in r]
        assert kl[0] == 0 and max(kl) > 0


def test_a_group_of_one_is_sharded_too_and_equal_to_none(world, chain, tmp_path):
    """FSDP against the plain model on the same rows; activation recomputation changes no bit."""
    fields = dict(fields_of("sft", world, chain), steps=4)
    run(1, train, "sft", dict(fields, out=tmp_path / "fsdp"))
    run(0, train, "sft", dict(fields, out=tmp_path / "plain"))
    run(0, train, "sft", dict(fields, out=tmp_path / "recompute", recompute=True))
    plain = state(tmp_path / "plain")
    assert farthest(plain, state(tmp_path / "fsdp")) < 1e-6 and equal(plain, state(tmp_path / "recompute"))


def unlike_rows(folder):
    """On each of two processes: sharded model, text without pictures on one of them, Muon, a whole copy, saved state."""
    distributed.start()
    torch.manual_seed(0)
    plain, model = PathoVLM(presets.VLM["smoke"]), PathoVLM(presets.VLM["smoke"])
    model.load_state_dict(plain.state_dict())
    distributed.shard(model, [*model.visual.blocks, *model.model.layers], torch.device("cpu"))
    assert all(isinstance(p, distributed.DTensor) for p in model.parameters())
    whole = distributed.whole(model, everywhere=True)
    assert type(whole) is PathoVLM and equal(whole.state_dict(), plain.state_dict())
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 1000, (2, 9), generator=g)
    image = ids.clone()
    image[:, 2] = model.config["image_token_id"]
    batches = [dict(input_ids=image, labels=image, attention_mask=torch.ones(2, 9), pixel_values=torch.randn(8, 1176, generator=g),
                    image_grid_thw=torch.tensor([[1, 2, 2]] * 2)),
               dict(input_ids=ids, labels=ids, attention_mask=torch.ones(2, 9), image_grid_thw=None, pixel_values=None)]
    want, got = Optimizers(plain, 1e-3, 0.1, "muon"), Optimizers(model, 1e-3, 0.1, "muon")
    for step in range(3):                                            # steps two and three need the moments, too
        sum(distributed.token_loss(plain, b) for b in batches).backward()
        (2 * distributed.call(model, distributed.token_loss, batches[distributed.rank()])).backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=1e-5, rtol=1e-4, msg=name)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert distributed.clip_gradients(list(model.parameters()), 1.0).item() == pytest.approx(norm.item(), rel=1e-5)
        for p, q in zip(plain.parameters(), model.parameters()):     # Muon computes in bf16, where last bits tell
            q.grad = distributed.laid_out(p.grad, q)
        want.step(1e-3)
        got.step(1e-3)
        whole = distributed.whole(model, everywhere=True).state_dict()
        assert farthest(whole, plain.state_dict()) < 1e-6, step
    checkpoint.save(folder, model, got, {"step": 3})
    assert distributed.total(1, 2.5) == [2, 5.0]
    with pytest.raises(ConfigError, match="batch_size 7 cannot be split evenly over 2"):
        distributed.share(7)


def test_sharded_gradients_and_state_equal_the_plain_ones(tmp_path):
    run(2, unlike_rows, tmp_path)
    torch.manual_seed(3)
    model = PathoVLM(presets.VLM["smoke"])                           # saved by two, read by one
    optimizer = Optimizers(model, 1e-3, 0.1, "muon")
    assert checkpoint.resume(tmp_path, model, optimizer)["step"] == 3
    assert equal(model.state_dict(), weights(tmp_path / "last"))
    assert all(values for o in optimizer for values in o.state.values())


def contrast(folder, world):
    """Features of a batch of 8, spread over the processes: loss, gradients of features and of the scale."""
    distributed.start()
    image, text, scale, also = torch.load(folder / "batch.pt")
    mine = distributed.share(8)
    image, text = (distributed.gather(x[mine]).requires_grad_() for x in (image, text))
    scale.requires_grad_()
    loss = clip_loss(image, text, scale, also, mine, chunk=3)
    loss.backward()
    distributed.add_up([loss.detach(), image.grad, text.grad, scale.grad])
    torch.save((loss.detach(), image.grad, text.grad, scale.grad), folder / f"{world}.{distributed.rank()}.pt")


@pytest.mark.parametrize("n", [2, 4])
def test_contrastive_loss_over_processes(n, tmp_path):
    g = torch.Generator().manual_seed(1)
    image, text = torch.randn(8, 5, generator=g), torch.randn(8, 5, generator=g)
    also, scale = torch.rand(8, 8, generator=g) < 0.2, torch.tensor(1.3)
    torch.save((image, text, scale, also), tmp_path / "batch.pt")
    run(n, contrast, tmp_path, n)
    parts = [x.double().requires_grad_() for x in (image, text, scale)]
    a, b = (x / x.norm(dim=1, keepdim=True) for x in parts[:2])
    logits = parts[2].exp() * a @ b.T
    logits = logits.masked_fill(also & ~torch.eye(8, dtype=torch.bool), -math.inf)
    loss = -(logits.diag() * 2 - logits.logsumexp(0) - logits.logsumexp(1)).mean() / 2
    loss.backward()
    for r in range(n):
        for got, want in zip(torch.load(tmp_path / f"{n}.{r}.pt"), (loss.detach(), *(p.grad for p in parts)), strict=True):
            torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


# --- runs that survive ------------------------------------------------------------------------------------------------


def stopped_by_signal(stage, fields, at):
    """A signal reaches one process only, during step `at`."""
    real = SCRIPTS[stage].Run.step

    def step(self, number, **more):
        real(self, number, **more)
        if number == at and distributed.rank() == distributed.world() - 1:
            distributed.signals.append(signal.SIGTERM)
    SCRIPTS[stage].Run.step = step
    train(stage, fields)


def test_a_signal_saves_and_another_number_of_processes_goes_on(world, chain, tmp_path):
    stage, fields = "sft", fields_of("sft", world, chain)
    run(0, train, stage, dict(fields, out=tmp_path / "whole"))
    assert end(begin(2, stopped_by_signal, stage, dict(fields, out=tmp_path / "run"), 3)) == [1, 1]
    assert torch.load(tmp_path / "run" / "last" / "train_state.pt")["step"] == 4
    assert end(begin(0, stopped_by_signal, stage, dict(fields, out=tmp_path / "run"), 5)) == [1]
    assert torch.load(tmp_path / "run" / "last" / "train_state.pt")["step"] == 6
    run(4, train, stage, dict(fields, out=tmp_path / "run"))
    assert farthest(state(tmp_path / "whole"), state(tmp_path / "run")) < 1e-6
    assert len(metrics(tmp_path / "run")) == 10 and not (tmp_path / "run" / "last").exists()


def dies(stage, fields):
    real = SCRIPTS[stage].Run.step

    def step(self, number, **more):
        real(self, number, **more)
        if number == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    SCRIPTS[stage].Run.step = step
    train(stage, fields)


def test_a_process_that_dies_ends_the_others(world, chain, tmp_path):
    began = time.time()
    codes = end(begin(2, dies, "sft", dict(fields_of("sft", world, chain), out=tmp_path)), seconds=60)
    assert codes == [1, -signal.SIGKILL] and time.time() - began < 60


def killed(stage, fields, at):
    """kill -9 after step `at`."""
    real = SCRIPTS[stage].Run.step

    def step(self, number, **more):
        real(self, number, **more)
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
    SCRIPTS[stage].Run.step = step
    train(stage, fields)


KILLS = int(os.environ.get("NANOPATHO_KILLS", 2))


@pytest.mark.parametrize("stage", ["sft"] if KILLS == 2 else SCRIPTS)
def test_killed_at_any_moment(stage, world, chain, tmp_path):
    """kill -9 at random moments, start again: bit for bit the run that was never killed, and never a checkpoint that cannot
    be read. Every step is saved, so that many kills fall into a save."""
    fields = dict(fields_of(stage, world, chain), save_every=1)
    began = time.time()
    run(0, train, stage, dict(fields, out=tmp_path / "whole"))
    lasts, dice = time.time() - began, random.Random(7)
    reached = []
    for _ in range(KILLS):
        child, = begin(0, train, stage, dict(fields, out=tmp_path / "run"))
        time.sleep(dice.uniform(0.3, 1.0) * lasts / (1 if KILLS == 2 else 1.5))
        child.kill()
        child.join()
        folder = checkpoint.begun(tmp_path / "run")
        if (tmp_path / "run" / "results.json").exists():             # it was done before the kill: another round
            assert equal(state(tmp_path / "whole"), state(tmp_path / "run"))
            shutil.rmtree(tmp_path / "run")
            reached = []
        elif folder:
            state(folder)
            reached.append(torch.load(folder / "train_state.pt")["step"])
    assert reached == sorted(reached)
    run(0, train, stage, dict(fields, out=tmp_path / "run"))
    assert equal(state(tmp_path / "whole"), state(tmp_path / "run"))
    one, other = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert all(r.pop("time") >= 0 for r in one + other) and one == other


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_torchrun_starts_again_after_a_kill(world, chain, tmp_path):
    fields = dict(fields_of("sft", world, chain), steps=40, save_every=2)     # long enough to be hit while it trains
    run(0, train, "sft", dict(fields, out=tmp_path / "whole"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               "1", "train_sft.py", *options(**fields, out=tmp_path / "run")]
    agent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    limit = time.time() + 90
    while not (tmp_path / "run" / "last").exists() and time.time() < limit and agent.poll() is None:
        time.sleep(0.02)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    out, err = agent.communicate(timeout=90)
    assert agent.returncode == 0, err
    assert "exitcode: -9" in err and out.count("sft: 0.38 M trained parameters") == 2
    assert farthest(state(tmp_path / "whole"), state(tmp_path / "run")) < 1e-6
