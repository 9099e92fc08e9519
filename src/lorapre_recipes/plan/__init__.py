"""Memory and traffic of a training step, computed without weights."""
