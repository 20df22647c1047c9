"""Schedules, one family per file; see `reduction.schedules.base`."""
