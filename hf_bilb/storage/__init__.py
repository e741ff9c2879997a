"""What is on disk: folders and their locks, checkpoints, weights."""
