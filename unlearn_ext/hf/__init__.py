"""For models of Hugging Face's transformers: masked training in the Trainer, batches of two sets, records.

Everything else of the package takes these models as they are; docs/language_models.md says how. Nothing here
is imported from transformers, PEFT or accelerate before it is needed.
"""

from unlearn_ext.hf.callback import mask_callback
from unlearn_ext.hf.data import ForgetRetainCollator, ForgetRetainDataset
from unlearn_ext.hf.optimizers import masked_adamw, masked_sgd
from unlearn_ext.hf.records import read_evidence, save_pretrained

__all__ = [
    "ForgetRetainCollator",
    "ForgetRetainDataset",
    "mask_callback",
    "masked_adamw",
    "masked_sgd",
    "read_evidence",
    "save_pretrained",
]
