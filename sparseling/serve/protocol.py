"""The requests: fields of the OpenAI API, and the extensions that this server has. Unknown fields are passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, Field(max_length=1000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream gives beside its text."""

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """The schema of `response_format`."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer must be. `regex` is an extension."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None


class GenerationRequest(BaseModel):
    """What chat and plain completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, description="Extension: only the k likeliest tokens; 0 is off.")
    min_p: float | None = Field(default=None, description="Extension: drop tokens less likely than so much of the likeliest; 0 is off.")
    repetition_penalty: float | None = Field(default=None, description="Extension: above 1 discourages repetition.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(default=None, description="Extension: the answer matches this regular expression.")
    routing: bool | Literal["all"] | None = Field(
        default=None, description="Extension: the experts of every answer token, layer by layer; \"all\": of the prompt's tokens too.")
    return_routed_experts: bool | None = Field(
        default=None, description="Extension: experts of all tokens read, base64 of little-endian int32 [tokens, MoE layers, k].")
    user: str | None = None


class FunctionCall(BaseModel):
    """A call that an assistant made."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCallMessage(BaseModel):
    """A tool call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(BaseModel):
    """A part of a message; only text can be read."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; all tools are functions."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    """The name in `tool_choice`."""

    name: str


class NamedTool(BaseModel):
    """A `tool_choice` that names its function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class TemplateOptions(BaseModel):
    """`chat_template_kwargs` as other servers take them."""

    enable_thinking: bool | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = Field(default=None, description="Extension: detailed thinking on or off.")
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. Text or token ids; special tokens may be written in text."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=128)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings. Text or token ids."""

    model: str | None = None
    input: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=512)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
