"""Pictures from a condition: latent diffusion models, their samplers and their distillation, on diffusers."""
