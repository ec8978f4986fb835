"""Triton kernels and their launchers; no other folder imports triton."""
