"""From a model's name to a model that runs: its folder, weights, KV layout and fingerprint.

Another source of models or format of files is a file here. What a model family needs beyond
mlx-lm's own loading (dequantising, remapping) stands beside `loader.py`, never in the engine.
"""
