"""Pure functions on tensors that several methods share."""
