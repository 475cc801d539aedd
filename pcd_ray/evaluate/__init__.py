"""A checkpoint to numbers and pictures: here what all judging shares, a room for each kind."""
