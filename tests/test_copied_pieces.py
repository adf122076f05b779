"""A piece copied into an empty folder works there, with torch, triton and einops installed and nothing else.

What must be copied together stands in the file's own docstring ("Needs attention.py and projector.py beside it"). Each
runs in a Python of its own (-I: neither this folder nor PYTHONPATH) in which everything but the standard library and
what torch, triton and einops need themselves cannot be found, as if it were not installed. Truth: closed forms, numbers
by hand, a vision tower and attention written out in float64.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FENCE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
class Fence(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.partition(".")[0] in allowed or name.startswith("_sysconfigdata_")    # this: how Python was built
        return super().find_spec(name, path, target) if known else None
sys.meta_path[:] = BuiltinImporter, FrozenImporter, Fence             # editable installs had finders of their own
for outside in ("nanopatho", "kernels", "data_prep", "tokenizers", "safetensors", "PIL", "numpy"):
    if outside not in allowed:
        try:
            __import__(outside)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"the fence has a hole: {outside} was imported")
sys.path.insert(0, folder)
"""

PIECES = {
    "nanopatho/grpo.py": """
import math, torch
from grpo import aggregate, group_advantages, keep_groups, kl_k3, policy_loss, soft_overlong_penalty
A = group_advantages(torch.tensor([1., 0, 0, 0, 0, 0, 0, 0]), 8, eps=0)
near(A[:2], [.875 / 8 ** -.5, -.125 / 8 ** -.5])                     # the std of one in eight is sqrt(1/8)
logp = torch.tensor([[1.5, 1.25], [0.5, 2.0]]).log().requires_grad_()   # old is 0, so these are the ratios
loss, _ = policy_loss(logp, torch.zeros(2, 2), torch.tensor([1., -2.]), torch.ones(2, 2), clip_high=0.28)
near(loss, -(1.28 + 1.25 - 2 * 0.8 - 2 * 2.0) / 4)
loss.backward()
near(logp.grad, [[0, -1.25 / 4], [0, 2 * 2.0 / 4]])                   # 0 beyond the clip, -A r / N inside
near(aggregate(torch.tensor([[1., 1, 9], [4, 4, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]]), "sequence-mean"), 2.5)
near(kl_k3(torch.tensor([[0.]]), torch.tensor([[math.log(2)]])), [[1 - math.log(2)]])
near(soft_overlong_penalty(torch.tensor([80, 90, 130]), 100, 20), [0, -.5, -1])
assert keep_groups(torch.tensor([.1] * 8 + [0, 1] * 4), 8).tolist() == [False, True]
""",
    "nanopatho/rewards.py": """
from rewards import claim_reward, claims, combine, score_answer
record = {"id": "a", "options": ["fat", "mucin", "keratin", "necrosis"], "answer": "C"}
for text, format, accuracy in (
        ("<think>pearls</think><answer>C</answer>", 1, 1), ("<think>pearls</think>\\n<answer>keratin.</answer>", 1, 1),
        ("<think>pearls</think><answer>A B C D</answer>", 1, 0), ("<think><answer>C</answer></think>", 0, 0),
        ("<think>x</think><answer>C</answer><answer>C</answer>", 0, 0), ("C", 0, 0),
        ("<think></think><answer>C</answer>", 0, 0)):
    parts = score_answer(text, record, n_tokens=9, length_limit=8)
    assert parts == {"format": format, "accuracy": accuracy, "length": 0}, (text, parts)
    assert abs(combine(parts, "grpo_sum") - (.1 * format + .9 * accuracy)) < 1e-12
    assert combine(parts, "dapo_gated") == -1                         # too long
lexicon = {"material": {"keratin": ["pearls"], "!fat": ["no fat"]}}
assert claim_reward(claims("Pearls and no fat.", lexicon), {"material": "keratin"}) == 1
assert claim_reward(claims("Pearls and no fat.", lexicon), {"material": "fat"}) == -1
""",
    "kernels/attention.py": """
import torch
from attention import attention
torch.manual_seed(0)
lengths, H, Hk, D = [5, 40], 4, 2, 64
q, k, v, do = (torch.randn(45, heads, D) for heads in (H, Hk, Hk, H))
def by_hand(q, k, v):                                                # one head, one sequence, one query at a time
    rows, first = [], 0
    for n in lengths:
        for i in range(first, first + n):
            heads = []
            for h in range(H):
                scores = k[first:i + 1, h // 2] @ q[i, h] / D ** .5
                heads.append(scores.softmax(0) @ v[first:i + 1, h // 2])
            rows.append(torch.stack(heads))
        first += n
    return torch.stack(rows)
def run(function, x):
    x = [t.clone().requires_grad_() for t in x]
    o = function(*x)
    return [o.detach(), *torch.autograd.grad(o, x, do.to(o.dtype))]
got = run(lambda *x: attention(*x, [0, 5, 45], causal=True), (q, k, v))
for mine, true in zip(got, run(by_hand, (q.double(), k.double(), v.double()))):
    assert (mine.double() - true).norm() < 2e-6 * true.norm()
""",
    "nanopatho/vit.py": """
import torch, torch.nn.functional as F
from piece.vit import VisionTower
torch.manual_seed(0)
config = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, window_size=56, fullatt_block_indexes=[1],
              in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=24)
tower = VisionTower(config).double()
with torch.no_grad():
    for p in tower.parameters():
        p.normal_(0, 0.2)
rows, cols, K = 4, 6, 16                                              # patches: one whole window, one cut off
pixels = torch.randn(rows * cols, 1176, dtype=torch.float64)
where = torch.tensor([(2 * a + i, 2 * b + j) for a in range(2) for b in range(3) for i in (0, 1) for j in (0, 1)])
window = where[:, 1] // 4                                             # 56 pixels are 4 patches
same = window[:, None] == window
speed = 10000.0 ** -(torch.arange(0, K // 2, 2).double() / (K // 2))
turn = torch.exp(1j * torch.cat([where[:, :1] * speed, where[:, 1:] * speed], 1))[:, None]       # (P, 1, K/2)
norm = lambda x, m: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.weight
x = pixels @ tower.patch_embed.proj.weight.flatten(1).T
for number, block in enumerate(tower.blocks):
    q, k, v = block.attn.qkv(norm(x, block.norm1)).view(-1, 3, 2, K).unbind(1)
    q, k = (torch.complex(t[..., :K // 2], t[..., K // 2:]) * turn for t in (q, k))
    scores = torch.einsum("ihd,jhd->hij", q, k.conj()).real / K ** .5
    scores = scores.masked_fill(~(same | (number == 1)), float("-inf"))
    x = x + block.attn.proj(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
    y, m = norm(x, block.norm2), block.mlp
    x = x + m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))
four = norm(x, tower.merger.ln_q).view(6, -1)                         # 2 x 2 patches side by side
near(tower(pixels, torch.tensor([[1, rows, cols]])), tower.merger.mlp[2](F.gelu(tower.merger.mlp[0](four))), 1e-5)
""",
    "nanopatho/clip.py": """
import math, torch
from clip import CLIP, clip_loss, to_open_clip
near(clip_loss(torch.eye(4), torch.eye(4), torch.tensor(2.0).log()), math.log(1 + 3 * math.exp(-2)))
near(clip_loss(torch.ones(3, 5), torch.ones(3, 5), torch.tensor(0.)), math.log(3))      # cannot tell them apart
torch.manual_seed(0)
size = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu")
model = CLIP(dict(vision_config=dict(size, image_size=28, patch_size=14), projection_dim=16,
                  text_config=dict(size, vocab_size=50, max_position_embeddings=8, eos_token_id=49))).eval()
pixels, ids = torch.randn(2, 3, 28, 28), torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 49, 0, 0, 0]])
logits = model(pixels, ids)
assert logits.shape == (2, 2) and (logits.abs() <= model.logit_scale.exp() + 1e-4).all()           # scaled cosines
near(model(pixels, ids.where(ids > 0, 7)), logits)                    # what stands behind the end token is not read
torch.save(to_open_clip(model.state_dict()), "model.pt")              # open_clip's form: needs torch alone
near(CLIP.from_pretrained("model.pt")(pixels, ids), logits)
""",
}

NEAR = """
def near(got, want, tolerance=1e-6):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got.detach(), want.detach(), atol=tolerance, rtol=tolerance)
"""


def files(piece):
    """The piece and the files its docstring says must lie beside it."""
    said = ast.get_docstring(ast.parse((ROOT / piece).read_text(encoding="utf-8")))
    sentence = re.search(r"\bNeeds (.*?) beside it\.", said, re.DOTALL)
    beside = re.findall(r"\w+\.py", sentence[1]) if sentence else []
    return [ROOT / piece, *((ROOT / piece).parent / name for name in beside)]


def installed(*names):
    """Modules of these distributions and of all that they require themselves, extras apart."""
    wanted, seen = list(names), set()
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:              # needed on another platform only
            continue
        if name not in seen:
            seen.add(name)
            wanted += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    found = {module for module, owners in importlib.metadata.packages_distributions().items()
             if seen & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}}
    assert not found & {"nanopatho", "kernels", "data_prep", "transformers", "PIL", "tokenizers", "safetensors", "tqdm"}
    return found


def alone(folder, code, allowed):
    folder = str(folder)
    start = f"allowed, folder = {sorted(allowed)!r}, {folder!r}\n" + FENCE
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "NANOPATHO_KERNELS": "auto"}
    command = [sys.executable, "-I", "-c", start + code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("piece, code", PIECES.items(), ids=PIECES)
def test_a_copied_piece_works_in_an_empty_folder(tmp_path, piece, code):
    taken = files(piece)
    home = tmp_path / "piece" if len(taken) > 1 else tmp_path        # several: a package of their own
    home.mkdir(exist_ok=True)
    for file in taken:
        shutil.copy(file, home)
    plain = piece == "nanopatho/rewards.py"                          # it says: the standard library only
    allowed = {*sys.stdlib_module_names, *(f.stem for f in taken), "piece"}
    allowed |= set() if plain else installed("torch", "triton", "einops")
    allowed |= installed("numpy") if piece.startswith("kernels/") else set()     # of Triton's interpreter, on a CPU
    done = alone(tmp_path, code if plain else "import torch\n" + NEAR + code, allowed)
    assert done.returncode == 0, done.stderr


def test_what_was_forgotten_is_named(tmp_path):
    (tmp_path / "piece").mkdir()
    shutil.copy(ROOT / "nanopatho/vit.py", tmp_path / "piece")
    shutil.copy(ROOT / "nanopatho/attention.py", tmp_path / "piece")
    allowed = {*sys.stdlib_module_names, "piece", *installed("torch")}
    done = alone(tmp_path, "from piece.vit import VisionTower", allowed)
    assert done.returncode == 1 and "No module named 'piece.projector'" in done.stderr
