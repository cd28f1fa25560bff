"""Verifiers that misbehave. Reward workers import this: no jax here."""

import itertools
import os
import sys
import time

hoard = []


def hangs_on_demand(reply, example):
    """Loops for ever in Python."""
    if reply == "hang":
        for _ in itertools.count():
            pass
    return float(reply == example.answer)


def hangs_in_c(reply, example):
    """A power that takes years, inside one C call that hears no signal handler."""
    if reply == "hang":
        return float(9**9**9**9 == 0)
    return float(reply == example.answer)


def eats_memory(reply, example):
    """Keeps what it allocates, so that only the end of the process gives it back."""
    while reply == "eat":
        hoard.append(bytearray(2**24))
    return float(reply == example.answer)


def dies(reply, example):
    if reply == "die":
        time.sleep(0.3)  # see `worker.score_one`
        os.abort()
    return float(reply == example.answer)


def raises(reply, example):
    if reply == "raise":
        raise RuntimeError("this verifier is broken")
    return float("nan") if reply == "nan" else 1.0


def sees_jax(reply, example):
    return float("jax" in sys.modules)


def process_id(reply, example):
    return float(os.getpid())
