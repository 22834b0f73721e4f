# SPDX-License-Identifier: Apache-2.0
"""Small random transformers models of every family, and their logits."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

FAMILIES = {
    "Llama": {"model_type": "llama"},
    "Llama, one head a group, theta 5e5": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_theta": 500000.0,
    },
    "Llama, tied (SmolLM2)": {"model_type": "llama", "tie_word_embeddings": True},
    "Llama, biases everywhere": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "Llama, linear RoPE": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "Llama 3.1's RoPE": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12,
        },
    },
    "Mistral, window of 24": {"model_type": "mistral", "sliding_window": 24},
    "Mistral, no window": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "Qwen2, biases on q, k, v": {"model_type": "qwen2"},
    "Qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen3, q and k norm": {"model_type": "qwen3", "head_dim": 32},
    "Mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(folder, name="Llama", seed=0, dtype=torch.float32, **changes):
    """Save a random model, norms and biases random, too; return its folder."""
    settings = {**SIZES, **FAMILIES[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return Path(folder)


def tensors(folder):
    """All tensors of a Hugging Face folder, by name."""
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def logits(folder, ids):
    """What transformers computes, in float32, for token ids ``[b, s]``."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model.eval()(input_ids=ids, position_ids=positions).logits


def edit_config(folder, **changes):
    """Change fields of config.json; None removes one."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config))


def same_bits(one, two):
    """Whether two folders have the same tensors, names, types and bits."""
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype
        and torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8))
        for k in first
    )
