"""Pixel-Wise Contrastive Distillation on Ray."""

__version__ = "0.1.0"
