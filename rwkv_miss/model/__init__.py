"""RWKV models: what all are (base), each version (rwkv6, rwkv7), loaded from checkpoints (recognise, load) or new
(init), their state, and what runs on them (documents, log_probs)."""
