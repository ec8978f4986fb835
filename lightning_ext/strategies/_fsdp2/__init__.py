"""What a fully sharded strategy is made of."""
