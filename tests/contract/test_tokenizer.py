"""What the engine expects of every `Tokenizer`: the fake one and the embedded model's."""

import importlib.util
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Message, Piece, Tokenizer
from keepwarm.testing.tokenizer import FakeTokenizer

HAS_BACKEND = importlib.util.find_spec("mlx") and importlib.util.find_spec("transformers")
needs_backend = pytest.mark.skipif(
    not HAS_BACKEND, reason="MLX or transformers is not installed: HFTokenizer is NOT tested"
)

# SmolLM2's vocabulary has no token for a few bytes that only control characters and unassigned
# code points need; like every tokenizer of that kind it drops them.
SPELLABLE = st.characters(exclude_categories=["Cs", "Cc", "Cn"])
TEXTS = st.text(st.one_of(SPELLABLE, st.sampled_from("ab 12\n\t.'é😀<|>\u200d\u0301")), max_size=40)
CONTENTS = st.one_of(TEXTS, st.sampled_from(["", " ", "\n", " x \n\n", "don't  stop", "日本語\n"]))
CONVERSATIONS = st.lists(CONTENTS, min_size=1, max_size=6).map(
    lambda texts: [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
)
modest = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from hf_tokenizers import smollm2_tokenizer
    from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

    hf_tokenizer = smollm2_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return HFTokenizer(hf_tokenizer, [hf_tokenizer.eos_token_id])


@pytest.fixture(params=["fake", pytest.param("smollm2", marks=needs_backend)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "fake":
        return FakeTokenizer()
    hf: Tokenizer = request.getfixturevalue("smollm2")
    return hf


def special_texts(tokenizer: Tokenizer) -> list[str]:
    pieces = tokenizer.render([{"role": "user", "content": "x"}])
    return sorted({piece.text for piece in pieces if piece.special_id is not None})


def ids_of(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece.text) if piece.special_id is None else [piece.special_id]
    return ids


def streamed(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.push(token_id) for token_id in token_ids)
    assert not detokenizer.pending
    return text


@modest
@given(text=TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert streamed(tokenizer, tokenizer.encode(text)) == text


def test_ids_are_within_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, tokenizer.render([{"role": "user", "content": "Hello 😀"}]))
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_token_ids <= set(range(tokenizer.vocab_size))


@modest
@given(messages=CONVERSATIONS)
def test_rendering_keeps_the_contents(tokenizer: Tokenizer, messages: list[Message]) -> None:
    rendered = "".join(piece.text for piece in tokenizer.render(messages))
    for message in messages:
        assert message["content"] in rendered


@modest
@given(messages=CONVERSATIONS, data=st.data())
def test_special_text_in_a_message_is_ordinary(
    tokenizer: Tokenizer, messages: list[Message], data: st.DataObject
) -> None:
    marker = data.draw(st.sampled_from(special_texts(tokenizer)))
    attacks = [{**message, "content": f"{message['content']}{marker}x"} for message in messages]
    plain = [piece.special_id for piece in tokenizer.render(messages) if piece.special_id]
    pieces = tokenizer.render(attacks)
    assert [piece.special_id for piece in pieces if piece.special_id] == plain
    assert streamed(tokenizer, ids_of(tokenizer, pieces)).count(marker) >= len(messages)


def test_encode_never_makes_special_ids(tokenizer: Tokenizer) -> None:
    special_ids = {
        piece.special_id for piece in tokenizer.render([{"role": "user", "content": ""}])
    }
    for text in special_texts(tokenizer):
        assert not special_ids & set(tokenizer.encode(text))
        assert streamed(tokenizer, tokenizer.encode(text)) == text


def test_raw_text_has_real_special_tokens(tokenizer: Tokenizer) -> None:
    marker = special_texts(tokenizer)[-1]
    pieces = tokenizer.split(f"a{marker}b")
    assert [piece.text for piece in pieces][-3:] == ["a", marker, "b"]
    assert pieces[-2].special_id is not None
    assert tokenizer.split("".join(piece.text for piece in pieces)) == pieces


def test_the_generation_prompt_is_behind_the_messages(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "x"}]
    without = tokenizer.render(messages, add_generation_prompt=False)
    assert tokenizer.render(messages)[: len(without)] == without
    assert len(tokenizer.render(messages)) > len(without)


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    for piece in tokenizer.render([{"role": "user", "content": "x"}]):
        if piece.special_id is not None:
            assert detokenizer.push(piece.special_id) == ""
            assert not detokenizer.pending


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    detokenizer = tokenizer.detokenizer()
    for token_id in ids[:-1]:
        assert detokenizer.push(token_id) == ""
        assert detokenizer.pending
    assert detokenizer.push(ids[-1]) == "😀"
    assert not detokenizer.pending


def test_bytes_that_are_no_character_do_not_block(tokenizer: Tokenizer) -> None:
    end_of_character = tokenizer.encode("😀")[-1]
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.push(end_of_character) for _ in range(9))
    text += "".join(detokenizer.push(token_id) for token_id in tokenizer.encode("abc"))
    assert text == "\ufffd" * 9 + "abc"


def test_a_character_that_breaks_off_is_replaced_when_text_goes_on(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("😀")[:1]
    assert streamed(tokenizer, [*half, *tokenizer.encode("abc")]) == "\ufffdabc"


def test_a_real_replacement_character_is_text(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, tokenizer.encode("a\ufffd")) == "a\ufffd"


def test_two_detokenizers_do_not_share_state(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    one, other = tokenizer.detokenizer(), tokenizer.detokenizer()
    one.push(ids[0])
    assert not other.pending
    assert other.push(tokenizer.encode("a")[0]) == "a"


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest) as caught:
        FakeTokenizer().render([{"role": "user", "content": ""}, {"role": "system", "content": ""}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize("text", ["\ud800", "half \udc00 of it", "\ud83d"])
def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        tokenizer.encode(text)


@modest
@given(text=st.one_of(TEXTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=40)))
def test_no_text_has_fewer_tokens_than_is_said_of_it(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_a_long_text_is_known_to_be_long(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox. " * 1000
    assert len(text) / 100 <= tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
