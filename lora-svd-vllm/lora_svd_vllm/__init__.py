"""A vLLM plugin that serves the compact checkpoints of lora_svd. It imports neither lora_svd nor PEFT."""

__version__ = "0.1.0"


def register() -> None:
    """Make vLLM know the quantization method "lora_svd". Safe to call again, as vLLM does in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import CompactConfig

    register_quantization_config("lora_svd")(CompactConfig)
