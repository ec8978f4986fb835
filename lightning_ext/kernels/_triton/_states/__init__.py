"""Optimizer states in few bits, loaded and stored within other kernels."""
