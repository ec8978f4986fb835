"""Communication on paper: bytes, messages, memory and time of sharded training."""
