"""Divergences, targets and methods of one's own, registered by name."""
