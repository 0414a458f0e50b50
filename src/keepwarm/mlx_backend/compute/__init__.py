"""The model's steps over rows, and each row's KV as arrays.

`row_batch.py` is the generator. One for other kinds of KV (sliding windows, recurrent state), or
one that runs a step without MLX, implements the same port, `core/ports.py`, and passes the same
contract suite; `loading/loader.py` decides which one a model gets.
"""
