"""Pictures of what pixels see: similarity, attention, effective receptive field."""
