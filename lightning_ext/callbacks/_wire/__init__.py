"""What this rank sends, read off the operators of torch.distributed."""
