"""Steps of optimizers: the formula of one parameter, and lists of them in place."""
