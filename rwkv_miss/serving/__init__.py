"""An HTTP server that speaks OpenAI's API: what requests hold (bodies), the thread that owns the engine (worker), who
waits and who runs (places), the answers as they come (service), their form (choices), and the routes (app)."""
