"""From what a request gives to the ids of its prompt, and to the line that it continues.

A prompt's road: `old_messages.py` and `messages.py` (what was sent, readable and valid),
`limits.py` (how long it may be), `template/` (its text), `prompt_encoder.py` (ids),
`line_choice.py` and `continuation.py` (whose ids it takes over). `prompt_reader.py` leads along it,
and runs on `reader_threads.py` where that takes long.
"""
