"""What LargeBatchRecipe knows: the run that it reads and the checks of it."""
