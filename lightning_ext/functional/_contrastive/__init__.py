"""Contrastive losses by tiles, and the blocks that a ring over ranks is made of."""
