"""What makes the models of `zoo` tiny: sizes for every family, and what a family needs besides."""

from __future__ import annotations

from typing import Any

NOT_MOE = {"granite_docling": "its router chooses a resolution, there are no experts"}
"""Modules that have a class called router and no MoE layer."""

NO_DECODE = {"openai_privacy_filter"}
"""Families without a cache: selection takes a prefill strategy."""

DENOISING = {"diffusion_gemma"}
"""Families that work on a canvas of tokens over a filled cache: decode, if `max_decode_q` says so."""

CLASSES = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "llama4": "Llama4ForCausalLM",
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "vitpose_backbone": "VitPoseBackbone",
    "vitpose": "VitPoseForPoseEstimation",
}
"""Which class is built, where it is not the first that generates."""

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "sliding_window": 8,
    # experts
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_top_k": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "top_k_experts": 3,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention, and indexers of sparse attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 16,
    # linear attention and state spaces
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    # towers
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
    "depth": 1,
    "num_heads": 4,
}
"""Set wherever a configuration has them. Layers, experts and rows are few, yet enough to share."""

_LINEAR = ["linear_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8}
_GEMMA = {
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "top_k_experts": 3,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR},
    "beam": {"n_group": 4, "topk_group": 2},
    "dbrx": {
        "d_model": 32,
        "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
        "vision_config": {
            "sam_config": {"output_channels": 16, "global_attn_indexes": [1], "downsample_channels": [16, 32]}
        },
    },
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", *["moe"] * 3],
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "diffusion_gemma": {"text_config": _GEMMA, "canvas_length": 4},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 4},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
        "text_config": {"use_sliding_window": False, "shared_experts_intermediate_size": 16},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "text_config": {
            **_GEMMA,
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": None,
        "audio_config": None,
    },
    "glm4v_moe": {"text_config": {"head_dim": 16, "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5}}},
    "glm5_next": {
        "text_config": {"qk_rope_head_dim": 0, "index_kpool": 4, "linear_head_dim": 8, "linear_num_heads": 4},
        "vision_config": {"projection_intermediate_size": 16},
    },
    "granitemoehybrid": {"layer_types": _LINEAR},
    "hy_v4_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"max_image_size": 16}},
    "inkling": {"text_config": _SWA},
    "inkling2": {"text_config": {**_SWA, "unpadded_vocab_size": 96}, "vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"text_config": {**_SWA, "unpadded_vocab_size": 96}, "vision_config": {"text_hidden_size": 32}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {"layer_types": _LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4": {"intermediate_size_mlp": 16, "no_rope_layer_interval": 2, "attention_chunk_size": 16},
    "longcat_flash": {"num_layers": 3, "zero_expert_num": 4},
    "mimo_v2_flash": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            kind: {**_ROPE, "partial_rotary_factor": 1.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "mistral4": {
        "rope_parameters": {
            **_ROPE,
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "muse_spark": {
        "audio_config": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "text_config": {"moe_hidden_size": 32},
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_groups": 2},
    "nllb_moe": {
        "decoder_layers": 2,
        "encoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 4,
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
        }
    },
    "switch_transformers": {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "d_ff": 16,
        "d_kv": 8,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"output_channels": 16, "global_attn_indexes": [1], "downsample_channels": [16, 32]}
        }
    },
    "vitpose_backbone": {"image_size": [16, 16], "patch_size": [4, 4], "num_experts": 2, "part_features": 8},
    "qwen3_omni_moe": {
        "vision_start_token_id": 90,
        "audio_config": {"downsample_hidden_size": 16},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
OPTIONS["nemotron_h_omni"] = {
    "text_config": OPTIONS["nemotron_h"],
    "vision_config": {"video_temporal_patch_size": 2},
    "audio_config": None,
}
OPTIONS["nemotron3_5_transcribe"] = {
    "text_config": OPTIONS["nemotron_h"],
    "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
    "word_timestamp_config": {"blank_token_id": 95},
}
OPTIONS["vitpose"] = {"backbone_config": OPTIONS["vitpose_backbone"]}
