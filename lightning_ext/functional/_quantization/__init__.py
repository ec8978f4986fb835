"""Codes of blocks and of signs, and the random numbers to round with."""
