"""Incremental text equals decoding all ids at once, for any handover and any stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.protocol.messages import DetokenizerState
from serve.request import SamplingParams
from serve.tokenizer.detokenizer import Detokenizer, TextPiece
from serve.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.test_tokenizer import smollm2, train_sentencepiece

VOCAB = 49152
EMOJI = "🙂👩‍🚀é東"
STOPS = ("a", "b", "ab", "aab", "ba", "🙂", " ", "abab", "\n")
ALPHABET = "aab b🙂\n"

any_ids = st.lists(
    st.one_of(
        st.integers(0, VOCAB - 1),
        st.integers(0, 16),  # special tokens
        st.integers(VOCAB, VOCAB + 1000),  # beyond the vocabulary
        st.text(EMOJI, min_size=1, max_size=3),
        st.binary(min_size=1, max_size=4),  # as single-byte tokens: mostly invalid UTF-8
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama")
    train_sentencepiece(directory)
    return load_tokenizer(str(directory), str(directory), None)


def _params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=1000, **changes)  # type: ignore[arg-type]


def _flatten(parts: list[int | str | bytes]) -> list[int]:
    tokenizer = smollm2()
    byte_ids = {piece[0]: i for i, piece in enumerate(tokenizer.pieces(True)) if len(piece) == 1}
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, str):
            ids.extend(tokenizer.encode(part))
        else:
            ids.extend(byte_ids[b] for b in part if b in byte_ids)
    return ids


def _run(
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    ids: list[int],
    prompt_ids: tuple[int, ...] = (),
    handovers: frozenset[int] = frozenset(),
) -> tuple[str, str | None, int]:
    """Return the whole text, the stop string, and the number of tokens until then."""
    output = Detokenizer(tokenizer, sampling, prompt_ids)
    text = ""
    for count, token_id in enumerate(ids, 1):
        if count in handovers:
            output = Detokenizer.resume(tokenizer, sampling, output.state())
        piece = output.push(token_id)
        text += piece.text
        if piece.stop is not None:
            return text, piece.stop, count
    return text + output.finish(), None, len(ids)


@settings(max_examples=300, deadline=None)
@given(parts=any_ids, skip=st.booleans(), handovers=st.frozensets(st.integers(1, 40)))
def test_joined_pieces_are_the_whole_decoded(
    parts: list[int | str | bytes], skip: bool, handovers: frozenset[int]
) -> None:
    ids = _flatten(parts)
    sampling = _params(skip_special_tokens=skip)
    text, stop, _ = _run(smollm2(), sampling, ids, handovers=handovers)
    assert (text, stop) == (smollm2().decode(ids, skip), None)


def test_half_a_character_is_held_back_and_an_invalid_byte_is_shown() -> None:
    ids = smollm2().encode("🙂")
    assert len(ids) > 1
    output = Detokenizer(smollm2(), _params(), ())
    assert [output.push(i).text for i in ids] == [""] * (len(ids) - 1) + ["🙂"]
    output = Detokenizer(smollm2(), _params(), ())
    assert output.push(ids[0]).text == ""
    assert output.push(smollm2().encode("x")[0]).text == "\ufffdx"
    assert output.push(ids[0]).text == ""
    assert output.finish() == "\ufffd"
    assert output.finish() == ""


def test_every_unknown_id_makes_text_at_once() -> None:
    output = Detokenizer(smollm2(), _params(), ())
    assert [output.push(i).text for i in (VOCAB, 10**9)] == ["\ufffd", "\ufffd"]


def test_without_a_tokenizer_there_is_no_text() -> None:
    output = Detokenizer(None, _params(stop=("x",)), (1, 2))
    assert output.push(3) == TextPiece("", None)
    assert Detokenizer.resume(None, _params(), output.state()).finish() == ""


# --- sentencepiece's first space ----------------------------------------------------------------


def _llama_ids(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size + 5), max_size=20)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans(), handovers=st.frozensets(st.integers(1, 25)))
def test_the_first_space_is_kept_after_a_prompt(
    llama: Tokenizer, data: st.DataObject, skip: bool, handovers: frozenset[int]
) -> None:
    prompt_ids = data.draw(_llama_ids(3), "prompt")  # specials and single bytes
    prompt_ids += data.draw(st.just([]) | st.just(llama.encode("Hello fox")), "prompt")
    ids = data.draw(_llama_ids(llama.vocab_size), "output")
    sampling = _params(skip_special_tokens=skip)
    text, _, _ = _run(llama, sampling, ids, tuple(prompt_ids), handovers)
    # A full stop after the prompt, so that its last bytes cannot join with the output's first.
    dot = llama.encode("x.", add_special_tokens=False)[-1:]
    if llama.decode(prompt_ids, skip):
        whole = llama.decode([*prompt_ids, *dot, *ids], skip)
        assert text == whole.removeprefix(llama.decode([*prompt_ids, *dot], skip))
    elif all(i < 3 for i in prompt_ids):
        assert text == llama.decode(ids, skip)


def test_first_token_with_and_without_a_prompt(llama: Tokenizer) -> None:
    first = llama.encode("fox", add_special_tokens=False)
    bos = 1
    assert _run(llama, _params(), first)[0] == "fox"
    assert _run(llama, _params(), first, (bos,))[0] == "fox"
    assert _run(llama, _params(), first, (bos, *llama.encode("Hello", False)))[0] == " fox"


# --- stop strings -------------------------------------------------------------------------------


def _naive(
    sampling: SamplingParams, ids: list[int], tokenizer: Tokenizer
) -> tuple[str, str | None, int]:
    """Search the whole text after each token. A stop cannot end within ``min_tokens`` tokens."""
    settled = 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")  # incomplete characters
        if count <= sampling.min_tokens:
            settled = len(text)
            continue
        found = [
            (text.find(stop, max(0, settled - len(stop) + 1)), n)
            for n, stop in enumerate(sampling.stop)
        ]
        found = sorted(pair for pair in found if pair[0] >= 0)
        if found:
            start, n = found[0]
            stop = sampling.stop[n]
            kept = start + len(stop) * sampling.include_stop_str_in_output
            return text[:kept], stop, count
    return tokenizer.decode(ids), None, len(ids)


@settings(max_examples=500, deadline=None)
@given(
    words=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.sampled_from(STOPS), max_size=4, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 5),
    handovers=st.frozensets(st.integers(1, 40)),
)
def test_stop_strings_against_a_naive_search(
    words: list[str], stop: list[str], include: bool, min_tokens: int, handovers: frozenset[int]
) -> None:
    tokenizer = smollm2()
    ids = [i for word in words for i in tokenizer.encode(word)]
    sampling = _params(stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens)
    assert _run(tokenizer, sampling, ids, (), handovers) == _naive(sampling, ids, tokenizer)


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=12),
    stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=4, unique=True),
)
def test_only_the_beginning_of_a_stop_string_is_held_back(
    words: list[str], stop: list[str]
) -> None:
    tokenizer = smollm2()
    output = Detokenizer(tokenizer, _params(stop=tuple(stop)), ())
    for token_id in (i for word in words for i in tokenizer.encode(word)):
        piece = output.push(token_id)
        if piece.stop is not None:
            break
        held = output.state().held_text
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("The answer: END") + tokenizer.encode("ING here")
    output = Detokenizer(tokenizer, _params(stop=("ENDING",)), ())
    pieces = []
    for token_id in ids:
        pieces.append(output.push(token_id))
        if pieces[-1].stop:
            break
    assert "".join(p.text for p in pieces) == "The answer: "
    assert pieces[-1].stop == "ENDING"


def test_a_false_alarm_is_shown_in_the_end() -> None:
    tokenizer = smollm2()
    output = Detokenizer(tokenizer, _params(stop=("ENDING",)), ())
    text = "".join(output.push(i).text for i in tokenizer.encode("an END"))
    assert text == "an "
    assert output.finish() == "END"


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, " "), (1, " "), (2, " Paris. Then")])
def test_a_stop_string_may_begin_within_min_tokens(min_tokens: int, expected: str) -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode(" Paris. Then")
    assert [tokenizer.decode([i]) for i in ids] == [" Paris", ".", " Then"]
    text, stop, count = _run(tokenizer, _params(stop=("Paris.",), min_tokens=min_tokens), ids)
    assert (text, stop, count) == (
        (expected, "Paris.", 2) if min_tokens < 2 else (expected, None, 3)
    )


def test_state_stays_small() -> None:
    tokenizer = smollm2()
    output = Detokenizer(tokenizer, _params(stop=("zzz",)), ())
    for token_id in tokenizer.encode("word 🙂 " * 500):
        output.push(token_id)
        state = output.state()
        assert isinstance(state, DetokenizerState)
        assert len(state.partial) <= 3
        assert len(state.held_text) <= 2
