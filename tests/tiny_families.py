"""Tiny random models of every verified family, built from transformers' own config classes."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WINDOW = 16
VOCAB_SIZE = 320
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# Head widths that do not follow from hidden_size, windows, experts: whatever could be got wrong.
# The keys are the verified families.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {
        **_MAMBA,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 32,
    },
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {"num_hidden_layers": 4, "sliding_window": WINDOW},
    "deepseek_v2": {
        **_LATENT,
        **_ROUTED,
        "num_hidden_layers": 3,
        "n_group": 1,
        "n_shared_experts": 1,
    },
    "deepseek_v3": {**_LATENT, **_ROUTED, "num_hidden_layers": 3},
    "deepseek_v32": {
        **_LATENT,
        **_ROUTED,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "ernie4_5": {"head_dim": 12},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "falcon": {},
    "falcon_h1": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_chunk_size": 32,
    },
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 12, "sliding_window": WINDOW, "num_hidden_layers": 6},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "head_dim": 12,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 5,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": {
        "num_hidden_layers": 12,
        "head_dim": 12,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 6,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "glm4_moe": {**_ROUTED, "head_dim": 12},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {
        "head_dim": 12,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        **_MAMBA,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_chunk_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 12},
    "jamba": {
        **_MAMBA,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2": {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]},
    "llama": {},
    "llama4_text": {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
    },
    "longcat_flash": {
        **_LATENT,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 2,
        "zero_expert_num": 1,
        "moe_topk": 2,
    },
    "minicpm3": {**_LATENT, "num_hidden_layers": 3},
    "ministral": {"head_dim": 12, "sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mpt": {},
    "nemotron": {},
    "nemotron_h": {
        "head_dim": 12,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "use_mamba_kernels": False,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 12},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {**_EXPERTS, "head_dim": 12},
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "seed_oss": {"head_dim": 12},
    "smollm3": {"num_hidden_layers": 4},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "zamba2": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "n_mamba_heads": 4,
        "chunk_size": 32,
        "use_mamba_kernels": False,
        "adapter_rank": 8,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:  # noqa: ANN401
    """Return the config of a model of two to twelve layers, 32 elements wide."""
    own = {**FAMILIES.get(family, {}), **changes}
    shared = {name: value for name, value in TINY.items() if name not in own}
    if "layers_block_type" in own or family == "xglm":
        shared.pop("num_hidden_layers", None)  # it follows from the other field
    return CONFIG_MAPPING[family](**shared, **own)


def tiny_model(family: str, **changes: Any) -> Any:  # noqa: ANN401
    """Return a seeded random model in float32, ready to run."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **changes))  # type: ignore[no-untyped-call]
    return model.float().eval()
