"""Settings that every test shares."""

import pytest
import torch

# Results must not depend on how many cores a machine has, and xdist runs one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, alone or in the suite."""
    torch.manual_seed(0)
