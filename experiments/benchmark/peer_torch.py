"""PyTorch's side: `python -m experiments.benchmark.peer_torch`, with torch and transformers. Default threads, eager."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmark import worker, workloads
from experiments.benchmark.workloads import WORKLOADS, Workload

LIBRARIES = {"torch": "torch", "transformers": "transformers"}
SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"  # its weights, where they are


def _model(workload: Workload) -> Any:
    """The model in float32 with scaled_dot_product_attention; the weights are random unless `SMOLLM2` is there."""
    import torch
    import transformers

    torch.manual_seed(workload.seed)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if workload.model_type == "llama" and (SMOLLM2 / "model.safetensors").exists():
        return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, **options)
    config = transformers.AutoConfig.for_model(**workloads.hf_config(workload))
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def rollout(workload: Workload) -> worker.Run:
    """transformers' generate: plain sampling, its dynamic cache (the default, and the one that does not compile)."""
    import torch
    import transformers

    model = _model(workload).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        max_new_tokens=workload.max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    prompts = torch.from_numpy(workloads.prompt_rows(workload)).long()
    mask = torch.ones_like(prompts)

    def run() -> worker.Json:
        with torch.inference_mode():
            output = model.generate(prompts, attention_mask=mask)
        assert output.shape == (workload.rows, workload.prompt_length + workload.max_new_tokens)
        return {"tokens": workload.rows * workload.max_new_tokens}

    return run


def forward_backward(workload: Workload) -> worker.Run:
    """Cross-entropy on every token and its gradients; no optimizer."""
    import torch

    model = _model(workload).train()
    tokens = torch.from_numpy(workloads.train_tokens(workload)).long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def run() -> worker.Json:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
        return {"tokens": workload.train_tokens}

    return run


def train(workload: Workload) -> worker.Run:
    """One optimizer step of the policy gradient on fixed responses: global-norm clip, AdamW.

    Logits are made for the responses only. On policy every ratio is 1, so nothing is clipped.
    """
    import torch

    model = _model(workload).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    prompts = torch.from_numpy(workloads.prompt_rows(workload)).long()
    responses = torch.from_numpy(workloads.response_tokens(workload)).long()
    advantages = torch.from_numpy(workloads.advantages(workload))[:, None]
    inputs = torch.cat([prompts, responses], 1)
    length = workload.max_new_tokens

    def run() -> worker.Json:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), responses, reduction="none")
        (nll * advantages).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"tokens": workload.train_tokens}

    return run


def _on(name: str, setup: Callable[[Workload], worker.Run]) -> Callable[[], worker.Run]:
    return lambda: setup(WORKLOADS[name])


TABLE: worker.Table = {
    ("M", "rollout"): _on("M", rollout),
    ("M1", "rollout"): _on("M1", rollout),
    ("M", "train"): _on("M", forward_backward),
    ("S", "train"): _on("S", train),
}


if __name__ == "__main__":
    worker.serve(TABLE, LIBRARIES, uses_jax=False)
