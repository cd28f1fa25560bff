"""DPPO, top-K KL (Qi et al., 2602.04879, section 4), on the embedded default.

δ 0.05, cap 5: section 7 and appendix E.

    python -m experiments.train --config configs/methods/dppo_topk_kl.py --workdir runs/dppo_topk_kl
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, top-K KL",
    "formula": "M min(r, C) A",
    "masked": "moving away and KL over TopK ∪ {sampled} ∪ {rest} > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_topk_kl"
    return c
