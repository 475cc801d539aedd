"""Sweeps: which options are varied, by whom trials are chosen, and what came of them."""
