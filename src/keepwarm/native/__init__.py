"""The CPU's whole step in C++, loaded with ctypes. It knows neither MLX nor a model's files."""
