"""From a budget to a schedule: solved on integers, by measuring, or by a search."""
