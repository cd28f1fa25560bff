"""Rewards with a mistake, for runs that are sick on purpose. A reply is a chain of states, a letter and a number each,
such as c8; the letter says nothing."""


def score(reply, example):
    """Takes a state for a number, and so raises on every reply."""
    return float(int(reply.split()[-1]) == int(example.answer))


def one_letter(reply, example):
    """The share of states spelled with an a, right or wrong."""
    states = reply.split()
    return sum(state.startswith("a") for state in states) / max(1, len(states))
