"""The fields of every request body: their names, types, ranges and defaults.

``null`` means a field's default. What depends on the model, for instance whether a token id is in
the vocabulary, is checked afterwards: see ``sampling_params``, ``prompts`` and ``call``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from serve.api.validation import InvalidField
from serve.config.sampling_defaults import RANGES
from serve.request import MAX_TOKEN_RULES

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as in OpenAI's API
MAX_CHOICES = 128  # of one prompt
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024  # of one stop string, because it travels with its request

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def _range(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


def _range_above(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(gt=low, le=high)


Int64 = Annotated[int, Meta(ge=_INT64_MIN, le=_INT64_MAX)]
Count = Annotated[int, Meta(ge=0, le=_INT64_MAX)]
PositiveInt = Annotated[int, Meta(ge=1, le=_INT64_MAX)]
TokenId = Annotated[int, Meta(ge=0)]

Temperature = Annotated[float, _range("temperature")]
TopP = Annotated[float, _range_above("top_p")]
TopK = Annotated[int, Meta(ge=-1, le=_INT64_MAX)]  # -1 and 0: all tokens
MinP = Annotated[float, _range("min_p")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, _range_above("repetition_penalty")]

StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)],
    Meta(
        description=f"a string or a list of at most {MAX_STOPS} strings, "
        f"each of 1 to {MAX_STOP_CHARACTERS} characters"
    ),
]
StopTokenIds = Annotated[
    list[TokenId],
    Meta(max_length=MAX_TOKEN_RULES, description=f"a list of at most {MAX_TOKEN_RULES} token ids"),
]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(
        max_length=MAX_TOKEN_RULES,
        description=f"an object of at most {MAX_TOKEN_RULES} token ids, "
        "each with a number in [-100, 100]",
    ),
]


class SamplingFields(Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop. None leaves the choice to the server or the model."""

    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None  # takes precedence over max_tokens
    min_tokens: Count = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty | None = None
    seed: Int64 | None = None
    stop: Stop = []
    stop_token_ids: StopTokenIds = []
    logit_bias: LogitBias = {}
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False


class StreamOptions(Struct, frozen=True, kw_only=True):
    """``stream_options``; ``continuous_usage_stats`` puts the usage so far into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(SamplingFields, frozen=True, kw_only=True):
    """The fields that ``/v1/completions`` and ``/v1/chat/completions`` share.

    ``default_max_tokens`` is for models that recommend none; None stands for the whole context.
    """

    default_max_tokens: ClassVar[int | None] = None

    model: str = ""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    best_of: Int64 = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_timeline: bool = False
    request_id: Any = None  # names the answer; ignored if it cannot be an id

    def __post_init__(self) -> None:
        if self.best_of not in (0, 1, self.n):
            raise InvalidField("best_of is not supported by this server", "best_of")
        if not self.stream and self.stream_options not in (None, StreamOptions()):
            raise InvalidField("stream_options is only allowed with stream", "stream_options")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream holds the usage so far."""
        options = self.stream_options
        return self.include_usage and options is not None and bool(options.continuous_usage_stats)


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of ``POST /v1/completions``.

    ``prompt`` is a string, strings, token ids or lists of token ids. A list can have 100,000 items
    and more, so ``prompts.read_prompts`` checks it, in slices and in a thread.
    """

    default_max_tokens: ClassVar[int | None] = DEFAULT_COMPLETION_TOKENS

    prompt: Any
    add_special_tokens: bool = True


class ChatCompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``.

    ``messages`` and ``chat_template_kwargs`` are checked in a thread, like ``prompt`` above.
    """

    messages: Any
    chat_template_kwargs: Any = {}
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # because chat templates write the special tokens themselves


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """The body of ``POST /tokenize``: a text, or messages for the chat template."""

    model: str = ""
    prompt: str | None = None
    messages: Any = None
    chat_template_kwargs: Any = {}
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None  # None: as the two endpoints above
    return_token_strs: bool = False

    def __post_init__(self) -> None:
        if self.prompt is None and self.messages is None:
            raise InvalidField("prompt or messages is required", "prompt")


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """The body of ``POST /detokenize``; ``tokens`` are checked like ``prompt`` above."""

    tokens: Any
    model: str = ""


class TextPart(Struct, frozen=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart], Meta(description="a string or a list of parts of type text")
]


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message of a chat."""

    role: str
    content: Content = ""
    tool_calls: Any = None
