"""Comparisons of optimizers: their runs and their report."""
