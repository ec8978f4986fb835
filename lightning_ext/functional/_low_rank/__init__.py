"""Gradients of low rank: their subspaces, and updates made inside them."""
