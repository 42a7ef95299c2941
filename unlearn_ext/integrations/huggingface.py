"""For models of Hugging Face's transformers: ``ux.hf`` under the name of the package it is for."""

from unlearn_ext.hf import (
    ForgetRetainCollator,
    ForgetRetainDataset,
    mask_callback,
    masked_adamw,
    masked_sgd,
    read_evidence,
    save_pretrained,
)

__all__ = [
    "ForgetRetainCollator",
    "ForgetRetainDataset",
    "mask_callback",
    "masked_adamw",
    "masked_sgd",
    "read_evidence",
    "save_pretrained",
]
