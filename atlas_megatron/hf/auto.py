"""`import atlas_megatron.hf.auto`: transformers' Auto classes know exported models, without `trust_remote_code`.

transformers has no list of installed packages that it would ask, so `import transformers` alone does not find the
classes. This import brings torch and transformers, and no Megatron. From then on transformers takes the installed
classes for every folder of this kind, also where `trust_remote_code=True` is given: that is its rule for registered
classes. No command of this package imports it: `--trust-remote-code` runs the code of the folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM, AtlasModel

AutoConfig.register(AtlasConfig.model_type, AtlasConfig, exist_ok=True)
AutoModel.register(AtlasConfig, AtlasModel, exist_ok=True)
AutoModelForCausalLM.register(AtlasConfig, AtlasForCausalLM, exist_ok=True)
