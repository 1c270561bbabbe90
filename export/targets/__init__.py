"""Targets: each turns one part into one file, and knows no model."""
