"""What is added to a verifier's score, from the response alone."""

import numpy as np


def overlong_penalty(lengths: np.ndarray, *, limit: int, buffer: int) -> np.ndarray:
    """0 up to limit - buffer tokens, then down linearly to -1 at `limit`: f32[B] of i[B] (DAPO, 2503.14476, eq. 13).

    `buffer` 0: no penalty.
    """
    if buffer == 0:
        return np.zeros(len(lengths), np.float32)
    return np.clip((limit - buffer - np.asarray(lengths)) / buffer, -1.0, 0.0).astype(np.float32)
