"""Frozen features, stored once; kNN and linear classifiers on them."""
