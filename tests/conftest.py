"""One thread, which on a busy machine is many times as fast as several, and no deadlines, which are timing."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when the libraries are loaded, and by the processes that tests start

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("no deadlines", deadline=None)
settings.load_profile("no deadlines")
