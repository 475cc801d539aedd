"""The loop that trains FCNs and detectors, and its Ray wiring."""
