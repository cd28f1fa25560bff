"""Rewards: verifiers, and the workers that run them. Nothing here imports jax."""
