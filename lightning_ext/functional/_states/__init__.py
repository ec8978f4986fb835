"""Optimizer states in few bits."""
