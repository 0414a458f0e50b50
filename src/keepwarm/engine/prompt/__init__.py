"""Text to ids and back: what a prompt is made of, and which line it continues.

A prompt's road: `old_messages.py` and `messages.py` (what was sent, readable and valid),
`limits.py` (how long it may be), `chat_renderer.py` (the template, in the form that it takes),
`prompt_encoder.py` (ids), `line_choice.py` and `continuation.py` (whose ids it takes over). Where
this takes long, `prompt_reader.py` runs on `reader_threads.py`. A reply's road is `reply_text.py`.

What comes next has its place here. Tools: `chat_renderer.py` hands their definitions to the
template, `template_traits.py` finds out whether it takes them, `call_forms.py` writes calls. Calls
and reasoning in replies: a parser of what `reply_text.py` emits, made for each request like
`ReplyText`. Constrained output: a grammar's state beside `ReplyText`, advanced with each token; the
mask that it gives goes to the generator with the row's `Sampling`.
"""
