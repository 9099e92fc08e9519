"""Training runs: models, optimizers, the trainer, checkpoints and run folders."""
