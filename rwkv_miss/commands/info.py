from __future__ import annotations


def run(file: str) -> int:
    """Show what is in a checkpoint, a state file or an adapter folder.

    Args:
        file: A .pth or .st file of a model or a state, or the folder of an adapter or a run.
    """
    from rwkv_miss.describe import describe

    for name, value in describe(file).items():
        print(f"{name:<12} {value}")
    return 0
