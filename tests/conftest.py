"""Settings that must stand before torch and triton are imported anywhere in the test run, and a small world for all."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not burn a core that another process needs
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; triton reads this at its first import

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models: handing work to a second thread costs more than the work

import pytest  # noqa: E402

from smoke import options  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The smoke micro-world, made by the command in the README."""
    out = tmp_path_factory.mktemp("world") / "data"
    subprocess.run([sys.executable, "-m", "data_prep", "microworld", "--preset", "smoke", "--out", str(out)], cwd=ROOT,
                   check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def chain(world, tmp_path_factory):
    """Pretraining and SFT as programs of their own -> the folder of both runs."""
    out = tmp_path_factory.mktemp("chain")
    for name, more in (("pretrain", {}), ("sft", dict(init=out / "pretrain"))):
        fields = options(preset="smoke", data=world, out=out / name, **more)
        done = subprocess.run([sys.executable, f"train_{name}.py", *fields], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{name}: 0.38 M trained parameters" in done.stdout and "step/s" in done.stderr  # the bar
    return out
