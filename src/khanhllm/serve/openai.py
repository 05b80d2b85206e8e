"""What clients of OpenAI's API send and read, as data; nothing here knows the model or the network.

https://platform.openai.com/docs/api-reference/completions
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from khanhllm.explain import explain
from khanhllm.schema import Sampling

MOST_PROMPTS = 64
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Positive = Annotated[int, Field(ge=1)]


class Refused(Exception):
    """A request that gets no answer but an error: its status, and one line that says why."""

    def __init__(self, status: int, text: str, code: str = "", param: str = "") -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The error as clients expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        found = {"message": str(self), "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": found}


class Asked(BaseModel):
    """What a request may ask for. Keys that are not known are ignored, as clients send many."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class StreamOptions(Asked):
    include_usage: bool = False


class Own(Asked):
    """Ours alone."""

    off: Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], Field(max_length=10_000)] = []
    """experts to do without, each as [layer, expert]"""
    routes: bool = False
    """tell with each choice which experts its tokens went to, and those of the prompt"""


class Writes(Asked):
    """What both kinds of completion share."""

    model: Annotated[str, Field(max_length=1000)] = ""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Sampling().temperature
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Sampling().top_p
    top_k: Annotated[int, Field(ge=-1, le=2**40)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Sampling().min_p
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    khanhllm: Own = Own()
    # What we cannot do may be sent with the value that asks for nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Writes):
    """A request to /v1/completions."""

    prompt: Any = ""
    """a text, ids, or a list of either; see `prompts`"""
    max_tokens: Annotated[int, Field(ge=0, le=10_000_000)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    suffix: Literal[""] = ""

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """Each prompt. Raises Refused for ids beyond the vocabulary, and for anything else than texts and ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given and all(type(one) is int for one in given):
            given = [given]
        elif not isinstance(given, list) or not given:
            raise _no_prompt()
        if len(given) > MOST_PROMPTS:
            raise Refused(400, f"prompt: at most {MOST_PROMPTS} prompts in a request, got {len(given)}", param="prompt")
        for one in given:
            if isinstance(one, list):
                check_ids(one, vocab_size, "prompt")
            elif not isinstance(one, str):
                raise _no_prompt()
        return given


class Chat(Writes):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: Literal[False] = False
    tools: Annotated[list[Any], Field(max_length=0)] = []
    functions: Annotated[list[Any], Field(max_length=0)] = []
    response_format: dict[Literal["type"], Literal["text"]] = {}

    @property
    def tokens(self) -> int | None:
        """The most that it may write; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens


class Tokenize(Asked):
    """A request to /tokenize."""

    prompt: str
    add_special_tokens: bool = False
    """begin with the end-of-text, as a document does"""


class Detokenize(Asked):
    """A request to /detokenize."""

    tokens: Annotated[list[int], Field(max_length=2**20)]


def _no_prompt() -> Refused:
    return Refused(400, "prompt: must be a text, a list of texts, ids, or a list of lists of ids", param="prompt")


def check_ids(ids: Iterable[Any], vocab_size: int, key: str) -> None:
    """Raise Refused for what is no id of the vocabulary."""
    for one in ids:
        if type(one) is not int or not 0 <= one < vocab_size:
            shown = ascii(one)[:60] if isinstance(one, int | str | float) else type(one).__name__
            raise Refused(400, f"{key}: each id must be a whole number below {vocab_size}, got {shown}", param=key)


Kind = TypeVar("Kind", bound=Asked)


def parsed(raw: bytes, kind: type[Kind]) -> Kind:
    """The body of a request. Raises Refused that names what is wrong. A key that is null counts as not given."""
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refused(400, f"the body is not valid JSON: {why}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    try:
        return kind.model_validate(_given(body))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])[:60]
        text = f"{key}: KhanhLLM cannot do this yet" if key in UNABLE[kind is Chat] else explain(error, kind, {})
        raise Refused(400, text.encode("ascii", "backslashreplace").decode(), param=key) from None


def _given(body: dict[str, Any]) -> dict[str, Any]:
    found = ((key, _given(value) if isinstance(value, dict) else value) for key, value in body.items())
    return {key: value for key, value in found if value is not None}


PENALTIES = {"frequency_penalty", "presence_penalty", "logit_bias"}
UNABLE = (PENALTIES | {"best_of", "suffix"}, PENALTIES | {"logprobs", "tools", "functions", "response_format"})
"""in a text, and in a conversation"""


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # more than Python reads, which takes a time that grows with their square
        raise Refused(400, "a number in the body is too long") from None


def dumped(value: Mapping[str, Any]) -> str:
    """As JSON in ASCII, so that half a surrogate pair from a client cannot break an answer."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def event(value: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {dumped(value)}\n\n"


class TextForm:
    """How an answer of /v1/completions is written."""

    prefix, whole_name, part_name = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def whole(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """One choice."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    part = whole
    """what is new in one choice"""

    @staticmethod
    def first(_index: int) -> dict[str, Any] | None:
        """What comes before the parts of a choice."""
        return None


class ChatForm:
    """How an answer of /v1/chat/completions is written."""

    prefix, whole_name, part_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def whole(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """One choice."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    @staticmethod
    def part(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """What is new in one choice."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    @staticmethod
    def first(index: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


Form = type[TextForm] | type[ChatForm]


DONE = "data: [DONE]\n\n"
ALIVE = ": \n\n"
"""a comment, which clients skip; it tells proxies that the connection lives"""


def usage(prompt: int, completion: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
