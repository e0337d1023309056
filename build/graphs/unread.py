"""What a checkpoint may say or hold that changes no result: keys of `config.json`, and names of tensors."""

from __future__ import annotations

HARMLESS = (
    # Where it came from, how it is stored, and what only training does.
    *(
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "tokenizer_class",
        "use_bfloat16",
    ),
    *("initializer_range", "initializer_factor", "gradient_checkpointing", "tf_legacy_loss", "torchscript"),
    *("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
    *(
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "language",
        "_commit_hash",
        "_attn_implementation",
    ),
    # Read where they matter: which class it was saved from, and what its classifier gives.
    *("architectures", "model_type", "id2label", "num_labels", "_num_labels"),
    # What is returned beside the result, and how it is computed but not what.
    *(
        "use_cache",
        "output_past",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "label2id",
        "prefix",
    ),
    # How cross-encoders make a score of their logit, read where there is one.
    *("sentence_transformers", "sbert_ce_default_activation_function"),
    # How language models write.
    *(
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
    ),
    *(
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
    ),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens", "is_encoder_decoder", "tie_encoder_decoder"),
    "cross_attention_hidden_size",
)
"""Keys of any `config.json` that change no result."""

BERTS_OWN = (
    # Of BERT's first checkpoints, for TensorFlow.
    *(
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
    ),
    "pooler_type",
    # Of those who trained it, read by nobody.
    *("emb_pooler", "emb_size", "uniem_embedding_strategy", "export_model_type", "tie_word_embeddings"),
)
DEBERTAS_OWN = (
    *("cls_dropout", "pooler_dropout", "legacy", "tie_word_embeddings"),
    # Of a convolution, which is refused by its size.
    *("conv_act", "conv_groups"),
)
GTES_OWN = (
    # How attention is computed, and what is only read where scores grow with a text's length.
    *("unpad_inputs", "use_memory_efficient_attention", "logn_attention_clip1"),
    *("matryoshka_dimensions", "tie_word_embeddings"),
)
JINAS_OWN = (
    *("emb_pooler", "matryoshka_dimensions", "tie_word_embeddings", "use_flash_attn", "use_reentrant"),
    # What training does with adapters, and what sentence-transformers' file has as prompts.
    *("lora_dropout_p", "lora_main_params_trainable", "task_instructions"),
)
MODEL2VECS_OWN = (
    # How it was distilled, and what its tensors say themselves; nobody reads `seq_length`.
    *("tokenizer_name", "apply_pca", "apply_zipf", "sif_coefficient", "pooling", "seq_length"),
    *("hidden_dim", "embedding_dtype", "vocabulary_quantization"),
)
MODERNBERTS_OWN = (
    *("embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "cls_token_id"),
    *("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"),
    *("decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "tie_word_embeddings"),
    # Of BERT's configuration, read by nobody.
    *("layer_norm_eps", "position_embedding_type"),
)
NOMICS_OWN = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "pad_vocab_size_multiple", "tie_word_embeddings"),
    *("dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "use_flash_attn", "use_xentropy"),
    *(
        "reorder_and_upcast_attn",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
    ),
    *("summary_type", "summary_use_proj", "add_pooling_layer"),
    # How experts were trained, and by which kernels.
    *("moe_impl", "moe_resid_pdrop", "router_aux_loss_coef"),
)
BUFFERS = ("*position_ids", "*token_type_ids", "*rotary_emb.inv_freq")
LANGUAGE_HEADS = ("cls.*", "lm_head.*")
DEBERTAS_LANGUAGE_HEADS = ("cls.*", "lm_predictions.*", "mask_predictions.*")
POOLER = ("pooler.dense.*",)
