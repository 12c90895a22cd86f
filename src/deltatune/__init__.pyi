"""The public names, for type checkers and editors; `__init__.py` loads them when they are used."""

from typing import Any

from deltatune.adapter import Adapter as Adapter
from deltatune.adapter import Applied as Applied
from deltatune.adapter import LinearMap as LinearMap
from deltatune.adapter import Method as Method
from deltatune.adapter import Stored as Stored
from deltatune.auto import AutoPeftModel as AutoPeftModel
from deltatune.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from deltatune.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from deltatune.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from deltatune.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from deltatune.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from deltatune.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from deltatune.callback import AdapterCallback as AdapterCallback
from deltatune.calls import Value as Value
from deltatune.calls import call_values as call_values
from deltatune.config import PeftConfig as PeftConfig
from deltatune.config import PeftType as PeftType
from deltatune.config import TaskType as TaskType
from deltatune.config import get_peft_config as get_peft_config
from deltatune.errors import PeftError as PeftError
from deltatune.errors import PeftWarning as PeftWarning
from deltatune.functional import get_peft_model_state_dict as get_peft_model_state_dict
from deltatune.functional import inject_adapter_in_model as inject_adapter_in_model
from deltatune.functional import set_peft_model_state_dict as set_peft_model_state_dict
from deltatune.layer import AdaptedLayer as AdaptedLayer
from deltatune.methods.adalora import AdaLoraConfig as AdaLoraConfig
from deltatune.methods.adamss import AdamssConfig as AdamssConfig
from deltatune.methods.beft import BeftConfig as BeftConfig
from deltatune.methods.bitfit import BitFitConfig as BitFitConfig
from deltatune.methods.boft import BOFTConfig as BOFTConfig
from deltatune.methods.c3a import C3AConfig as C3AConfig
from deltatune.methods.deft import DeftConfig as DeftConfig
from deltatune.methods.delora import DeloraConfig as DeloraConfig
from deltatune.methods.fourierft import FourierFTConfig as FourierFTConfig
from deltatune.methods.glora import GloraConfig as GloraConfig
from deltatune.methods.gralora import GraloraConfig as GraloraConfig
from deltatune.methods.hira import HiraConfig as HiraConfig
from deltatune.methods.hra import HRAConfig as HRAConfig
from deltatune.methods.ia3 import IA3Config as IA3Config
from deltatune.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from deltatune.methods.loha import LoHaConfig as LoHaConfig
from deltatune.methods.lokr import LoKrConfig as LoKrConfig
from deltatune.methods.lora import LoraConfig as LoraConfig
from deltatune.methods.miss import MissConfig as MissConfig
from deltatune.methods.oft import OFTConfig as OFTConfig
from deltatune.methods.osf import OSFConfig as OSFConfig
from deltatune.methods.peanut import PeanutConfig as PeanutConfig
from deltatune.methods.psoft import PsoftConfig as PsoftConfig
from deltatune.methods.pvera import PveraConfig as PveraConfig
from deltatune.methods.randlora import RandLoraConfig as RandLoraConfig
from deltatune.methods.road import RoadConfig as RoadConfig
from deltatune.methods.supertuning import SupertuningConfig as SupertuningConfig
from deltatune.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from deltatune.methods.unilora import UniLoraConfig as UniLoraConfig
from deltatune.methods.vblora import VBLoRAConfig as VBLoRAConfig
from deltatune.methods.vera import VeraConfig as VeraConfig
from deltatune.methods.waveft import WaveFTConfig as WaveFTConfig
from deltatune.model import PeftModel as PeftModel
from deltatune.outputs.bottleneck import BottleneckConfig as BottleneckConfig
from deltatune.outputs.compacter import CompacterConfig as CompacterConfig
from deltatune.outputs.lily import LilyConfig as LilyConfig
from deltatune.outputs.poly import PolyConfig as PolyConfig
from deltatune.outputs.reft import ReftConfig as ReftConfig
from deltatune.prompts.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from deltatune.prompts.cartridge import CartridgeConfig as CartridgeConfig
from deltatune.prompts.cartridge import CartridgeEncoder as CartridgeEncoder
from deltatune.prompts.compose import compose_cartridge_adapters as compose_cartridge_adapters
from deltatune.prompts.compose import compose_prefix_folders as compose_prefix_folders
from deltatune.prompts.compose import compose_prefixes as compose_prefixes
from deltatune.prompts.config import PromptLearningConfig as PromptLearningConfig
from deltatune.prompts.cpt import CPTConfig as CPTConfig
from deltatune.prompts.cpt import CPTEmbedding as CPTEmbedding
from deltatune.prompts.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from deltatune.prompts.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from deltatune.prompts.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from deltatune.prompts.p_tuning import PromptEncoder as PromptEncoder
from deltatune.prompts.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from deltatune.prompts.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from deltatune.prompts.prefix import PrefixEncoder as PrefixEncoder
from deltatune.prompts.prefix import PrefixTuningConfig as PrefixTuningConfig
from deltatune.prompts.prompt_tuning import PromptEmbedding as PromptEmbedding
from deltatune.prompts.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from deltatune.prompts.prompt_tuning import PromptTuningInit as PromptTuningInit
from deltatune.prompts.serve import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from deltatune.prompts.serve import prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values
from deltatune.prompts.serve import to_cache as to_cache
from deltatune.prompts.text import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from deltatune.registry import METHODS as METHODS
from deltatune.registry import register_method as register_method
from deltatune.schedule import Schedule as Schedule
from deltatune.shadow.config import ShadowConfig as ShadowConfig
from deltatune.shadow.detached import detached_shadow as detached_shadow
from deltatune.status import TunerLayerStatus as TunerLayerStatus
from deltatune.status import TunerModelStatus as TunerModelStatus
from deltatune.status import get_layer_status as get_layer_status
from deltatune.status import get_model_status as get_model_status
from deltatune.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from deltatune.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from deltatune.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from deltatune.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from deltatune.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from deltatune.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from deltatune.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
from deltatune.tasks import get_peft_model as get_peft_model
from deltatune.xlora.config import XLoraConfig as XLoraConfig

__version__: str
__all__: list[str]

def __getattr__(name: str) -> Any: ...
