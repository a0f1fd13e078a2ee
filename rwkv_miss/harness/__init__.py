"""Models of ours in EleutherAI's lm-evaluation-harness, the package lm_eval: an extra, which nothing else imports."""
