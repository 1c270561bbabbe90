"""Training stages and their recipes."""
