"""A run, and a comparison of methods over seeds, as functions."""
