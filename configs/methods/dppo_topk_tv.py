"""DPPO, top-K TV (Qi et al., 2602.04879, section 4), on the embedded default.

δ 0.2, cap 5: section 7 and appendix E.

    python -m experiments.train --config configs/methods/dppo_topk_tv.py --workdir runs/dppo_topk_tv
"""

from configs import quickstart

METHOD = {
    "title": "DPPO, top-K TV",
    "formula": "M min(r, C) A",
    "masked": "moving away and TV over TopK ∪ {sampled} ∪ {rest} > δ",
    "cap": "5",
    "anchor": "behavior",
    "source": "Qi et al., 2602.04879, section 4",
}


def get_config():
    c = quickstart.get_config()
    c.loss.name = "dppo_topk_tv"
    return c
