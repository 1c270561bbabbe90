"""Training of generators: autoencoder, teacher, and the distillations to a few steps."""
