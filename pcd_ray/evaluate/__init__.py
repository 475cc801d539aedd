"""A checkpoint to numbers and pictures."""
