"""The `mobilemm` command."""
