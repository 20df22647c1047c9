"""What a model costs, counted from a plan; nothing here runs a model but the counters."""
