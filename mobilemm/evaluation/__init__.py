"""What a model or a bundle knows: tasks, and scores that can be compared."""
