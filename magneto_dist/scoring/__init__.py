"""A trained run scored: what `launchers/evaluate.py` tells."""
