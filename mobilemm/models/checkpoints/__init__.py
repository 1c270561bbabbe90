"""Other projects weights, read and written."""
