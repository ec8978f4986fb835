"""Codes of blocks and of signs."""
