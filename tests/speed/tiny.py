"""A setting that a test plays in a moment."""

from rlrag.speed import shapes

CHANGES = {
    "num_slots": 4, "max_episodes": 8, "burst": 3, "page_size": 4, "prefill_rows": 4, "prefill_chunk": 8,
    "prefill_chunks": 2, "episodes": 8, "turns": 2, "turn_tokens": 6, "document_tokens": 3, "prompt_tokens": 5,
    "decode_tokens": 7, "questions": 1, "micro_rows": 1, "row_tokens": 2688,
}  # fmt: skip
SETTING = shapes.changed(shapes.demo(), layers=1, scale=16, changes=CHANGES)
ARCHITECTURE = SETTING.architecture


class Rates:
    """A device of round numbers."""

    flops = 1e9
    bandwidth = 1e8
