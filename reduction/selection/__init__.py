"""What selectors are made of: their inputs, their answer, ranking, and the registry."""
