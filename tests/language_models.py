"""Small models of transformers, built from configurations (nothing is downloaded), and batches for them."""

import torch

LENGTHS = (8, 5, 3, 6)
VOCABULARY = 40

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "head_dim": 8}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {**_COMMON, **_NO_DROPOUT, "max_position_embeddings": 16, "num_labels": 3}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

DECODERS = {
    "Llama": _GROUPED,
    "GPT2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "GPTNeoX": {**_COMMON, "max_position_embeddings": 16},  # Pythia
    "Qwen2": _GROUPED,
    "Qwen3": _GROUPED,
    "Gemma2": {**_GROUPED, "sliding_window": 4},
    "Gemma3": {**_GROUPED, "sliding_window": 4},
    "Phi3": {**_COMMON, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
OTHERS = {
    "T5ForConditionalGeneration": _T5,
    "SwitchTransformersForConditionalGeneration": {
        **_T5,
        "num_decoder_layers": 2,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 8,
    },
    "BertForSequenceClassification": _BERT,
    "BertForTokenClassification": _BERT,
    "BertForMaskedLM": _BERT,
    "WhisperForConditionalGeneration": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 6,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "dropout": 0.0,
    },
}


def make(name, seed=0, **settings):
    """A model with random weights, in eval mode: a decoder by its short name, or a class by its own.

    Biases and norms are drawn as well: where they are zeros and ones, an error in their place would not show.
    """
    import transformers

    torch.manual_seed(seed)
    if name in DECODERS:
        kind = {"GPT2": "GPT2Config", "Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        config = getattr(transformers, kind)(**{**DECODERS[name], **settings})
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{**OTHERS[name], **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def mask_of(side="right", lengths=LENGTHS):
    """``[N, T]``, 1 where a token is none of the padding."""
    place, longest = torch.arange(max(lengths)), max(lengths)
    counts = torch.tensor(lengths)[:, None]
    return ((place < counts) if side == "right" else (place >= longest - counts)).long()


def tokens(*shape, seed=1):
    """Random ones, none of them special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def decoder_batch(side="right"):
    """Sequences of several lengths; of the first, the prompt has no labels."""
    mask = mask_of(side)
    ids = tokens(*mask.shape) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    # What comes after padding on its left is predicted from the padding.
    labels[torch.arange(len(mask)), mask.argmax(1)] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def packed_batch():
    """Two documents in a row: positions restart, and no token is predicted from another document."""
    cuts = (3, 5, 4, 6)
    ids = tokens(len(cuts), 8)
    labels = ids.clone()
    for row, cut in enumerate(cuts):
        labels[row, cut] = -100
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(8 - cut)]) for cut in cuts])
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def batch_for(name, side="right"):
    """A batch that goes with a model of ``make``."""
    if name in DECODERS:
        return decoder_batch(side)
    mask = mask_of(side)
    batch = {"input_ids": tokens(*mask.shape) * mask, "attention_mask": mask}
    if name == "BertForSequenceClassification":
        return {**batch, "labels": torch.tensor([0, 1, 2, 1])}
    if name == "BertForTokenClassification":
        return {**batch, "labels": (tokens(*mask.shape, seed=2) % 3).masked_fill(mask == 0, -100)}
    if name == "BertForMaskedLM":
        hidden = (tokens(*mask.shape, seed=2) % 3 == 0) & (mask == 1)
        hidden[2, 0] = hidden[2, -1] = True
        return {**batch, "labels": tokens(*mask.shape, seed=3).masked_fill(~hidden, -100)}
    labels = tokens(4, 6, seed=2)
    labels[1, 3:] = labels[3, 5:] = -100
    if name == "WhisperForConditionalGeneration":
        generator = torch.Generator().manual_seed(1)
        return {"input_features": torch.randn(4, 8, 12, generator=generator), "labels": labels}
    return {**batch, "labels": labels}


def trimmed(batch):
    """The samples one by one, without their padding."""
    found = []
    for row in range(len(batch["labels"])):
        keep = batch["attention_mask"][row].bool()
        sample = {key: value[row : row + 1] for key, value in batch.items()}
        found.append({k: v[:, keep] if v.shape[1:] == keep.shape else v for k, v in sample.items()})
    return found
