"""Deltas, stop strings and kept ids of a reply."""

from collections.abc import Collection, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.engine.reply.reply_text import Emitted, Reply, ReplyText
from keepwarm.engine.reply.stop_strings import StopMatch
from keepwarm.testing.tokenizer import IM_START, FakeTokenizer, special_piece

TOKENIZER = FakeTokenizer()
HELLO, WORLD, FULL_STOP_NEWLINE = (TOKENIZER.encode(word)[0] for word in ("Hello", " world", ".\n"))
SMILE = list("😀".encode())
SPECIAL = special_piece(IM_START).special_id
assert SPECIAL is not None


class Words:
    """A detokenizer whose tokens are given by the test; behind some a character has begun."""

    def __init__(self, words: Sequence[str], pending_after: Collection[int] = ()) -> None:
        self._words = words
        self._pending_after = pending_after
        self.pending = False

    def has_text(self, token_id: int) -> bool:
        return True

    def push(self, token_id: int) -> str:
        self.pending = token_id in self._pending_after
        return self._words[token_id]


def first_stop(text: str, stops: Sequence[str]) -> StopMatch | None:
    """The stop string that ends first; of those that end at once, the longest."""
    found = [StopMatch(text.find(stop), stop) for stop in stops if stop in text]
    return min(found, key=lambda one: (one.start + len(one.stop), one.start), default=None)


def reply_text(*stop: str) -> ReplyText:
    return ReplyText(TOKENIZER.detokenizer(), stop)


def push_all(text: ReplyText, token_ids: Sequence[int]) -> list[Emitted]:
    emitted = []
    for token_id in token_ids:
        emitted.append(text.push(token_id))
        if text.stopped_by is not None:
            break
    return emitted


def test_text_goes_out_as_it_comes() -> None:
    text = reply_text()
    assert push_all(text, [HELLO, WORLD]) == [
        Emitted("Hello", (HELLO,)),
        Emitted(" world", (WORLD,)),
    ]
    assert not text.finish()
    assert text.reply == Reply("Hello world", (HELLO, WORLD))


def test_a_half_character_waits_and_its_ids_go_with_it() -> None:
    text = reply_text()
    assert push_all(text, SMILE) == [*[Emitted("", ())] * 3, Emitted("😀", tuple(SMILE))]


def test_a_reply_ended_in_mid_character_keeps_the_ids_and_not_the_text() -> None:
    text = reply_text()
    push_all(text, [HELLO, *SMILE[:2]])
    assert text.finish() == Emitted("", tuple(SMILE[:2]))
    assert text.reply == Reply("Hello", (HELLO, *SMILE[:2]), num_silent=2)
    assert text.reply.spoken == Reply("Hello", (HELLO,))


def test_a_reply_ended_in_mid_character_by_a_token_with_text_is_not_whole() -> None:
    text = ReplyText(Words(["Hello", "a", ""], pending_after={1}), ())
    push_all(text, [0, 1])
    assert text.finish() == Emitted("", (1,))
    assert text.reply == Reply("Helloa", (0, 1), is_whole=False)
    assert text.reply.spoken == text.reply


def test_a_silent_token_in_the_middle_says_so() -> None:
    text = reply_text()
    push_all(text, [HELLO, SPECIAL, WORLD])
    assert text.reply == Reply("Hello world", (HELLO, SPECIAL, WORLD), is_whole=False)
    assert text.reply.spoken == text.reply


def test_of_a_reply_without_text_the_line_keeps_nothing() -> None:
    text = reply_text()
    push_all(text, [SPECIAL, SPECIAL])
    assert text.reply.token_ids == (SPECIAL, SPECIAL)
    assert text.reply.spoken == Reply("", ())


def test_a_special_token_gives_its_id_and_no_text() -> None:
    text = reply_text()
    assert push_all(text, [HELLO, SPECIAL]) == [Emitted("Hello", (HELLO,)), Emitted("", (SPECIAL,))]


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    text = reply_text("\nUser:")
    ids = TOKENIZER.encode("a\nU")
    assert [emitted.text for emitted in push_all(text, ids)] == ["a", "", ""]
    assert text.push(ord("x")) == Emitted("\nUx", (*ids[1:], ord("x")))


def test_held_text_is_flushed_when_the_reply_ends_by_itself() -> None:
    text = reply_text("\nUser:")
    push_all(text, [HELLO, *b"\nUs"])
    assert text.finish() == Emitted("\nUs", tuple(b"\nUs"))
    assert text.reply.is_whole


def test_a_stop_string_is_found_across_tokens_and_not_delivered() -> None:
    text = reply_text("\nUser:")
    emitted = push_all(text, [HELLO, *b"\nUser:", HELLO])
    assert "".join(one.text for one in emitted) == "Hello"
    assert text.stopped_by == "\nUser:"
    assert text.reply == Reply("Hello", (HELLO,))
    assert not text.finish()


def test_a_stop_string_that_begins_in_mid_token_leaves_that_token_out() -> None:
    text = reply_text("\nUser:")
    push_all(text, [HELLO, FULL_STOP_NEWLINE, *b"User:"])
    assert text.reply == Reply("Hello.", (HELLO,), is_whole=False)


def test_a_silent_token_right_before_the_stop_string_is_kept() -> None:
    text = reply_text("x")
    push_all(text, [HELLO, SPECIAL, ord("x")])
    assert text.reply == Reply("Hello", (HELLO, SPECIAL), num_silent=1)


def test_a_stop_string_right_after_a_held_character_is_seen() -> None:
    text = reply_text("😀")
    push_all(text, [HELLO, *SMILE])
    assert text.reply == Reply("Hello", (HELLO,))


def test_cancelling_keeps_what_was_sent() -> None:
    text = reply_text("\nUser:")
    push_all(text, [HELLO, *b"\nUs"])
    text.cancel()
    assert not text.finish()
    assert text.reply == Reply("Hello", (HELLO,))


def test_cancelling_in_mid_token_says_so() -> None:
    text = reply_text("\nUser:")
    push_all(text, [HELLO, FULL_STOP_NEWLINE])
    text.cancel()
    assert text.reply == Reply("Hello.", (HELLO,), is_whole=False)


@settings(max_examples=150)
@given(
    words=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_how_the_text_is_cut_into_tokens_does_not_matter(
    words: list[str], stops: list[str]
) -> None:
    whole = "".join(words)
    by_word, by_character = ReplyText(Words(words), stops), ReplyText(Words(whole), stops)
    emitted = push_all(by_word, range(len(words)))
    push_all(by_character, range(len(whole)))
    emitted += [by_word.finish()]
    by_character.finish()

    match = first_stop(whole, stops)
    reply = by_word.reply
    assert reply.text == (whole if match is None else whole[: match.start])
    assert reply.text == by_character.reply.text
    assert by_word.stopped_by == by_character.stopped_by
    assert by_character.reply.is_whole
    assert "".join(one.text for one in emitted) == reply.text
    assert [id_ for one in emitted for id_ in one.token_ids] == list(reply.token_ids)
    assert list(reply.token_ids) == list(range(len(reply.token_ids)))
    carried = "".join(words[token_id] for token_id in reply.token_ids)
    assert reply.text.startswith(carried)
    assert reply.is_whole == (carried == reply.text)
