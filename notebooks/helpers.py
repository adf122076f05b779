"""What every notebook uses and no notebook explains: where things are, pictures side by side, the check of an exercise.

    from helpers import check, model_folders, plt, root, show

Needs the extra `notebooks` (pip install -e ".[notebooks]"). Importing it makes the repository's root the working
folder, so that `runs/demo` and `data/tiny` are found, whether the notebook was opened from the root or from notebooks/.
"""
import atexit
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
os.chdir(root)
if str(root) not in sys.path:
    sys.path.insert(0, str(root))                        # works in a plain checkout too, without pip install

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from IPython.display import Image, display  # noqa: E402

plt.rcParams.update({"figure.dpi": 80, "savefig.bbox": "tight", "font.size": 10, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.titlesize": 10, "image.interpolation": "nearest"})


def show(pictures, titles=None, columns=4, side=1.9, cmap=None):
    """Pictures (H, W, 3) uint8 or (H, W) side by side, titles above. cmap: a list, one for each picture, None for RGB.

    As JPEG: the noise of a photograph makes a PNG ten times as large, and a page has many.
    """
    titles, cmap = titles or [""] * len(pictures), cmap or [None] * len(pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, (side + .25) * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, title, colours in zip(axes.flat, pictures, titles, cmap):
        ax.imshow(np.asarray(picture), cmap=colours)
        ax.set_title(title, fontsize=9)
    figure.tight_layout(pad=.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=72, pil_kwargs={"quality": 60})
    plt.close(figure)
    display(Image(buffer.getvalue(), format="jpeg"))


def check(right):
    """right: a function without arguments that says whether the exercise is solved. Prints "right" or "not yet"; what
    is still `...`, or raises, is "not yet" too, and says why."""
    try:
        verdict = bool(right())
    except Exception as error:                           # whatever a student wrote: the page goes on
        print(f"not yet ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
        return
    print("right" if verdict else "not yet")


def model_folders():
    """-> folder of runs (sft, pretrain, ...) and folder of data. `make demo` makes runs/demo and data/tiny; where they
    are missing, or NANOPATHO_SMOKE is set, three stages of the smoke preset are trained now, in under a minute.

    A smoke model has seen three batches: it shows that everything runs, not what a model can do.
    """
    made, data = Path("runs/demo"), Path("data/tiny")
    there = all(file.is_file() for file in (made / "clip/model.safetensors", made / "sft/model.safetensors",
                                            data / "rl.jsonl"))
    if there and not os.environ.get("NANOPATHO_SMOKE"):
        print("weights: runs/demo/sft, questions: data/tiny")
        return made, data
    out = os.environ.get("NANOPATHO_SMOKE_RUNS")         # the test gives one folder to all notebooks
    if not out:
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        out = folder.name
    out, data = Path(out), Path(out) / "data"
    print("A SMOKE MODEL: trained on three batches, its answers are noise. `make demo` makes the real one.")
    small = ["--preset", "smoke", "--data", data]
    steps = {"data": ["-m", "data_prep", "microworld", "--preset", "smoke", "--out", data],
             "clip": ["train_clip.py", *small, "--out", out / "clip"],
             "pretrain": ["train_pretrain.py", *small, "--out", out / "pretrain"],
             "sft": ["train_sft.py", *small, "--init", out / "pretrain", "--out", out / "sft"]}
    for name, command in steps.items():
        if not (out / name).exists():
            done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return out, data
