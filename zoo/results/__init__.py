"""Result rows: written, read, and what they are evidence of."""
