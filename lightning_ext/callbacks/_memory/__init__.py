"""What a training step will hold, found on tensors that have shapes and no memory."""
