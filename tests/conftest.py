"""One thread per process: two processes on two cores with OpenMP threads fight, and rounding depends on the number."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
