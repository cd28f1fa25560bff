"""What the golden reward models score."""

CUT = 20  # tokens, of the last row

# Prompts as rows of data have them, and replies; one spells special tokens.
CONVERSATIONS = (
    ("1+1=", "2"),
    ("1+1=", ""),
    ("ab 0+2=", "it is 2, of course."),
    ([{"role": "system", "content": "be kind."}, {"role": "user", "content": "who?"}], "<pad>me<pad>"),
    (
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "bye"},
        ],
        "see you, and many thanks for all the numbers that were here",
    ),
    ("?", "!<end>"),
)


def messages(prompt, reply: str) -> list[dict[str, str]]:
    """The whole conversation."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*before, {"role": "assistant", "content": reply}]
