"""Memory of a training step, computed without weights."""
