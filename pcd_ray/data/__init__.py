"""Images to views: sources, packed shards, the epoch's plan, augmentation."""
