"""Trained networks: load, evaluate, predict, export."""
