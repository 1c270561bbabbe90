"""The export pipeline: a checkpoint in, a phone bundle out. Installed and imported as `mobilemm.export`."""
