"""What AdaptiveBatchSize is made of: what it observes, decides and changes."""
