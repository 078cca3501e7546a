"""One thread a process: the tests' tensors are small, and pytest runs them in several processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
