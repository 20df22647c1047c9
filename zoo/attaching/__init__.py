"""Reduction in place, in models that stay what they are."""
