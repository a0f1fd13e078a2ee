"""Text generation: continuous batching (engine), choosing the next token (sampling), ids to text as they come
(text_stream), and simple functions over these (generate)."""
