"""The architectures that graphs are written for, one entry each.

CONTRIBUTING.md lists the other places that know a `model_type`.
"""

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
    Reranker,
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
from build.graphs.unread import (
    BERTS_OWN,
    BUFFERS,
    DEBERTAS_LANGUAGE_HEADS,
    DEBERTAS_OWN,
    GTES_OWN,
    JINAS_OWN,
    LANGUAGE_HEADS,
    MODEL2VECS_OWN,
    MODERNBERTS_OWN,
    NOMICS_OWN,
    POOLER,
)
from build.sources.checkpoint import JINA_BERT, JINA_FLASH, JINA_V3, JINAS_FLASH_CODE, MODEL2VEC, STATIC
from build.sources.settings import Settings
from build.sources.weights import Weights


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: how its configuration is read, how its graph is written, and what may be left unread."""

    model_type: str
    read: Callable[[Settings], Dimensions]
    write: Callable[[OnnxGraph, Any, Weights], None]
    """write(graph, what `read` returned, weights)."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of tensor names in checkpoints that were saved with a head, such as `bert.`."""
    harmless: tuple[str, ...] = ()
    """Keys of its `config.json` that change no result, beside those of any."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors, without a prefix, that the reference does not use either."""
    rerankers: dict[str, Reranker] = field(default_factory=dict)
    """Class in `architectures` -> its head."""
    masked: dict[str, MaskedHead] = field(default_factory=dict)
    """Class in `architectures` -> the head of a masked language model, which gives sparse vectors."""
    unseen: bool = False
    """Whether its graph supports tokens that see others and are seen by none, as those that fill a query up."""
    lexical: bool = False
    """Whether a checkpoint may have bge-m3's layers in files of their own: `sparse_linear` for weights of words,
    `colbert_linear` for vectors of tokens."""
    word_classifier: str = ""
    """Prefix of the tensors of a token classifier that weighs words, such as `classifier.`; "" without one."""
    text: str = ""
    """Key of `config.json` with the text model's configuration, in models of text and pictures; "" in others."""
    static: bool = False
    """Whether tensors say its sizes, and a token's vector does not depend on other tokens."""
    packed_attention: bool = True
    """Whether its attention also runs on packed tokens (`Runtime.packed_attention`). False where attention adds a
    bias to each score."""
    own_code: frozenset[str] = frozenset()
    """Modules of published checkpoints' own code that compute what its graph computes."""
    cached: bool = False
    """Whether its graph is written with a cache, too, for models that write text: `build.graphs.generator`."""


ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture(STATIC, read_static, write_static, static=True),
        Architecture(
            "bert",
            Bert.of,
            write_bert,
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
            prefixes=("deberta.",),
            harmless=DEBERTAS_OWN,
            # Positions are left out of what the first layer reads.
            unused=(*BUFFERS, *POOLER, "embeddings.position_embeddings.weight", *DEBERTAS_LANGUAGE_HEADS),
            rerankers={"DebertaV2ForSequenceClassification": Reranker(deberta_logit)},
            packed_attention=False,
        ),
        Architecture(
            "distilbert",
            read_distilbert,
            write_distilbert,
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
            prefixes=("roberta.",),
            harmless=JINAS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            own_code=frozenset({"configuration_xlm_roberta", "modeling_lora", "modeling_xlm_roberta"}),
        ),
        Architecture(
            JINA_FLASH,
            JinaV3.of_flash,
            write_jina_v3,
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
            cached=True,
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
            prefixes=("model.",),
            rerankers={"MistralForSequenceClassification": Reranker(last_token_logit, is_worded=True)},
            unused=(*BUFFERS, *LANGUAGE_HEADS),
        ),
        Architecture(
            MODEL2VEC,
            read_static,
            write_static,
            harmless=MODEL2VECS_OWN,
            static=True,
        ),
        Architecture(
            "modernbert",
            ModernBert.of,
            write_modernbert,
            unseen=True,
            prefixes=("model.",),
            harmless=MODERNBERTS_OWN,
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
            prefixes=("new.",),
            harmless=GTES_OWN,
            # Read where words are weighed, and where it is a text's.
            word_classifier="classifier.",
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER, "classifier.*"),
            rerankers={"NewForSequenceClassification": Reranker(bert_logit)},
            own_code=frozenset({"configuration", "modeling"}),
        ),
        Architecture(
            "nomic_bert",
            NomicBert.of,
            write_nomic_bert,
            prefixes=("bert.",),
            harmless=NOMICS_OWN,
            unused=(*BUFFERS, *LANGUAGE_HEADS, *POOLER),
            own_code=frozenset({"configuration_hf_nomic_bert", "modeling_hf_nomic_bert"}),
        ),
        Architecture(
            "qwen2",
            read_qwen2,
            write_decoder,
            cached=True,
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
            cached=True,
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
