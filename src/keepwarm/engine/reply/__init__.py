"""From the tokens of a reply to the text that may be sent.

Here is the place for what else a reply may hold. Tool calls and reasoning: a parser of what
`reply_text.py` emits, made for each request like `ReplyText`. Constrained output: a grammar's state
beside `ReplyText`, advanced with each token; the mask that it gives goes to the generator with the
row's `Sampling`.
"""
