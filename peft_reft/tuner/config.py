"""ReftConfig: the fields that a user sets, checked when the config is made."""

from __future__ import annotations

import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Optional, TypeVar, Union

from peft import PeftConfig, TaskType

from .card import introduce
from .chat_template import AUTO, FoundTemplate, search_with
from .forward.transformers_api import ACT2FN, end_ids, text_template
from .interventions.formulas import INTERVENTIONS
from .parameters.loading import check_file
from .peft_api import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_pattern_key
from .peft_type import NAME, add_peft_type
from .positions.spec import PositionSpec, Rules, depends_on_batch
from .positions.template import IdTemplate, TextTemplate
from .strength import is_strength
from .versions import installed


# The tasks whose labels are the tokens of answers. Those of other tasks are classes.
ANSWERING = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)

T = TypeVar("T", bound=type)


# The number of the format in which configs are saved. A version that adds a field by which an adapter edits otherwise
# raises it, and saves it as `reft_format`, so that older versions refuse what they would misread.
FORMAT = SCALE_FORMAT = 1  # 1: `scale`
# The key of a saved config that names this package. Nothing reads it: whoever opens the file learns what to install.
LIBRARY = "library"


class UnusableConfig(ValueError, TypeError):
    """An adapter_config.json that can't be used. A TypeError too, as PEFT's error for one without a required key."""


def _refuses_later_formats(config_class: T) -> T:
    """Class decorator: a saved config of a later format, with a field that this version does not know, raises a
    ValueError. PEFT would drop the field with a warning, and the adapter might then edit otherwise than it was trained
    to. Any other unknown field is left to PEFT's warning.
    """
    init = config_class.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {field.name for field in fields(config_class)}
        kwargs.pop(LIBRARY, None)
        unknown = {
            key: value for key, value in kwargs.items() if key not in known and value not in (None, False, [], {}, "")
        }
        # Only a saved config has "peft_type". One without a template was saved by a version that did not look for any:
        # its adapter was trained without.
        if "peft_type" in kwargs:
            kwargs.setdefault("response_template", None)
        later = kwargs.pop("reft_format", None) or 0
        if unknown and later > FORMAT:
            raise ValueError(
                "The saved config has "
                + ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()) if key != "reft_format")
                + f" and reft_format={later}: fields of a newer peft_reft, which may change what the adapter edits. "
                f"This version knows format {FORMAT}: upgrade peft_reft and PEFT."
            )
        init(self, *args, **kwargs)

    config_class.__init__ = checked  # type: ignore[misc]
    return config_class


def _described_by_its_docstring(config_class: T) -> T:
    """Class decorator: the text of a field's entry under Args becomes the field's `help` metadata, which parsers of
    command lines and YAML schemas show."""
    entries = re.findall(r"^ {4}(\w+) \(.+?\): ((?:.|\n {8})+)", inspect.getdoc(config_class) or "", re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    for one in fields(config_class):
        if one.name in texts:
            one.metadata = MappingProxyType({"help": texts[one.name]})
    return config_class


@_refuses_later_formats
@_described_by_its_docstring
@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a ReFT adapter (Representation Finetuning, arXiv 2404.03592).

    Args:
        r (`int`): Rank: the number of directions of the hidden state that an edit may change. At most the width of the
            edited modules.
        intervention (`str`): The edit: `"loreft"` (default), `"noreft"`, `"direft"`, `"nodireft"`, `"consreft"` or
            `"lobireft"`. The formulas stand in `peft_reft.tuner.interventions.formulas`. The paper's DiReFT is
            `"nodireft"`.
        positions (`str`): Which tokens to edit: `"f7+l7"` (default) the first 7 and the last 7 tokens of the prompt,
            `"f3"`, `"l1"`, or `"all"` for every token, of the prompt or not.
        share_weights (`bool`): Whether the first and the last tokens share their weights. Has no effect for one-sided
            positions and `"all"`, which have one set of weights in any case.
        dropout (`float`): Probability of dropout on the edited state, in training only, as in pyreft.
        act_fn (`str`, *optional*): Activation function of the source act(Wh + b), by its name in transformers
            (`"gelu"`, ...). None: the identity.
        add_bias (`bool`): Whether to learn b. The source of consreft and lobireft is b itself, so they need it.
        init_weights (`bool` or `"pyreft"`): True (default): the adapted model starts with exactly the base model's
            outputs, wherever the formula allows it. `"pyreft"`, or False: random weights, drawn as pyreft draws them.
        target_modules (`str` or `list[str]`, *optional*): The modules whose output is edited: names, or one regex, as
            in LoraConfig. Any module whose output is a tensor, or a tuple that starts with one. None takes the blocks
            of the model's main stack.
        exclude_modules (`str` or `list[str]`, *optional*): Names or one regex of modules to leave alone.
        layers_to_transform (`int` or `list[int]`, *optional*): Indices of the layers to edit, from 0. None edits all.
        layers_pattern (`str` or `list[str]`, *optional*): Name of the list of modules that `layers_to_transform`
            counts in, where a model has several.
        rank_pattern (`dict[str, int]`): Ranks that differ from `r`, by the names or regexes of modules, as in
            LoraConfig: `{"layers.0": 16, "layers.2[0-9]": 4}`. The first pattern that matches the end of a
            module's name decides.
        modules_to_save (`list[str]`, *optional*): Modules to train and save whole, a classifier head for example.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Ids of tokens, new ones for
            example, whose rows of the input embedding are trained and saved too, as in LoraConfig; or such ids by the
            name of an embedding. An output layer that is tied to the embedding shares the trained rows.
        response_template (`str` or `list[int]`, *optional*): The text, or its token ids, that stands before every
            answer: the end of a prompt as the model sees it, `"<|im_start|>assistant\\n"` or `"### Response:"` for
            example. ReFT then finds the prompts without labels, so they are the same in supervised training,
            preference training, multi-turn conversations and generation. A text is found whichever way the tokenizer
            splits it into tokens. `"auto"` (default): the token ids with which the chat template of the base model's
            tokenizer opens an answer. They are looked for on this machine when the adapter is made, and saved in
            place of `"auto"`; None where there are none. None: labels tell the prompts. Has no effect for `"all"`.
        response_template_optional (`bool`): Whether a training sequence may lack the response template: its labels
            then tell its prompt. `response_template="auto"` sets it where it finds a template.
        prompt_boundary (`str`): The prompts of a conversation of several turns. `"first"` (default): the tokens before
            the first answer are its one prompt. `"every"`: each turn has a prompt, whose last tokens are edited; the
            first tokens that are edited are the first of the conversation.
        tokenizer_name_or_path (`str`, *optional*): The tokenizer by which a text in `response_template` is found. None
            takes the base model's.
        scale (`float`): The strength s of the edit, h + s · (edit(h) − h), in training and after. As `lora_alpha` does
            for LoRA, it scales what the adapter adds. It is saved where it is not 1. `set_scale` and
            `rescale_adapter_scale` change the strength of a loaded adapter by a factor that is not saved; to save a
            strength, set `scale` in the adapter's config.
        subspaces (`dict[str, int]`, *optional*): Splits the r directions into named subspaces, `{"style": 4, "facts":
            4}` for r=8. An example trains and uses the subspaces that `subspaces` in its batch names.
        width (`int`, *optional*): Width of the edited modules: the size of the last dimension of their output. ReFT
            fills it in when the adapter is made and checks it when the adapter is loaded. Leave it out.

    Raises:
        ValueError: for a value that is not allowed, naming the field, the value, the allowed values and an example.
    """

    r: int = 8
    intervention: str = "loreft"
    positions: str = "f7+l7"
    share_weights: bool = False
    dropout: float = 0.0
    act_fn: Optional[str] = None
    add_bias: bool = True
    init_weights: Union[bool, Literal["pyreft"]] = True
    target_modules: Optional[Union[list[str], str]] = None
    exclude_modules: Optional[Union[list[str], str]] = None
    layers_to_transform: Optional[Union[list[int], int]] = None
    layers_pattern: Optional[Union[list[str], str]] = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: Optional[list[str]] = None
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = None
    response_template: Optional[Union[str, list[int]]] = AUTO
    response_template_optional: bool = False
    prompt_boundary: Literal["first", "every"] = "first"
    tokenizer_name_or_path: Optional[str] = None
    scale: float = 1.0
    subspaces: Optional[dict[str, int]] = None
    width: Optional[int] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        self._width_is_noted = self._template_is_noted = False
        if not _is_int(self.r) or self.r < 1:
            _reject("r", self.r, "a whole number of at least 1", "r=8")
        if self.intervention not in INTERVENTIONS:
            _reject("intervention", self.intervention, "one of " + ", ".join(INTERVENTIONS), "intervention='loreft'")
        PositionSpec.parse(self.positions)
        for name in ("share_weights", "add_bias", "response_template_optional"):
            if not isinstance(getattr(self, name), bool):
                _reject(name, getattr(self, name), "True or False", f"{name}=True")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            _reject("dropout", self.dropout, "a number from 0 up to, not including, 1", "dropout=0.05")
        if not is_strength(self.scale):
            _reject("scale", self.scale, "a finite number", "scale=1.0")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            _reject(
                "act_fn", self.act_fn, "None or an activation of transformers: " + ", ".join(ACT2FN), "act_fn='gelu'"
            )
        if self.init_weights not in (True, False, "pyreft"):
            _reject("init_weights", self.init_weights, "True, False or 'pyreft'", "init_weights=True")
        self._check_ranks()
        self._check_intervention()
        self._check_prompts()
        self._check_subspaces()
        self._check_modules()

    def _check_ranks(self) -> None:
        ranks = self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        fine = isinstance(ranks, dict) and all(isinstance(name, str) and name for name in ranks)
        if not fine or any(not _is_int(rank) or rank < 1 for rank in ranks.values()):
            _reject(
                "rank_pattern",
                ranks,
                "names or regexes of modules with ranks of at least 1",
                "rank_pattern={'layers.0': 16}",
            )
        if ranks and self.subspaces is not None:
            _reject(
                "rank_pattern",
                ranks,
                "empty with subspaces, whose sizes add up to r in every module",
                "rank_pattern={}",
            )

    def _check_intervention(self) -> None:
        intervention = INTERVENTIONS[self.intervention]
        if not intervention.has_source:
            if self.act_fn not in (None, "linear"):
                _reject("act_fn", self.act_fn, f"None: {self.intervention} has no activation", "act_fn=None")
            if not self.add_bias:
                _reject("add_bias", self.add_bias, f"True: the source of {self.intervention} is b", "add_bias=True")
        if self.dropout and not intervention.has_dropout:
            warnings.warn(f"dropout={self.dropout} has no effect: {self.intervention} has no dropout, as in pyreft.")

    def _check_prompts(self) -> None:
        template = self.response_template
        if isinstance(template, tuple):
            self.response_template = template = list(template)
        is_ids = isinstance(template, list) and all(_is_int(index) and index >= 0 for index in template)
        if template is not None and not ((isinstance(template, str) or is_ids) and len(template) > 0):
            _reject(
                "response_template",
                template,
                "'auto', None, the text that answers begin after, or its token ids",
                "response_template='<|im_start|>assistant\\n'",
            )
        given = template not in (None, AUTO)
        if given and self.task_type is not None and self.task_type not in ANSWERING:
            _reject(
                "response_template",
                template,
                f"None: with task_type={self.task_type!r} there are no answers, and all real tokens are the prompt",
                "response_template=None",
            )
        if self.prompt_boundary not in ("first", "every"):
            _reject("prompt_boundary", self.prompt_boundary, "'first' or 'every'", "prompt_boundary='every'")
        self._warn_of_turns()

    def _warn_of_turns(self) -> None:
        if self.prompt_boundary == "every" and self.response_template is None and not self.spec.all_tokens:
            warnings.warn(
                "prompt_boundary='every' without response_template: labels tell the turns in training, but nothing "
                "tells them in generate, which takes a whole conversation for one prompt. Set response_template for "
                "both to agree."
            )

    def _check_subspaces(self) -> None:
        groups = self.subspaces
        if groups is None:
            return
        if isinstance(groups, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in groups):
            self.subspaces = groups = dict(groups)  # to_dict saves it as a list of pairs
        named = isinstance(groups, dict) and bool(groups)
        if not named or any(not isinstance(name, str) or not name or "+" in name for name in groups):
            _reject(
                "subspaces",
                groups,
                "None, or names (without '+') with numbers of directions",
                "subspaces={'style': 8}",
            )
        if any(not _is_int(size) or size < 1 for size in groups.values()) or sum(groups.values()) != self.r:
            _reject(
                "subspaces",
                groups,
                f"whole numbers of at least 1 that add up to r={self.r}",
                f"r=8, subspaces={dict.fromkeys(('style', 'facts'), 4)}",
            )

    def _check_modules(self) -> None:
        self.layers_pattern = self.layers_pattern or None  # LoraConfig's may be "" or [] for none
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, value := sorted(value))
            allowed = value is None or isinstance(value, list) and all(isinstance(item, str) for item in value)
            if name != "modules_to_save":
                allowed = allowed or isinstance(value, str)
            if not allowed or (value is not None and len(value) == 0):
                _reject(name, value, "None, or names of modules", f"{name}=['mlp']")
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
        if any(not isinstance(ids, list) or not ids or any(not _is_int(i) or i < 0 for i in ids) for ids in lists):
            _reject(
                "trainable_token_indices",
                tokens,
                "None, a list of token ids, or such lists by the names of embeddings",
                "trainable_token_indices={'embed_tokens': [49152, 49153]}",
            )
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern is not None:
                _reject(
                    "layers_pattern", self.layers_pattern, "set only with layers_to_transform", "layers_pattern=None"
                )
            return
        indices = [layers] if not isinstance(layers, (list, tuple, range, set)) else list(layers)
        if not indices or any(not _is_int(index) or index < 0 for index in indices):
            _reject("layers_to_transform", layers, "None, or indices of layers from 0", "layers_to_transform=[8, 16]")
        if not isinstance(layers, int):  # one index stays as it was given, as in LoraConfig
            self.layers_to_transform = sorted(set(indices))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load the config of a saved adapter. PEFT calls this before it changes the model and loads the weights.

        The weights file in the same folder is checked against the config, so that weights that do not fit raise an
        error while the model is still unchanged. `PeftConfig.from_pretrained` reads the config alone.

        Raises:
            ValueError: when the config or the weights can't be read or do not fit each other, naming the file.
        """
        where = os.path.join(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableConfig(f"The adapter_config.json of {where!r} can't be used: {error}") from error
        if isinstance(config, cls):
            hub, _, _ = cls._split_kwargs(kwargs)
            check_file(pretrained_model_name_or_path, config, **{"subfolder": subfolder, **hub})
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config. PEFT calls this after it has saved the weights, in the same folder.

        The folder's model card gets a section that says how to load the adapter. A warning says so where the weights
        are a pickle (`safe_serialization=False`).
        """
        super().save_pretrained(save_directory, **kwargs)
        saved = [
            os.path.exists(os.path.join(save_directory, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        ]
        if saved == [False, True]:
            warnings.warn(
                f"The adapter is saved as a pickle, {os.path.join(save_directory, WEIGHTS_NAME)}: a kind of file "
                "that may hold code, which many tools refuse to read. It is read with weights_only=True, which runs "
                f"none. Leave safe_serialization=False out to save {SAFETENSORS_WEIGHTS_NAME}."
            )
        if any(saved):
            introduce(save_directory, self)

    @property
    def spec(self) -> PositionSpec:
        """The parsed `positions`."""
        return PositionSpec.parse(self.positions)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the batch decides which tokens are edited, or in which directions."""
        return depends_on_batch(self.spec, self.subspaces)

    def rules(self, tokenizer: Callable[[], Any], eos: Any, can_generate: bool) -> Rules:
        """How the adapter finds its tokens.

        Args:
            tokenizer (`Callable[[], PreTrainedTokenizerBase]`): Gives the tokenizer, where a template needs it. Raises
                ValueError where there is none.
            eos (`int` or `list[int]`, *optional*): The tokens at which the model's `generate` stops.
            can_generate (`bool`): Whether the model generates text. Decides, where the config has no task type,
                whether labels are the tokens of answers.

        Raises:
            ValueError: when the text of the template is not found in the tokens that the tokenizer makes of it.
        """
        reads_labels = can_generate if self.task_type is None else self.task_type in ANSWERING
        template: IdTemplate | TextTemplate | None = None
        optional, found = self.response_template_optional, FoundTemplate(None)
        if self.asked_template == AUTO:
            if reads_labels and not self.spec.all_tokens:
                found = search_with(tokenizer)
            template, optional = None if found.ids is None else IdTemplate(found.ids), found.ids is not None
        elif isinstance(self.response_template, str):
            template = text_template(self.response_template, tokenizer())
        elif self.response_template is not None:
            template = IdTemplate(self.response_template)
        return Rules(
            spec=self.spec,
            groups=self.groups,
            every=self.prompt_boundary == "every",
            template=template,
            template_optional=optional,
            why_no_template=found.reason,
            end_ids=end_ids(eos),
            reads_labels=reads_labels,
            subspaces=tuple((self.subspaces or {}).items()),
        )

    @property
    def asked_template(self) -> str | list[int] | None:
        """The `response_template` that was asked for: `"auto"`, too, where the config has what was found for it."""
        return AUTO if self._template_is_noted else self.response_template

    def note_template(self, ids: list[int] | None) -> None:
        """Fill in what `response_template="auto"` found, so that it is saved: token ids, or None.

        It stays `"auto"` for the next adapter that the same config makes, whose model may have another tokenizer.
        """
        self._template_is_noted = True
        self.response_template, self.response_template_optional = ids, ids is not None
        self._warn_of_turns()

    @property
    def groups(self) -> int:
        """G, the number of sets of weights of a module: 2 for untied first and last tokens, else 1."""
        return self.spec.groups(self.share_weights)

    def rank_of(self, module_name: str) -> int:
        """The rank of the edit of a module of that name."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), self.r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, and the name of this package. `subspaces` becomes a list of pairs: PEFT sorts
        the keys of dictionaries, and the order of the subspaces decides which directions each has. `scale` is left out
        where it is 1, and is else marked as a field that older versions must not pass over."""
        fields = super().to_dict()
        fields[LIBRARY] = {
            "name": "peft-reft",
            "version": installed("peft-reft"),
            "install": "pip install peft-reft",
        }
        if fields["scale"] == 1:
            del fields["scale"]
        else:
            fields["reft_format"] = SCALE_FORMAT
        if self.subspaces is not None:
            fields["subspaces"] = [list(pair) for pair in self.subspaces.items()]
        return fields

    @property
    def asked_width(self) -> int | None:
        """The width that the modules to edit must have: set by the user, or that of a saved adapter. None: any
        width."""
        return None if self._width_is_noted else self.width

    def note_width(self, widths: set[int]) -> None:
        """Fill in `width`, so that it is saved: the width of the edited modules, or None where they have several.

        A width that was filled in is no demand: the same config may make an adapter for a model of another width next.
        """
        self._width_is_noted = self.asked_width is None
        self.width = next(iter(widths)) if len(widths) == 1 else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _reject(name: str, value: Any, allowed: str, example: str) -> None:
    raise ValueError(f"{name}={value!r} is not allowed in ReftConfig. Allowed: {allowed}. Example: {example}.")


def own_fields() -> dict[str, Field]:
    """The fields that ReftConfig adds to PEFT's own, by name: the one table from which other lists of them are
    made."""
    inherited = {one.name for one in fields(PeftConfig)}
    return {one.name: one for one in fields(ReftConfig) if one.name not in inherited}
