"""What the commands do: build a model from a configuration, train it, measure it."""
