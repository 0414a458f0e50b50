"""A conversation as the model's chat template writes it, in the form that the template takes.

Tools will come in here: `chat_renderer.py` hands their definitions to the template, `traits.py`
finds out whether it takes them, and `call_forms.py` already writes the calls of earlier turns.
"""
