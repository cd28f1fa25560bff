"""Mutated inputs of every kind, and what came of each."""
