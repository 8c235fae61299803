"""Ways in: a mode, modules, other libraries' signatures, PyTorch's flash hook, transformers."""
