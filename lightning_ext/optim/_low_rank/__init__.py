"""Optimizers whose moments are of low rank."""
