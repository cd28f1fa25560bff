"""Environments of a user's own, in one file, for the tests. Reward workers load this: no jax here."""

import random

hoard = []


class Talk:
    """Asks in the alphabet of tests/helpers/fixtures.py for as many turns as the seed says; each with a 1 is a reward.

    `bad`: by seed, what goes wrong in the second turn.
    """

    def __init__(self, bad=None, text="?"):
        self.bad, self.text = dict(bad or {}), text

    def reset(self, seed):
        self.seed, self.turn = seed, 0
        self.last = 2 + random.Random(seed).randrange(3)
        return f"{seed % 3}+{seed % 2}=", {}

    def step(self, action):
        self.turn += 1
        kind = self.bad.get(str(self.seed)) if self.turn == 2 else None
        if kind == "raise":
            raise RuntimeError("no idea")
        while kind == "hang":
            pass
        while kind == "eat":
            hoard.append(bytearray(2**24))
        if kind == "number":
            return 3, 0.0, False, False, {}
        if kind == "swap":
            return "", False, 0.0, False, {}
        if kind == "nan":
            return "", float("nan"), False, False, {}
        over = self.turn >= self.last
        return f"{self.text}{random.randrange(3)}", float("1" in action), over, False, {}


class Forgetful(Talk):
    def reset(self, seed):
        return f"{random.SystemRandom().randrange(10**6)}", {}


class NoSteps:
    def reset(self, seed):
        return "", {}


class BadReset(Talk):
    def reset(self, seed):
        return "no info"


class Silent(Talk):
    def reset(self, seed):
        return "", {}


class Waits(Talk):
    def reset(self, seed):
        while True:
            pass


class Odd(Talk):
    def reset(self, seed):
        return "\ud800", {}


class Fails(Talk):
    def reset(self, seed):
        raise KeyError("nothing")


def make(max_guesses=2):
    """What gem.make gives for an id."""
    if max_guesses < 0:
        raise ValueError("no guesses")


number = 3
