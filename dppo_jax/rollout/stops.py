"""Stop strings: where the text of a response holds one of them, whatever the boundaries of its tokens.

Aho and Corasick's automaton reads the text byte by byte (Communications of the ACM 18, 1975). Here it is lifted onto
tokens: for every state and every token, the state behind all bytes of that token. Tokens that lead from every state to
the same one are of one class, so that the table stays small whatever the vocabulary.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from dppo_jax.errors import UserError

MOST = 64  # stop strings
BYTES = 1024  # of all of them: the table has as many rows


def check_stop(texts: Sequence[str], key: str = "rollout.stop") -> None:
    """UserError for stop strings that cannot be: an empty one, one that no text holds, too many, or too long."""
    if len(texts) > MOST:
        raise UserError(f"{key} has {len(texts)} texts, more than {MOST}")
    for text in texts:
        if not text:
            raise UserError(f"{key} holds an empty text, which every response has at once; leave it out")
        if "\ufffd" in text:
            raise UserError(f"{key} holds {text!r:.60}, whose U+FFFD stands in a text for bytes that are no UTF-8")
    size = sum(len(text.encode()) for text in texts)
    if size > BYTES:
        raise UserError(f"{key}: its texts have {size} bytes of UTF-8 together, more than {BYTES}")


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
    """An automaton over tokens. State 0 is that of no token; the last says that a stop string was found, and stays."""

    token_class: Integer[np.ndarray, "V"]
    next_state: Integer[np.ndarray, "states classes"]

    def start(self, rows: int) -> Integer[Array, "rows"]:
        """The state of rows without a token."""
        return jnp.zeros(rows, self.next_state.dtype)

    def after(self, state: Integer[Array, "*n"], token: Integer[Array, "*n"]) -> Integer[Array, "*n"]:
        """The state after one token more."""
        return jnp.asarray(self.next_state)[state, jnp.asarray(self.token_class)[token]]

    def after_each(self, tokens: Integer[Array, "B R"]) -> Integer[Array, "B R"]:
        """The state after every token of rows."""

        def step(state: Array, token: Array) -> tuple[Array, Array]:
            state = self.after(state, token)
            return state, state

        return jnp.swapaxes(jax.lax.scan(step, self.start(len(tokens)), jnp.swapaxes(tokens, 0, 1))[1], 0, 1)

    def found(self, state: Integer[Array, "*n"]) -> Bool[Array, "*n"]:
        """Whether a row's text holds a stop string."""
        return state == len(self.next_state) - 1


def make_stops(
    texts: Sequence[str],
    later: Sequence[bytes],
    first: Sequence[bytes] | None = None,
    *,
    vocab_size: int,
    silent: Iterable[int] = (),
) -> Stops:
    """The automaton of stop strings, in NumPy.

    later, first: what every token adds to a text, behind others and as the first (None: the same), by `token_bytes`.
    Tokens beyond them up to vocab_size, and those that are `silent`, add nothing.
    Raises: UserError as `check_stop`.
    """
    check_stop(texts)
    by_byte = _byte_automaton([text.encode() for text in texts])
    spelled = [_padded(bytes_of, vocab_size, silent) for bytes_of in (later, first or ())]
    if not first or spelled[0] == spelled[1]:
        token_class, columns = _lifted(by_byte, spelled[0])
        return _smallest(token_class, columns.T)
    # One more state, that of no token, in which a token adds what it adds as the first; one that adds nothing keeps it.
    classes, columns = _lifted(by_byte, spelled[0] + spelled[1])
    of_later, of_first = classes[:vocab_size], classes[vocab_size:]
    adds = np.array([bool(part) for part in spelled[0]])
    from_start = np.where(adds, columns[of_first, 0] + 1, 0)
    pairs, token_class = np.unique(np.stack([from_start, of_later], axis=1), axis=0, return_inverse=True)
    rows = np.concatenate([pairs[None, :, 0], columns[pairs[:, 1]].T + 1])
    return _smallest(token_class.reshape(-1), rows)


def _padded(bytes_of: Sequence[bytes], size: int, silent: Iterable[int]) -> list[bytes]:
    padded = [*bytes_of, *[b""] * (size - len(bytes_of))]
    for token in silent:
        padded[token] = b""
    return padded


def _smallest(token_class: np.ndarray, next_state: np.ndarray) -> Stops:
    """With numbers as short as they may be."""
    kinds = [np.int16 if x.max() < 2**15 else np.int32 for x in (token_class, next_state)]
    return Stops(token_class.astype(kinds[0]), next_state.astype(kinds[1]))


def _byte_automaton(strings: Sequence[bytes]) -> np.ndarray:
    """i[states, 256]: the next state by state and byte. State 0 is that of no byte, the last accepts and stays."""
    children: list[dict[int, int]] = [{}]
    accepting: set[int] = set()
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        accepting.add(node)
    following: np.ndarray = np.zeros((len(children), 256), np.int64)
    fallback = [0] * len(children)  # the state of the longest other beginning that ends here
    queue = deque([0])
    while queue:
        node = queue.popleft()
        if fallback[node] in accepting:
            accepting.add(node)
        following[node] = following[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = int(following[node, byte]) if node else 0
            following[node, byte] = child
            queue.append(child)
    number = np.full(len(children), len(children) - len(accepting))
    others = [node for node in range(len(children)) if node not in accepting]
    number[others] = np.arange(len(others))
    found = np.full((1, 256), len(others))
    return np.concatenate([number[following[others]], found])


def _lifted(by_byte: np.ndarray, tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Class i[V] of each token, and i[classes, states]: where a token of the class leads from each state.

    All tokens go on together, a byte at a time: those of one class with the same next byte are of one class again.
    """
    length = np.fromiter(map(len, tokens), np.int64, len(tokens))
    start, text = np.cumsum(length) - length, np.frombuffer(b"".join(tokens), np.uint8)
    by_kind, kind = np.unique(by_byte, axis=1, return_inverse=True)  # bytes that no string holds are of one kind
    kinds, kind = by_kind.shape[1], kind.reshape(-1)
    columns = [np.arange(len(by_byte))]
    known = {columns[0].tobytes(): 0}
    token_class: np.ndarray = np.zeros(len(tokens), np.int64)
    going_on, at = np.flatnonzero(length), 0
    while len(going_on):
        pairs, inverse = np.unique(
            token_class[going_on] * kinds + kind[text[start[going_on] + at]], return_inverse=True
        )
        numbers = []
        for before, after in zip(*np.divmod(pairs, kinds), strict=True):
            column = by_kind[columns[before], after]
            number = known.setdefault(column.tobytes(), len(columns))
            if number == len(columns):
                columns.append(column)
            numbers.append(number)
        token_class[going_on] = np.array(numbers)[inverse.reshape(-1)]
        at += 1
        going_on = going_on[length[going_on] > at]
    used, token_class = np.unique(token_class, return_inverse=True)
    return token_class.reshape(-1), np.stack([columns[number] for number in used])
