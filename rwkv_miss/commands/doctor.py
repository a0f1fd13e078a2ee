from __future__ import annotations

import json as json_format


def run(json: bool = False) -> int:
    """Show what this machine can run, and why not the rest; exit status 1 if the recurrence has no compiled kernel.

    Args:
        json: Print one JSON object instead of text.
    """
    from rwkv_miss.doctor import diagnose, shortened

    diagnosis = diagnose()
    if json:
        facts = {"chosen": diagnosis.chosen, "is_native": diagnosis.is_native, "found": dict(diagnosis.found)}
        print(json_format.dumps(facts))
    else:
        for name, text in [*shortened(diagnosis.found), ("auto takes", diagnosis.chosen)]:
            print(f"{name:<15} {text}")
    return 0 if diagnosis.is_native else 1
