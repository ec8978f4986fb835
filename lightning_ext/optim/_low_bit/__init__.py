"""States of few bits: how they are made, stepped and saved."""
