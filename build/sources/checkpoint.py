"""A checkpoint is data: a folder with `config.json`, safetensors weights and tokenizer files, checked by hash."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from build.errors import BuildError
from build.sources.files import WEIGHTS, is_listed, own_file
from build.sources.quantised import Quantised
from build.sources.settings import Settings, read_json
from build.sources.tokenizer_file import of_its_class, put_behind, read_tokenizer, without_ends
from build.sources.vocabularies import ADDED_TOKENS, CLASSES, SPECIAL_TOKENS, TOKENIZER_CONFIG, convert, token
from build.sources.weights import Weights

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
WINDOWS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where sentence-transformers keeps what it says of the transformer; the first that is there holds."""
LIBRARY = "sentence_transformers."
JINA_V3 = "jina_embeddings_v3"
"""What transformers calls the architecture that Jina's own code for XLM-RoBERTa with adapters computes."""
JINAS_CODE = "modeling_lora"
JINA_FLASH = "xlm_roberta_flash"
"""That code without adapters, by the name of its repository; transformers has it as v3 where it is rotary."""
JINAS_FLASH_CODE = frozenset({"configuration_xlm_roberta", "modeling_xlm_roberta"})
JINAS_MODULE = "custom_st.Transformer"
"""Its class in `modules.json`."""
PYLATE = "pylate.models.Dense.Dense"
"""The one class of PyLate's in `modules.json`."""
STANFORD = "HF_ColBERT"
"""The class of Stanford's own ColBERT."""
METADATA = "artifact.metadata"
"""Where it keeps its settings."""
JINA_BERT = "jina_bert"
CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers keeps what it writes a chat with."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of others, each by its name."""
SPLADE = "SpladePooling"
"""The kind of module that makes sparse vectors."""
MASK = "MultiVectorMask"
"""The kind of module that says of which tokens the vectors count, where a text has one for each."""
TRANSFORMERS = ("Transformer", "MLMTransformer")
"""Kinds of modules that run the transformer; older sparse models have one of their own for their head."""
STATIC = "StaticEmbedding"
"""The kind of module that takes a transformer's place where tokens have a vector each; and that architecture."""
MODEL2VEC = "model2vec"
"""The same as its own library calls it in `config.json`."""


@dataclass(frozen=True)
class Module:
    """One entry of `modules.json`."""

    kind: str
    """Its class: `Transformer`, `Pooling`, `Dense`, `Normalize`, ..."""
    path: str
    """Its folder in the checkpoint's."""


class Unread(Protocol):
    """Tensors that remember which of them were read."""

    def unread(self) -> Iterator[tuple[str, str]]:
        """Each that was not, with a sentence on it."""
        ...


class Checkpoint:
    """Reads one checkpoint folder in the layout of transformers and sentence-transformers.

    It remembers all that was read, so that `unread_settings` and `unread_tensors` can name the rest.
    """

    def __init__(self, folder: Path, downloaded: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.downloaded = downloaded or {}
        """File -> sha256, where the catalog could not say it beforehand."""
        self._settings: dict[Path, Settings] = {}
        self._weights: list[Unread] = []
        self._is_remade = False

    def settings(self, path: Path) -> Settings:
        """The JSON object in a file of the checkpoint; raises BuildError when it is missing or broken."""
        if path not in self._settings:
            self._settings[path] = Settings(path, read_json(own_file(path, self.folder)))
        return self._settings[path]

    def weights(
        self,
        folder: Path,
        prefixes: Sequence[str] = (),
        harmless: Sequence[str] = (),
        quantised: Quantised | None = None,
        file: str = WEIGHTS,
    ) -> Weights:
        """The tensors in one folder of the checkpoint, or in one `file` of it."""
        weights = Weights(folder, self.folder, prefixes, harmless, quantised, file)
        self._weights.append(weights)
        return weights

    def account(self, settings: Settings, weights: Unread) -> None:
        """Has what else the checkpoint says and holds, in files of another kind, asked what was left unread."""
        self._settings[settings.path] = settings
        self._weights.append(weights)

    def unread_settings(self) -> Iterator[tuple[str, str]]:
        """Each key of the files that were read which nobody has read, with a sentence on it."""
        for settings in self._settings.values():
            yield from settings.unread()

    def unread_tensors(self) -> Iterator[tuple[str, str]]:
        """The same for tensors."""
        for weights in self._weights:
            yield from weights.unread()

    @cached_property
    def modules(self) -> list[Module]:
        """What `modules.json` lists, [] where there is none; BuildError for a module with code of its own."""
        path = self.folder / MODULES
        if not is_listed(path):
            return []
        listed = read_json(own_file(path, self.folder))
        if not isinstance(listed, list):
            raise BuildError(f"{path} must hold a JSON list of modules")
        items = [Settings(path, item, f"[{i}].") for i, item in enumerate(listed)]
        names = [item.word("name", default=str(i)) for i, item in enumerate(items)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BuildError(f"{path} lists two modules called {twice!r}, of which the reference keeps the last")
        return [self._module(item) for item in items]

    def _module(self, item: Settings) -> Module:
        library, _, kind = item.word("type").rpartition(".")
        path = item.word("path", default="").removeprefix("./").removesuffix("/")
        path = "" if path == "." else path
        code = self.folder / path / "config.json"
        is_jinas = item.word("type") == JINAS_MODULE and JINAS_CODE in own_code(self.settings(code))
        if not (f"{library}.".startswith(LIBRARY) or item.word("type") == PYLATE or is_jinas):
            raise BuildError(
                f"{item.path} has a module of type {library}.{kind}: code of its own computes it, which is "
                "never run; "
                "build it from an exported graph with --onnx"
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise BuildError(f"{item.path} has a module at {path!r}, which is outside the checkpoint")
        item.skip(["idx", "name"])
        # Names of arguments that a call of the reference may have for it.
        item.require("kwargs", [], *([["task"]] if is_jinas else []))
        self._settings[item.path / item.word("name", default=kind)] = item
        return Module(kind, path)

    @cached_property
    def transformer(self) -> Path:
        """The folder of the transformer: the checkpoint's own, or one in it, as `0_Transformer`."""
        first = self.modules[0] if self.modules else None
        return self.folder / first.path if first and first.kind in (*TRANSFORMERS, STATIC) else self.folder

    @property
    def begins_static(self) -> bool:
        """Whether sentence-transformers' STATIC is its first module, beside which a `config.json` is rare."""
        return bool(self.modules) and self.modules[0].kind == STATIC

    @cached_property
    def config(self) -> Settings:
        """`config.json`, which sentence-transformers' STATIC has not."""
        path = self.transformer / "config.json"
        if not self.begins_static:
            return self.settings(path)
        said = read_json(own_file(path, self.folder)) if is_listed(path) else {}
        is_its_own = Settings(path, said).find("model_type") == MODEL2VEC
        return self.settings(path) if is_its_own else Settings(path, {"model_type": STATIC})

    @property
    def is_model2vec(self) -> bool:
        """Whether model2vec is the reference, which reads `config.json` and puts nothing before it."""
        return self.model_type == MODEL2VEC

    @property
    def is_static(self) -> bool:
        """Whether tokens have a vector each; of the tokenizer's files the reference then reads one alone."""
        return self.model_type in (STATIC, MODEL2VEC)

    @cached_property
    def model_type(self) -> str:
        """What transformers calls the architecture; those of Jina's are called otherwise in files."""
        for code, name in (({JINAS_CODE}, JINA_V3), (JINAS_FLASH_CODE, JINA_FLASH)):
            if code <= own_code(self.config):
                self.config.require("model_type", "xlm-roberta")
                return name
        said = self.config.word("model_type", default="")
        is_alibi = said == "bert" and self.config.find("position_embedding_type") == "alibi"
        return JINA_BERT if is_alibi else said

    @cached_property
    def architecture(self) -> str:
        """The transformers class that the checkpoint was saved from, as `BertForSequenceClassification`; or ""."""
        return (self.config.words("architectures", default=[]) or [""])[0]

    @cached_property
    def tokenizer_config(self) -> Settings:
        """`tokenizer_config.json`, without a key where it is missing."""
        path = self.transformer / TOKENIZER_CONFIG
        return self.settings(path) if is_listed(path) and not self.is_static else Settings(path, {})

    @cached_property
    def tokenizer_class(self) -> str:
        """The class that transformers 5 reads the tokenizer by, as `BertTokenizer`; or ""."""
        # DistilBERT's class is BERT's by another name.
        said = self.tokenizer_config.find("tokenizer_class") or self.config.find("tokenizer_class")
        return str(said or CLASSES.get(self.model_type, "")).removesuffix("Fast").removeprefix("Distil")

    @cached_property
    def mask_token(self) -> str:
        """What stands for a hidden word, "" where nothing does."""
        return self.named_token("mask")

    def named_token(self, name: str) -> str:
        """The special token that is called so in the tokenizer's files, "" where none is."""
        key = f"{name}_token"
        said = self.special_tokens.find(key) or self.tokenizer_config.find(key)
        return str(said.get("content", "") if isinstance(said, dict) else said or "")

    def named_tokens(self, names: Iterable[str]) -> dict[str, str]:
        """`bos_token` and so on -> those of the special tokens that there are."""
        found = {f"{name}_token": self.named_token(name) for name in names}
        return {name: token for name, token in found.items() if token}

    @cached_property
    def special_tokens(self) -> Settings:
        """`special_tokens_map.json` where transformers reads it, which goes before `tokenizer_config.json`."""
        return self._older(SPECIAL_TOKENS)

    @cached_property
    def added_tokens(self) -> Settings:
        """`added_tokens.json` where transformers reads it: token -> id."""
        return self._older(ADDED_TOKENS)

    def _older(self, name: str) -> Settings:
        path = self.transformer / name
        is_read = is_listed(path) and not self.is_static and "added_tokens_decoder" not in self.tokenizer_config
        return self.settings(path) if is_read else Settings(path, {})

    @cached_property
    def feeds_token_types(self) -> bool:
        """Whether the reference tells its model which text of a pair a token is of."""
        return "token_type_ids" in self.tokenizer_config.words("model_input_names", default=["token_type_ids"])

    @cached_property
    def window(self) -> Settings | None:
        """What sentence-transformers says of the transformer."""
        paths = [path for name in WINDOWS if is_listed(path := self.transformer / name)]
        return self.settings(paths[0]) if paths and not self.is_static else None

    def max_tokens(self, positions: int, asked: int | None = None, least: int = 0) -> int:
        """The longest text in tokens, special tokens included, as sentence-transformers reads it, or as `asked`.

        What the checkpoint says is for texts without a word on them; those of a side may have `least`. Raises
        BuildError where the checkpoint or the caller asks for more than there are `positions`.
        """
        longest = positions
        said = self.window.find("max_seq_length") if self.window is not None else None
        model_max = self.tokenizer_config.find("model_max_length", "max_len")
        if said is not None and self.window is not None:
            said = self.window.integer("max_seq_length")
            if said > positions and asked is None:
                raise BuildError(
                    f"{self.window.path} has max_seq_length {said}, but the encoder has {positions} positions: "
                    f"say --max-tokens {positions} or fewer"
                )
            longest = min(said, positions)
        elif isinstance(model_max, int | float) and model_max >= 1:  # 1e30 stands for none
            longest = int(min(model_max, positions))
        longest = max(longest, least)
        if asked is not None and not 0 < asked <= longest:
            raise BuildError(f"{asked} tokens were asked for, but {self.folder} takes 1 to {longest}")
        return asked or longest

    @cached_property
    def library(self) -> Settings:
        """`config_sentence_transformers.json`, without a key where it is missing."""
        path = self.folder / PROMPTS
        return self.settings(path) if is_listed(path) else Settings(path, {})

    @property
    def is_pylate(self) -> bool:
        """Whether it is a ColBERT in PyLate's layout."""
        kinds = [module.kind for module in self.modules]
        is_own = self.library.find("model_type") == "ColBERT" or "query_prefix" in self.library
        return is_own and bool(kinds) and MASK not in kinds and "Pooling" not in kinds

    @property
    def is_stanford(self) -> bool:
        """Whether it is a ColBERT in the layout of Stanford's own code."""
        return not self.modules and self.architecture == STANFORD

    @property
    def gives_vectors(self) -> bool:
        """Whether it was trained to give a vector for each token."""
        return self.is_pylate or self.is_stanford or MASK in [module.kind for module in self.modules]

    @property
    def is_cross_encoder(self) -> bool:
        """Whether sentence-transformers' CrossEncoder takes all modules, and not the transformer alone."""
        return bool(self.modules) and self.library.find("model_type") == "CrossEncoder"

    @cached_property
    def chat(self) -> Settings | None:
        """What sentence-transformers is told of pairs that it reads in the words of a chat's template."""
        said = self.window.find("modality_config") if self.window is not None else None
        if self.window is None or not self.is_cross_encoder or not isinstance(said, dict) or "message" not in said:
            return None
        modality = self.window.inner("modality_config")
        return modality.inner("message") if modality is not None else None

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Prompt name -> what is put before the text: the checkpoint's own, and two that every model has.

        The one named "" is for calls that name none.
        """
        path, said = self.folder / PROMPTS, self.library
        # What scores are made with is read where there are some.
        said.skip(["__version__", "similarity_fn_name", "activation_fn", "requirements"])
        said.require(
            "model_type", "SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder", "ColBERT"
        )
        said.require("max_active_dims", None)
        own = {}
        if (prompts := said.inner("prompts")) is not None:
            own = {name: prompts.word(name) for name in prompts}
        # Nomic's names for the two; an empty one beside them is only sentence-transformers' default.
        both = {side: own.get(side) or own.get(f"search_{side}", "") for side in ("query", "document")}
        default = said.word("default_prompt_name", default="")
        if default and default not in own:
            raise BuildError(f"{path} has default_prompt_name {default!r}, but no such prompt")
        return own | both | ({"": own[default]} if default else {})

    @cached_property
    def truncate_dim(self) -> int | None:
        """To how many dimensions the reference cuts what the modules give; None for not at all."""
        return self.library.integer("truncate_dim") if "truncate_dim" in self.library else None

    @cached_property
    def is_ended_by_code(self) -> bool:
        """Whether gte-Qwen2's own code puts a token behind each text, and `tokenizer.json` does not."""
        said = self.tokenizer_config
        return own_code(said) == {"tokenization_qwen"} and said.flag("add_eos_token", default=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """`tokenizer.json`, or what is made of a vocabulary where there is none; BuildError for a broken one."""
        path = self.transformer / "tokenizer.json"
        if not is_listed(path):
            return convert(self.transformer, self.folder, self.tokenizer_class)
        content = self.settings(path)
        content.skip(content)
        tokenizer = read_tokenizer(content)
        if self.is_static:
            served = without_ends(tokenizer)
        else:
            if self.is_ended_by_code:
                put_behind(tokenizer, token(self.tokenizer_config, "eos_token").content)
            served = of_its_class(tokenizer, content, self.tokenizer_class, self.folder)
        self._is_remade = self.is_ended_by_code or served is not tokenizer
        return served

    @cached_property
    def tokenizer_steps(self) -> dict[str, Any]:
        """What `tokenizer` does one after the other, as a `tokenizer.json` of it has it."""
        steps: dict[str, Any] = json.loads(self.tokenizer.to_str())
        return steps

    @cached_property
    def made_tokenizer(self) -> str | None:
        """What is served in place of `tokenizer.json`, None for that file itself."""
        tokenizer = self.tokenizer
        is_file = is_listed(self.transformer / "tokenizer.json") and not self._is_remade
        return None if is_file else tokenizer.to_str()


def own_code(said: Settings) -> set[str]:
    """The modules of a checkpoint's own code that its `auto_map` names, wherever they are kept."""
    values = said.find("auto_map") or {}
    lists = values.values() if isinstance(values, dict) else [values]
    names = [name for value in lists for name in (value if isinstance(value, list) else [value]) if name]
    return {str(name).rpartition("--")[2].partition(".")[0] for name in names}
