"""Conversations in the form that a model was trained on: its own Jinja template, rendered in a sandbox."""

import re
from collections.abc import Sequence

import tiktoken

from minipass.errors import InputError
from minipass.files import explained
from minipass.tokenizer import encode_text

MARK = "\ue000"  # put inside the names of special tokens in messages, to hide them; a private character of Unicode


def encode_chat(
    encoding: tiktoken.Encoding, template: str | None, messages: Sequence[dict[str, str]], *, answer: bool = True
) -> list[int]:
    """Token ids of a conversation, with answer up to where the model's answer begins.

    messages: each {"role": "user" | "assistant" | "system", "content": text}. The name of a special token in a message
    is plain text. Raises InputError when there is no template, when it fails, and without the package jinja2.
    """
    if not template:
        raise InputError("this model has no chat template: it was not trained for conversations")
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise InputError("conversations need the package jinja2: pip install -e '.[llama]'") from error
    for message in messages:
        if any("\ud800" <= c <= "\udfff" for c in message["content"]):
            raise InputError("a message must be UTF-8 text")
    specials = sorted(encoding.special_tokens_set, key=len, reverse=True)
    names = re.compile(f"({'|'.join(map(re.escape, specials))})")
    hidden = [
        m | {"content": names.sub(lambda found: found[0][0] + MARK + found[0][1:], m["content"])} for m in messages
    ]
    with explained("the model's chat template does not take this conversation"):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(template).render(messages=hidden, add_generation_prompt=answer)
    ids: list[int] = []
    for index, part in enumerate(names.split(text)):  # every second one is a special token
        if index % 2:
            ids.append(encoding.encode_single_token(part))
        else:
            ids += encode_text(encoding, part.replace(MARK, "")).tolist()
    return ids
