"""Training: losses, optimizer, state, step and data."""
