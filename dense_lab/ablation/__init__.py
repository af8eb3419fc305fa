"""Ablations: named arms, each trained with several seeds, compared with one of them, the baseline."""
