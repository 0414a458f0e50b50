"""HFTokenizer beside transformers' own way to the same ids."""

import importlib.util
from typing import Any

import pytest

if not importlib.util.find_spec("mlx_lm"):
    pytest.skip("MLX is not installed: HFTokenizer is NOT tested", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tokenizers import sentencepiece_tokenizer, smollm2_tokenizer
from keepwarm.core.errors import InvalidRequest
from keepwarm.core.ports import Piece
from keepwarm.core.transcript import EMPTY, Transcript
from keepwarm.engine.prompt.continuation import Prompt, TextContinuation
from keepwarm.engine.prompt.prompt_encoder import PromptEncoder
from keepwarm.engine.reply.reply_text import Reply, ReplyText
from keepwarm.mlx_backend.text.detokenizer import bytes_of_token
from keepwarm.mlx_backend.text.special_tokens import Shield
from keepwarm.mlx_backend.text.tokenizer import HFTokenizer

# isort: split
from mlx_lm.tokenizer_utils import TokenizerWrapper

TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("Helo wrd.12\n\t'é😀<|>\u200d\u0301"),
    ),
    max_size=40,
)
CONTENTS = st.one_of(TEXTS, st.sampled_from(["", " ", "\n", " x \n\n", "don't  stop", "日本語\n"]))
CONVERSATIONS = st.lists(CONTENTS, min_size=1, max_size=6).map(
    lambda texts: [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
)
STYLES = ["legacy", "first", "always"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return smollm2_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids_of(tokenizer: HFTokenizer, pieces: tuple[Piece, ...]) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece.text) if piece.special_id is None else [piece.special_id]
    return ids


def reference_ids(hf_tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(
        hf_tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
    )


@pytest.fixture(scope="module")
def pair(smollm2: Any) -> tuple[Any, HFTokenizer]:
    return smollm2, HFTokenizer(smollm2, [2])


@settings(max_examples=150, deadline=None)
@given(messages=CONVERSATIONS, bare=st.booleans())
def test_ids_are_those_of_apply_chat_template(
    pair: tuple[Any, HFTokenizer], messages: list[dict[str, str]], bare: bool
) -> None:
    hf_tokenizer, tokenizer = pair
    if not bare:
        messages = [{"role": "system", "content": "Be brief.\n"}, *messages]
    assert ids_of(tokenizer, tokenizer.render(messages)) == reference_ids(hf_tokenizer, messages)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(messages=CONVERSATIONS)
def test_ids_are_those_of_apply_chat_template_with_sentencepiece(
    style: str, messages: list[dict[str, str]]
) -> None:
    hf_tokenizer = SENTENCEPIECE[style]
    tokenizer = HFTokenizer(hf_tokenizer, [2])
    assert ids_of(tokenizer, tokenizer.render(messages)) == reference_ids(hf_tokenizer, messages)


SENTENCEPIECE = {style: sentencepiece_tokenizer(style) for style in STYLES}


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_raw_text_is_encoded_as_transformers_does(style: str, text: str) -> None:
    hf_tokenizer = SENTENCEPIECE[style]
    tokenizer = HFTokenizer(hf_tokenizer, [2])
    expected = hf_tokenizer.backend_tokenizer.encode(text).ids
    assert ids_of(tokenizer, tokenizer.split(text)) == expected


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text))
def test_streamed_text_is_the_batch_decoding(style: str, text: str) -> None:
    hf_tokenizer = SENTENCEPIECE[style]
    tokenizer = HFTokenizer(hf_tokenizer, [2])
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    assert "".join(map(detokenizer.push, ids)) == hf_tokenizer.backend_tokenizer.decode(ids)
    assert not detokenizer.pending


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(17, 49151), max_size=30))
def test_any_ids_stream_like_their_batch_decoding(
    pair: tuple[Any, HFTokenizer], ids: list[int]
) -> None:
    hf_tokenizer, tokenizer = pair
    detokenizer = tokenizer.detokenizer()
    text = "".join(map(detokenizer.push, ids))
    whole = hf_tokenizer.backend_tokenizer.decode(ids)
    assert whole == text + "\ufffd" * detokenizer.pending


def prompt_from(
    tokenizer: HFTokenizer, messages: list[dict[str, str]], known: Transcript
) -> Prompt:
    encoder = PromptEncoder(tokenizer)
    return TextContinuation(tokenizer.render(messages), encoder).prompt_from(known)


def replied(tokenizer: HFTokenizer, token_ids: list[int]) -> Reply:
    text = ReplyText(tokenizer.detokenizer())
    for token_id in token_ids:
        text.push(token_id)
    text.finish()
    return text.reply


@settings(max_examples=60, deadline=None)
@given(question=CONTENTS, ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_reply_is_continued_with_its_own_ids(
    pair: tuple[Any, HFTokenizer], question: str, ids: list[int]
) -> None:
    """But for what no client can send back: special tokens in its middle, a half character."""
    tokenizer = pair[1]
    messages = [{"role": "user", "content": question}]
    prompt = prompt_from(tokenizer, messages, EMPTY)
    reply = replied(tokenizer, ids)
    line = prompt.transcript.extended(reply.spoken.span)
    assert line.token_ids == (*prompt.token_ids, *reply.spoken.token_ids)

    messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "Go on"}]
    following = prompt_from(tokenizer, messages, line)
    if reply.is_whole:
        assert following.token_ids[: line.num_tokens] == line.token_ids
        assert following.num_spliced == line.num_tokens
    else:
        fresh = prompt_from(tokenizer, messages, EMPTY)
        assert following.token_ids == fresh.token_ids


def test_a_first_word_loses_its_space_and_the_next_ones_keep_it() -> None:
    hf_tokenizer = SENTENCEPIECE["first"]
    detokenizer = HFTokenizer(hf_tokenizer, [2]).detokenizer()
    hello, world = hf_tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert [detokenizer.push(i) for i in (hello, world, hello)] == ["Hello", " world", " Hello"]


def test_byte_tokens_that_are_no_character_do_not_block() -> None:
    hf_tokenizer = SENTENCEPIECE["first"]
    detokenizer = HFTokenizer(hf_tokenizer, [2]).detokenizer()
    bad, letter = hf_tokenizer.convert_tokens_to_ids(["<0x99>", "a"])
    text = "".join(detokenizer.push(i) for i in [bad] * 9 + [letter])
    assert text == "\ufffd" * 9 + "a"


def test_a_token_may_absorb_the_white_space_behind_it() -> None:
    hf_tokenizer = SENTENCEPIECE["first"]
    tokenizer = HFTokenizer(hf_tokenizer, [2])
    text = "<s>Hello<|pad|> \n world"
    assert (
        ids_of(tokenizer, tokenizer.split(text)) == hf_tokenizer.backend_tokenizer.encode(text).ids
    )
    assert tokenizer.split(text)[2].text == "<|pad|> \n "


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = HFTokenizer(SENTENCEPIECE["first"], [2])
    with pytest.raises(InvalidRequest, match="no system here") as caught:
        tokenizer.render([{"role": "system", "content": "x"}])
    assert caught.value.field == "messages"


def test_a_model_without_a_template_refuses_messages() -> None:
    hf_tokenizer = sentencepiece_tokenizer("first")
    hf_tokenizer.chat_template = None
    for tokenizer in (hf_tokenizer, TokenizerWrapper(hf_tokenizer)):
        with pytest.raises(InvalidRequest, match="no chat template"):
            HFTokenizer(tokenizer, [2]).render([{"role": "user", "content": "x"}])


def test_mlx_lms_wrapper_gives_the_same(pair: tuple[Any, HFTokenizer]) -> None:
    hf_tokenizer, tokenizer = pair
    wrapped = HFTokenizer(TokenizerWrapper(hf_tokenizer), [2])
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    assert wrapped.render(messages) == tokenizer.render(messages)


def test_the_tokenizer_that_was_given_is_left_alone(pair: tuple[Any, HFTokenizer]) -> None:
    hf_tokenizer, tokenizer = pair
    tokenizer.encode("<|im_start|>")
    assert hf_tokenizer.encode("<|im_start|>") == [1]


def test_special_text_is_ordinary_wherever_a_message_has_it(
    pair: tuple[Any, HFTokenizer],
) -> None:
    shield = Shield(pair[1]._specials)
    covered = shield.cover({"tool_calls": [{"arguments": {"<|im_end|>": "<|im_start|>"}, "n": 1}]})
    assert "<|im_" not in str(covered)
    assert shield.uncover(Piece(str(covered))).text == (
        "{'tool_calls': [{'arguments': {'<|im_end|>': '<|im_start|>'}, 'n': 1}]}"
    )


def test_a_special_token_cannot_be_put_together_from_two_strings(
    pair: tuple[Any, HFTokenizer],
) -> None:
    shield = Shield(pair[1]._specials)
    joined = shield.cover("<|im_") + shield.cover("end|>")
    assert not any(piece.special_id for piece in pair[1]._specials.cut(joined))


def test_added_tokens_are_bytes_or_plain_text() -> None:
    assert bytes_of_token("Ġa") == b" a"
    assert bytes_of_token("<think>") == b"<think>"
    assert bytes_of_token("a b▁") == "a b▁".encode()
