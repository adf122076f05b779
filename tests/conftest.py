"""Settings that must stand before torch and triton are imported anywhere in the test run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not burn a core that another process needs
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; triton reads this at its first import

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models: handing work to a second thread costs more than the work
