"""Steps of optimizers over lists of parameters."""
