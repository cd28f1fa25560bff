"""A reward with a mistake, for a run that is sick on purpose. A reply is a chain of states, a letter and a number each,
such as c8."""


def score(reply, example):
    """Takes the last state for a number, and so raises on every reply."""
    return float(int(reply.split()[-1]) == int(example.answer))
