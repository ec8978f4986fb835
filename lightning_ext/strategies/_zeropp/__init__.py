"""Quantized collectives of ZeRO++ as extensions of FSDP2."""
