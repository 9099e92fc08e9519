"""Settings that every test shares."""

import os

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Results must not depend on how many cores a machine has, and xdist runs one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, alone or in the suite."""
    torch.manual_seed(0)
