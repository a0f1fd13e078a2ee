"""The objectives of training, each in a file of its own; `rwkv_miss.training.objective` has their table."""
