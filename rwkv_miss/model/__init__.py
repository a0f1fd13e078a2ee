"""RWKV models: what all have in common (base), each version (rwkv6, rwkv7), loading (recognise, load), new models
(init), their state (state, initial_state), packed documents (documents), and log-probabilities (log_probs)."""
