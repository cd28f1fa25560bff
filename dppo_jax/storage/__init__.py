"""What a run leaves: checkpoints, logs, its config, its lock. Fingerprints of what it was made from."""
