"""Text and ids, as the model's tokenizer and chat template see them.

These modules work on values and keep no request's state; any thread may call them.
"""
