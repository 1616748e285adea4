"""An exported model behind an OpenAI-style endpoint: a plug-in for vLLM. It needs no Megatron."""
