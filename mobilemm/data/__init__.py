"""Pictures, captions and conversations on their way to tensors."""
