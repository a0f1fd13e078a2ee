"""LoRA, low-rank adaptation (arXiv 2106.09685), with its scale alpha / r or alpha / sqrt(r) and LoRA+'s learning
rates: what `low_rank` says, and nothing else."""

from rwkv_miss.adapters.low_rank import LowRank

METHOD = LowRank()
