"""The architectures that graphs are written for: one entry each, and nothing else knows them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from build.graphs.bert import Bert, write_bert
from build.graphs.deberta_v2 import DebertaV2, write_deberta_v2
from build.graphs.decoder import (
    read_llama,
    read_llama_bidirectional,
    read_mistral,
    read_qwen2,
    read_qwen3,
    read_qwen3_vl,
    write_decoder,
)
from build.graphs.dimensions import Dimensions
from build.graphs.distilbert import read_distilbert, write_distilbert
from build.graphs.electra import read_electra
from build.graphs.gemma3 import Gemma3, write_gemma3
from build.graphs.gte import Gte, write_gte
from build.graphs.jina_bert import read_jina_bert, write_jina_bert
from build.graphs.jina_v3 import JinaV3, write_jina_v3
from build.graphs.modernbert import ModernBert, write_modernbert
from build.graphs.mpnet import read_mpnet, write_mpnet
from build.graphs.nomic_bert import NomicBert, write_nomic_bert
from build.graphs.onnx_graph import OnnxGraph
from build.graphs.scoring import (
    Logit,
    asked_logit,
    bert_logit,
    deberta_logit,
    distilbert_logit,
    electra_logit,
    last_token_logit,
    modernbert_logit,
    pooled_logit,
    roberta_logit,
)
from build.graphs.sparse import ROBERTAS, MaskedHead
from build.graphs.static import read_static, write_static
from build.graphs.t5 import T5, write_t5
from build.graphs.templates import MXBAI_RERANKER, NEMOTRON_RERANKER, QWEN3_RERANKER
from build.sources.checkpoint import JINA_BERT, JINA_FLASH, JINA_V3, JINAS_FLASH_CODE, MODEL2VEC, STATIC
from build.sources.settings import Settings
from build.sources.weights import Weights

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


@dataclass(frozen=True)
class Reranker:
    """What makes a score of an encoder's states."""

    logit: Logit
    template: dict[str, Any] | None = None
    """The text around query and passage, where they are not read as a pair."""
    is_worded: bool = False
    """Whether pairs of one score are read in words of a template, and what has several labels without any."""

    @property
    def is_instructed(self) -> bool:
        """Whether a call may say what it is that a passage is judged by."""
        return self.template is not None and not {"instruction", "instructed"}.isdisjoint(self.template)


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: how its configuration is read, how its graph is written, and what may be left unread."""

    model_type: str
    read: Callable[[Settings], Dimensions]
    write: Callable[[OnnxGraph, Any, Weights], None]
    """Of the graph, of what `read` gave, and of the tensors."""
    fixtures: tuple[str, ...]
    """Tiny checkpoints of it among the tests' references."""
    prefixes: tuple[str, ...] = ()
    """What heads put before the names of its tensors."""
    harmless: tuple[str, ...] = ()
    """Keys of its `config.json` that change no result, beside those of any."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors, without a prefix, that the reference does not use either."""
    rerankers: dict[str, Reranker] = field(default_factory=dict)
    """Class in `architectures` -> its head."""
    masked: dict[str, MaskedHead] = field(default_factory=dict)
    """Class in `architectures` -> the head of a masked language model, which gives sparse vectors."""
    unseen: bool = False
    """Whether its graph is written for tokens that are seen by none."""
    lexical: bool = False
    """Whether words are weighed by `sparse.LINEAR` where no head of a language model does it."""
    weighs: str = ""
    """What the names of a classifier of tokens start with, where it is that which weighs words."""
    text: str = ""
    """The key of `config.json` that is of the half that reads text, where another half is left out."""
    static: bool = False
    """Whether tensors say its sizes, and a token's vector does not depend on other tokens."""
    packed_attention: bool = True
    """Whether its attention also runs on packed tokens (`Runtime.packed_attention`). False where attention adds a
    bias to each score."""
    own_code: frozenset[str] = frozenset()
    """Modules of published checkpoints' own code that compute what its graph computes."""


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
BUFFERS = ("*position_ids", "*token_type_ids", "*rotary_emb.inv_freq")
LANGUAGE_HEADS = ("cls.*", "lm_head.*")
DEBERTAS_LANGUAGE_HEADS = ("cls.*", "lm_predictions.*", "mask_predictions.*")
POOLER = ("pooler.dense.*",)

ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture(STATIC, read_static, write_static, fixtures=("static",), static=True),
        Architecture(
            "bert",
            Bert.of,
            write_bert,
            fixtures=("bert-cls", "bert-cross-encoder"),
            unseen=True,
            prefixes=("bert.",),
            harmless=BERTS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"BertForSequenceClassification": Reranker(bert_logit)},
            masked={
                "BertForMaskedLM": MaskedHead(
                    dense="cls.predictions.transform.dense",
                    norm="cls.predictions.transform.LayerNorm",
                    decoder="cls.predictions.decoder",
                    bias="cls.predictions.bias",
                )
            },
        ),
        Architecture(
            "camembert",
            Bert.of_roberta,
            write_bert,
            fixtures=("camembert", "camembert-cross-encoder"),
            prefixes=("roberta.", "camembert."),
            harmless=BERTS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"CamembertForSequenceClassification": Reranker(roberta_logit)},
            masked={"CamembertForMaskedLM": ROBERTAS},
        ),
        Architecture(
            "deberta-v2",
            DebertaV2.of_deberta,
            write_deberta_v2,
            fixtures=("deberta", "deberta-cross-encoder"),
            prefixes=("deberta.",),
            harmless=(
                *("cls_dropout", "pooler_dropout", "legacy", "tie_word_embeddings"),
                # Of a convolution, which is refused by its size.
                *("conv_act", "conv_groups"),
            ),
            # Positions are left out of what the first layer reads.
            unused=(*BUFFERS, *POOLER, "embeddings.position_embeddings.weight", *DEBERTAS_LANGUAGE_HEADS),
            rerankers={"DebertaV2ForSequenceClassification": Reranker(deberta_logit)},
            packed_attention=False,
        ),
        Architecture(
            "distilbert",
            read_distilbert,
            write_distilbert,
            fixtures=("distilbert", "distilbert-cross-encoder"),
            prefixes=("distilbert.",),
            harmless=(
                *("dropout", "qa_dropout", "seq_classif_dropout", "tie_weights_", "tie_word_embeddings"),
                # How the table of positions was filled before the training; it is read as it is.
                "sinusoidal_pos_embds",
            ),
            unused=(*BUFFERS, "vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*"),
            rerankers={"DistilBertForSequenceClassification": Reranker(distilbert_logit)},
            masked={
                "DistilBertForMaskedLM": MaskedHead(
                    dense="vocab_transform",
                    norm="vocab_layer_norm",
                    decoder="vocab_projector",
                    bias="vocab_projector.bias",
                )
            },
        ),
        Architecture(
            "electra",
            read_electra,
            write_bert,
            fixtures=("electra", "electra-cross-encoder"),
            prefixes=("electra.",),
            harmless=(
                *("summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"),
                "tie_word_embeddings",
            ),
            unused=(*BUFFERS, "discriminator_predictions.*", "generator_predictions.*", "generator_lm_head.*"),
            rerankers={"ElectraForSequenceClassification": Reranker(electra_logit)},
        ),
        Architecture(
            "gemma3_text",
            Gemma3.of,
            write_gemma3,
            fixtures=("gemma3",),
            prefixes=("model.",),
            harmless=(
                "final_logit_softcapping",
                "_sliding_window_pattern",
                "cache_implementation",
                "tie_word_embeddings",
            ),
            unused=(*BUFFERS, *LANGUAGE_HEADS),
        ),
        Architecture(
            "gte",
            Gte.of,
            write_gte,
            fixtures=("gte",),
            prefixes=("new.", "gte."),
            harmless=GTES_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"GteForSequenceClassification": Reranker(bert_logit)},
            own_code=frozenset({"configuration_hf_alibaba_nlp_gte", "modeling_hf_alibaba_nlp_gte"}),
        ),
        Architecture(
            JINA_BERT,
            read_jina_bert,
            write_jina_bert,
            fixtures=("jina-bert", "jina-bert-code", "jina-reranker"),
            prefixes=("bert.",),
            harmless=(*BERTS_OWN, "model_max_length", "attn_implementation"),
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"JinaBertForSequenceClassification": Reranker(bert_logit)},
            packed_attention=False,
            own_code=frozenset({"configuration_bert", "modeling_bert"}),
        ),
        Architecture(
            JINA_V3,
            JinaV3.of,
            write_jina_v3,
            fixtures=("jina-v3",),
            prefixes=("roberta.",),
            harmless=JINAS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            own_code=frozenset({"configuration_xlm_roberta", "modeling_lora", "modeling_xlm_roberta"}),
        ),
        Architecture(
            JINA_FLASH,
            JinaV3.of_flash,
            write_jina_v3,
            fixtures=("jina-flash-reranker",),
            unseen=True,
            prefixes=("roberta.",),
            harmless=JINAS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"XLMRobertaForSequenceClassification": Reranker(roberta_logit)},
            own_code=JINAS_FLASH_CODE,
        ),
        Architecture(
            "llama",
            read_llama,
            write_decoder,
            fixtures=("llama",),
            prefixes=("model.",),
            rerankers={"LlamaForSequenceClassification": Reranker(last_token_logit, is_worded=True)},
            # How the training was laid out over machines.
            harmless=("pretraining_tp",),
            unused=(*BUFFERS, *LANGUAGE_HEADS),
        ),
        Architecture(
            "llama_bidirec",
            read_llama_bidirectional,
            write_decoder,
            fixtures=("nemotron-reranker",),
            prefixes=("model.",),
            harmless=("pretraining_tp",),
            unused=(*BUFFERS, *LANGUAGE_HEADS),
            rerankers={"LlamaBidirectionalForSequenceClassification": Reranker(pooled_logit, NEMOTRON_RERANKER)},
            own_code=frozenset({"llama_bidirectional_model"}),
        ),
        Architecture(
            "mistral",
            read_mistral,
            write_decoder,
            fixtures=("mistral",),
            prefixes=("model.",),
            rerankers={"MistralForSequenceClassification": Reranker(last_token_logit, is_worded=True)},
            unused=(*BUFFERS, *LANGUAGE_HEADS),
        ),
        Architecture(
            MODEL2VEC,
            read_static,
            write_static,
            fixtures=("model2vec", "model2vec-mapped"),
            # How it was distilled, and what its tensors say themselves; nobody reads `seq_length`.
            harmless=(
                *("tokenizer_name", "apply_pca", "apply_zipf", "sif_coefficient", "pooling", "seq_length"),
                *("hidden_dim", "embedding_dtype", "vocabulary_quantization"),
            ),
            static=True,
        ),
        Architecture(
            "modernbert",
            ModernBert.of,
            write_modernbert,
            fixtures=("modernbert", "modernbert-reranker"),
            unseen=True,
            prefixes=("model.",),
            harmless=(
                *("embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "cls_token_id"),
                *("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"),
                *("decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "tie_word_embeddings"),
                # Of BERT's configuration, read by nobody.
                *("layer_norm_eps", "position_embedding_type"),
            ),
            unused=(*BUFFERS, "head.*", "decoder.*"),
            rerankers={"ModernBertForSequenceClassification": Reranker(modernbert_logit)},
            masked={
                "ModernBertForMaskedLM": MaskedHead(
                    dense="head.dense",
                    norm="head.norm",
                    decoder="decoder",
                    bias="decoder.bias",
                    words="embeddings.tok_embeddings.weight",
                    biases=False,
                )
            },
        ),
        Architecture(
            "mpnet",
            read_mpnet,
            write_mpnet,
            fixtures=("mpnet", "mpnet-cross-encoder"),
            prefixes=("mpnet.",),
            harmless=("tie_word_embeddings",),
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"MPNetForSequenceClassification": Reranker(roberta_logit)},
            packed_attention=False,
        ),
        Architecture(
            "new",
            Gte.of_new,
            write_gte,
            fixtures=("new", "new-reranker"),
            prefixes=("new.",),
            harmless=GTES_OWN,
            # Read where words are weighed, and where it is a text's.
            weighs="classifier.",
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER, "classifier.*"),
            rerankers={"NewForSequenceClassification": Reranker(bert_logit)},
            own_code=frozenset({"configuration", "modeling"}),
        ),
        Architecture(
            "nomic_bert",
            NomicBert.of,
            write_nomic_bert,
            fixtures=("nomic-bert", "nomic-bert-moe"),
            prefixes=("bert.",),
            harmless=(
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
            ),
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            own_code=frozenset({"configuration_hf_nomic_bert", "modeling_hf_nomic_bert"}),
        ),
        Architecture(
            "qwen2",
            read_qwen2,
            write_decoder,
            fixtures=("mxbai-reranker", "qwen2"),
            prefixes=("model.",),
            unused=(*BUFFERS, *LANGUAGE_HEADS),
            rerankers={
                "Qwen2ForCausalLM": Reranker(partial(asked_logit, yes="1", no="0"), MXBAI_RERANKER),
                "Qwen2ForSequenceClassification": Reranker(last_token_logit, is_worded=True),
            },
            own_code=frozenset({"modeling_qwen"}),
        ),
        Architecture(
            "qwen3",
            read_qwen3,
            write_decoder,
            fixtures=("qwen3-classifier", "qwen3-embedding", "qwen3-reranker", "voyage"),
            prefixes=("model.",),
            unused=(*BUFFERS, *LANGUAGE_HEADS),
            rerankers={
                "Qwen3ForCausalLM": Reranker(partial(asked_logit, yes="yes", no="no"), QWEN3_RERANKER),
                "Qwen3ForSequenceClassification": Reranker(last_token_logit, QWEN3_RERANKER, is_worded=True),
            },
            own_code=frozenset({"modeling_qwen3_bidirectional"}),
        ),
        Architecture(
            "qwen3_vl",
            read_qwen3_vl,
            write_decoder,
            fixtures=("qwen3-vl-reranker",),
            prefixes=("model.language_model.",),
            text="text_config",
            # What stands in a text for a picture or a video, and what those are seen by.
            harmless=(
                *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                "vision_config",
            ),
            unused=(*BUFFERS, *LANGUAGE_HEADS, "model.visual.*"),
        ),
        Architecture(
            "roberta",
            partial(Bert.of_roberta, vocab_size=50265),
            write_bert,
            fixtures=("roberta", "roberta-cross-encoder"),
            prefixes=("roberta.",),
            harmless=BERTS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"RobertaForSequenceClassification": Reranker(roberta_logit)},
            masked={"RobertaForMaskedLM": ROBERTAS},
        ),
        Architecture(
            "t5",
            T5.of,
            write_t5,
            fixtures=("t5", "t5-gated"),
            harmless=(
                *("n_positions", "num_decoder_layers", "dropout_rate", "tie_word_embeddings"),
                "scale_decoder_outputs",
            ),
            # Of the half that writes text; the two have one table of words.
            unused=("decoder.*", "lm_head.*", "encoder.embed_tokens.weight"),
            packed_attention=False,
        ),
        Architecture(
            "xlm-roberta",
            Bert.of_roberta,
            write_bert,
            fixtures=("xlm-roberta", "cross-encoder"),
            lexical=True,
            prefixes=("roberta.",),
            harmless=BERTS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            rerankers={"XLMRobertaForSequenceClassification": Reranker(roberta_logit)},
            masked={"XLMRobertaForMaskedLM": ROBERTAS},
        ),
    )
}
"""`model_type` of config.json -> its entry; STATIC has no such file, and goes by its module."""
