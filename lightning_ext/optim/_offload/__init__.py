"""States of an optimizer in host memory."""
