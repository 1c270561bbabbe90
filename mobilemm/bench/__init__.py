"""What a bundle costs where it runs: time, memory, energy, each figure beside its physical limit."""
