"""Text from a model: a batch whose members come and go (engine), how each goes on (sampling), its ids as text
(text_stream), and the simple functions over them (generate)."""
