"""Tasks and prompts. `tasks` is imported by reward workers, so nothing here may import jax at this level."""
