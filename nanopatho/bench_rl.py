"""One RL step of this repository against one of TRL's GRPOTrainer: same weights, same sizes, one process, in turns.

    pip install -e ".[bench]" && python -m nanopatho.bench_rl

16 prompts of 32 tokens x 8 answers x 48 new tokens, without images; 4 layers of width 128, vocabulary 1,024; fp32, one thread;
DAPO's loss in one update of all 128 answers, no KL. A step of TRL and a step of ours alternate; medians are printed, in CPU
seconds (robust on a shared machine) and wall seconds. What is compared is whole programs: TRL also logs the exact entropy.
"""
import argparse
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from . import grpo
from .generate import generate
from .log import ConfigError, run_main
from .optim import Optimizers
from .presets import VLM
from .vlm import PathoVLM

PROMPTS, GROUP, LONG, NEW, VOCAB = 16, 8, 32, 48, 1024
SETTINGS = dict(group_size=GROUP, max_new_tokens=NEW, temperature=1.0, clip_low=0.2, clip_high=0.28, clip_norm=1.0, kl=0.0,
                micro_batch=PROMPTS * GROUP, aggregation="token-mean", variant="clip", dual_clip=0.0, tis=0.0,
                kl_gradient="k3")


@contextmanager
def clock(seconds, name):
    """Appends (CPU seconds, wall seconds) of its block to seconds[name]."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    seconds.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))


def reward(tokens):
    """A made-up rule under which siblings differ: the share of even token ids."""
    return sum(t % 2 == 0 for t in tokens) / len(tokens)


def our_step(model, prompts, optimizer, step, seconds):
    """Sample, reward, advantages, one update: the parts of train_rl.py in its order."""
    import train_rl
    with clock(seconds, "ours step"):
        with clock(seconds, "ours generate"):
            seeds = torch.arange(PROMPTS * GROUP) + step * PROMPTS * GROUP
            made = generate(model.eval(), prompts, group_size=GROUP, max_new_tokens=NEW, eos_token_ids=[], pad_token_id=0,
                            seeds=seeds)
        advantages = grpo.group_advantages(torch.tensor([reward(ids) for ids in made.ids.tolist()]), GROUP)
        rows = [x.split(GROUP) for x in (made.ids, made.logps, made.mask, advantages)]
        groups = [dict(record={"id": str(i)}, prompt=prompt, ids=ids, logps=logps, mask=mask, advantages=a)
                  for i, (prompt, ids, logps, mask, a) in enumerate(zip(prompts, *rows))]
        train_rl.update(model, None, SimpleNamespace(pad_id=0, banned_ids=()), groups, list(model.model.parameters()),
                        optimizer, 1e-6, SimpleNamespace(**SETTINGS), step)
    assert made.ids.shape == (PROMPTS * GROUP, NEW)


def their_steps(model, prompts, steps, seconds, between, folder):
    """`steps` steps of a GRPOTrainer that starts from the same weights; between(step) runs after each."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ConfigError(f"{error}: the other side of this benchmark needs TRL, pip install -e '.[bench]'") from error
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rms_norm_eps", "rope_theta", "vocab_size")
    other = Qwen2ForCausalLM(Qwen2Config(**{k: model.config[k] for k in same}, tie_word_embeddings=True, bos_token_id=None,
                                         eos_token_id=1, pad_token_id=0))
    other.load_state_dict({n: p for n, p in model.state_dict().items() if n.startswith("model.")}, strict=False)
    with torch.no_grad():
        gap = (other(prompts).logits - model(prompts)).abs().max().item()
    print(f"same weights: logits differ by {gap:.1e} at most")
    if gap > 1e-3:
        raise SystemExit("the two models are not the same: nothing is compared")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_list([{"prompt": " ".join(f"w{t}" for t in row)} for row in prompts.tolist()])
    arguments = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_completion_length=NEW,
        gradient_accumulation_steps=1, num_iterations=1, beta=0.0, loss_type="dapo", epsilon_high=0.28, temperature=1.0,
        learning_rate=1e-6, max_steps=steps, generation_kwargs={"min_new_tokens": NEW}, gradient_checkpointing=False,
        bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True)

    class Between(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.block = clock(seconds, "TRL step")
            self.block.__enter__()

        def on_step_end(self, _, state, *__, **___):
            self.block.__exit__(None, None, None)
            between(state.global_step)

    real, shapes = other.generate, set()

    def timed(*args, **more):
        with clock(seconds, "TRL generate"):
            out = real(*args, **more)
        shapes.add(tuple(out.shape))
        return out

    other.generate = timed
    GRPOTrainer(other, lambda completion_ids, **_: [reward(ids) for ids in completion_ids], args=arguments, train_dataset=data,
                processing_class=tokenizer, callbacks=[Between()]).train()
    assert shapes == {(PROMPTS * GROUP, LONG + NEW)}, shapes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="steps of each side; the first warms up")
    steps, seconds = parser.parse_args(argv).steps, {}
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # train_rl.py lies beside the package
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PathoVLM({**VLM["tiny"], "num_hidden_layers": 4, "vocab_size": VOCAB})
    print(f"torch {torch.__version__}, {sum(p.numel() for p in model.model.parameters()) / 1e6:.2f} M parameters, 1 thread")
    prompts = torch.randint(2, 1000, (PROMPTS, LONG), generator=torch.Generator().manual_seed(0))     # no image token
    optimizer = Optimizers(model.model, 1e-6, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        their_steps(model, prompts, steps, seconds, lambda step: our_step(model, prompts, optimizer, step, seconds), folder)
    median = lambda name, which: statistics.median(pair[which] for pair in seconds[name][1:])
    print(f"median of {steps - 1} steps: generate + rest = step")
    for which, unit in enumerate(("CPU", "wall")):
        for side in ("TRL", "ours"):
            part, step = median(f"{side} generate", which), median(f"{side} step", which)
            print(f"  {side:<5}{part:6.3f} +{step - part:6.3f} ={step:6.3f} {unit} seconds")
        print(", ".join(f"{name} {median(f'TRL {name}', which) / median(f'ours {name}', which):.2f}x" for name in (
            "generate", "step")) + f" faster in {unit} seconds")


if __name__ == "__main__":
    run_main(main)
