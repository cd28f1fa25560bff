"""Runs that are killed, signalled and damaged at random instants, and what came of each."""
