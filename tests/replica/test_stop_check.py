"""Which token ends a request, and the text that is shown with it, on SmolLM2's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.model_config.file import load_model_config
from serve.protocol.messages import Delta
from serve.replica.output_processor import OutputProcessor
from serve.replica.sequence import Sequence
from serve.replica.stop_check import find_eos_token_ids
from serve.replica.token_ids import TokenIds
from serve.request import FinishReason, Request, SamplingParams, pack_ids
from tests.support.checkpoints import write_llama_checkpoint
from tests.tokenizer.test_tokenizer import smollm2

IM_END, ENDOFTEXT = 2, 0
STOP = FinishReason.STOP


def _run(
    text: str, *after: int, eos: tuple[int, ...] = (IM_END,), move_after: int = 0, **sampling: Any
) -> tuple[str, Delta, int]:
    """Feed the tokens of ``text`` and ``after`` them; return text, last delta, count of tokens."""
    tokenizer = smollm2()
    output_ids = [*tokenizer.encode(text), *after]
    params = SamplingParams(**({"max_tokens": len(output_ids)} | sampling))
    request = Request(id="r", prompt=pack_ids((5, 6)), sampling=params)
    processor = OutputProcessor(tokenizer, eos, lambda: 0.0)
    sequence = Sequence(
        request, number=0, decodes_here=move_after == 0, token_ids=TokenIds(request.prompt)
    )
    active = processor.start(sequence, decode_replica=0)
    shown = ""
    for count, token_id in enumerate(output_ids, 1):
        processed = processor.process(active, token_id)
        shown += processed.delta.text
        if processed.finished:
            return shown, processed.delta, count
        if count == move_after:
            assert processed.handover is not None
            sequence.decodes_here = True
            active = processor.resume(sequence, processed.handover.text, decode_replica=0)
    raise AssertionError("the request has not ended")


@pytest.mark.parametrize(("include", "text"), [(False, " Paris"), (True, " Paris.")])
def test_the_text_of_a_stop_token_is_shown_on_request(include: bool, text: str) -> None:
    shown, last, count = _run(
        " Paris. It", stop_token_ids=(30,), include_stop_str_in_output=include
    )
    assert (shown, last.finish_reason, last.stop_reason, count) == (text, STOP, 30, 2)


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(False, False, " Paris"), (True, False, " Paris<|im_end|>"), (True, True, " Paris")],
)
def test_the_text_of_eos_is_shown_on_request(include: bool, skip: bool, text: str) -> None:
    shown, last, _ = _run(
        " Paris", IM_END, 30, include_stop_str_in_output=include, skip_special_tokens=skip
    )
    assert (shown, last.finish_reason, last.stop_reason) == (text, STOP, None)


def test_a_stop_token_that_completes_a_stop_string_ends_the_text_there() -> None:
    fields: dict[str, Any] = {"stop": ("s.",), "stop_token_ids": (30,)}
    shown, last, _ = _run(" Paris. It", include_stop_str_in_output=True, **fields)
    assert (shown, last.stop_reason) == (" Paris.", "s.")
    shown, last, _ = _run(" Paris. It", **fields)
    assert (shown, last.stop_reason) == (" Paris", 30)


@pytest.mark.parametrize("move_after", [0, 1])
def test_a_stop_string_that_begins_within_min_tokens_is_found(move_after: int) -> None:
    shown, last, count = _run(" Paris. It", stop=("Paris.",), min_tokens=1, move_after=move_after)
    assert (shown, last.finish_reason, last.stop_reason, count) == (" ", STOP, "Paris.", 2)


@pytest.mark.parametrize("token_id", [IM_END, ENDOFTEXT])
def test_every_eos_ends_a_request_unless_ignored(token_id: int) -> None:
    eos = (ENDOFTEXT, IM_END)
    _, last, count = _run(" Paris", token_id, 30, eos=eos)
    assert (last.finish_reason, count) == (STOP, 2)
    _, last, count = _run(" Paris", token_id, 30, eos=eos, ignore_eos=True)
    assert (last.finish_reason, count) == (FinishReason.LENGTH, 3)
    _, last, count = _run(" Paris", token_id, 30, eos=eos, min_tokens=2)
    assert (last.finish_reason, count) == (FinishReason.LENGTH, 3)


def test_the_end_tokens_of_all_files_count(tmp_path: Path) -> None:
    """A fine-tune on a chat template that names its end token in one file only, a base model's."""
    config = write_llama_checkpoint(tmp_path, seed=1, eos_token_id=3)
    tokenizer = smollm2()
    assert tokenizer.eos_token_id == IM_END
    assert find_eos_token_ids(load_model_config(str(config)), tokenizer) == (3, IM_END)
    assert find_eos_token_ids(load_model_config(str(config)), None) == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    assert find_eos_token_ids(load_model_config(str(config)), tokenizer) == (4, 3, IM_END)


def test_an_end_token_that_the_model_lacks_does_not_count(tmp_path: Path) -> None:
    config = load_model_config(
        str(write_llama_checkpoint(tmp_path, seed=1, vocab_size=2, eos_token_id=[1, 9]))
    )
    assert find_eos_token_ids(config, smollm2()) == (1,)
