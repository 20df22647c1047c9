"""The console command `zoo` and what it prints."""
