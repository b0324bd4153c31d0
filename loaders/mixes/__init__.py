"""What an engine's own tool makes of each tensor, where that takes the whole list or the config: see `Mix`."""
