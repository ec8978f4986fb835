"""Logits by tiles: log-sum-exps, sums of sigmoids and their gradients."""
