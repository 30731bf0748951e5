"""Talk to a running server with the OpenAI Python SDK (``pip install openai``).

    python examples/openai_client.py --base-url http://127.0.0.1:8000

The API key is read from ``OPENAI_API_KEY``; a server without ``--api-key`` accepts any.
"""

from __future__ import annotations

import argparse
import os

import openai
from openai import OpenAI

QUESTION = "What is the capital of France?"


def chat(client: OpenAI, model: str) -> None:
    """Ask a question and wait for the whole answer."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
    )
    choice = answer.choices[0]
    print(f"chat: {choice.message.content!r} ({choice.finish_reason})")


def chat_stream(client: OpenAI, model: str) -> None:
    """Ask the same question and collect the answer piece by piece."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        elif chunk.usage is not None:  # the last chunk has the usage and no choice
            print(f"streamed: {text!r} ({chunk.usage.completion_tokens} tokens)")


def complete_token_ids(client: OpenAI, model: str) -> None:
    """Send a prompt of token ids and read the ids of the answer.

    ``ignore_eos`` and ``return_token_ids`` are not OpenAI's, so the SDK needs ``extra_body``.
    """
    done = client.completions.create(
        model=model,
        prompt=[10, 20, 30],
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    extra = done.choices[0].model_extra or {}
    print(f"token ids: {extra['prompt_token_ids']} -> {extra['token_ids']}")


def handle_an_error(client: OpenAI, model: str) -> None:
    """Send a request that the server refuses. ``param`` names the field that is wrong."""
    try:
        client.completions.create(model=model, prompt="Hello", temperature=3.0)
    except openai.BadRequestError as error:
        reason = error.body["message"] if isinstance(error.body, dict) else error.message
        print(f"refused: {error.status_code}, {error.param}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests with the OpenAI Python SDK.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="(%(default)s)")
    parser.add_argument("--model", help="served name; default: the first that the server lists")
    args = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    # The SDK repeats a request by itself after a 429 or 503 and waits as Retry-After says.
    with OpenAI(base_url=f"{args.base_url}/v1", api_key=key) as client:
        model = args.model or next(iter(client.models.list())).id
        chat(client, model)
        chat_stream(client, model)
        complete_token_ids(client, model)
        handle_an_error(client, model)


if __name__ == "__main__":
    main()
