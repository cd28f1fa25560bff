"""SAPO (Gao et al., 2511.20347), on the embedded default.

τ 1 where A>0, 1.05 where A<0.

    python -m experiments.train --config configs/methods/sapo.py --workdir runs/sapo
"""

from configs import quickstart

METHOD = {
    "title": "SAPO",
    "formula": "4g(1−g) r A, g = σ(τ(r−1))",
    "masked": "none: a soft gate",
    "cap": "–",
    "anchor": "behavior",
    "source": "Gao et al., 2511.20347",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "sapo"
    c.advantage.name = "group_mean_std"
    c.aggregation.name = "seq_mean_token_mean"
    return c
