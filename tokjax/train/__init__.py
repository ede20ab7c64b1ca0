"""Training: optimisers, losses, the state and its step, checkpoints, metrics, and a loop that reads top to bottom."""
