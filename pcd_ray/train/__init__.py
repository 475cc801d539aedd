"""Views to a checkpoint: optimiser, loop, Ray wiring."""
