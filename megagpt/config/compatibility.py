"""Whether weights of one model mean the same in another."""

from megagpt.config.schema import ModelConfig


def weight_differences(there: ModelConfig, here: ModelConfig) -> dict[str, tuple[object, object]]:
    """What of two models differs that changes the shape or the meaning of their weights: key to both values.

    What is for training alone may differ, max_seq_len too where positions have no table.
    """
    free = {"dropout", "initializer_range", "mup_base_width"}
    if here.position != "learned":
        free.add("max_seq_len")
    if here.position != "rope":
        free.add("rope_theta")
    before, now = (
        model.model_dump() | {"num_kv_heads": model.kv_heads, "ffn_hidden_size": model.ffn_size}
        for model in (there, here)
    )
    return {key: (value, now[key]) for key, value in before.items() if key not in free and value != now[key]}
