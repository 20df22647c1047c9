"""Which of a tower's tokens a language model or an index is given: one paper, one file."""
