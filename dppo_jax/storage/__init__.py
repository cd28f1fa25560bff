"""What a run leaves: checkpoints, logs, its config, its lock. What it was made from: fingerprints, files of the hub."""
