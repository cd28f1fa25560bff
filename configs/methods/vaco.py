"""VACO (2603.01365, algorithm 1), on the embedded default.

For language models, with a response as the batch whose TV is measured; δ 0.1 is ours.

    python -m experiments.train --config configs/methods/vaco.py --workdir runs/vaco
"""

from configs import quickstart

METHOD = {
    "title": "VACO",
    "formula": "M min(r, C) A",
    "masked": "where A(r−1) > 0, if the response's mean |r−1|/2 > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "2603.01365, algorithm 1",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "vaco"
    return c
