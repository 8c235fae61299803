"""A toy AdaAttn backend; start at `adaattn_toy.plugin`."""
