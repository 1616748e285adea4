"""An exported model behind an OpenAI-style endpoint: a plug-in for vLLM. It needs no Megatron, and Python 3.11 will do."""
